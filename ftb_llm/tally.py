"""`metrics.jsonl` and `events.jsonl` summed up row by row: a run of any length needs little memory."""

import statistics
from array import array
from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ftb_llm.types import ObjectiveSpec

_REWARD_WINDOW_STEPS = 10  # sampled rewards are noisy: without an oracle, start and end are means over this many steps
_MEANS = (
    "off_policy/staleness_mean",
    "perf/generate_tokens_per_second",
    "perf/learn_tokens_per_second",
)

Row = Mapping[str, Any]


class StepTally:
    """What `summary.json` says of the steps."""

    def __init__(self, switches: Container[int]) -> None:
        self.steps = 0
        self.train_seconds = 0.0
        self.first_evaluated: Row = {}
        self.last_evaluated: Row = {}
        self.objective = ObjectiveChanges(switches)
        self._first_rewards: list[float] = []
        self._last_rewards: deque[float] = deque(maxlen=_REWARD_WINDOW_STEPS)
        self._sums = dict.fromkeys(_MEANS, (0.0, 0))  # with the number of steps that have it
        self._part_seconds = self._whole_seconds = 0.0

    def add(self, row: Row) -> None:
        if "eval/exact_tv" in row:
            self.first_evaluated = self.first_evaluated or row
            self.last_evaluated = row
        if row["step"] == 0:
            return
        self.steps = row["step"]
        self.objective.add(row)
        self.train_seconds += row.get("time/step_seconds", 0.0)
        if "reward/mean" in row:
            self._last_rewards.append(row["reward/mean"])
            if len(self._first_rewards) < _REWARD_WINDOW_STEPS:
                self._first_rewards.append(row["reward/mean"])
        for name, (total, count) in self._sums.items():
            if name in row:
                self._sums[name] = (total + row[name], count + 1)
        if "time/divergence_seconds" in row and "time/learn_seconds" in row:
            self._part_seconds += row["time/divergence_seconds"]
            self._whole_seconds += row["time/learn_seconds"]

    def mean(self, name: str) -> float | None:
        """One of `_MEANS`, over the steps that have it."""
        total, count = self._sums[name]
        return total / count if count else None

    @property
    def first_reward(self) -> float | None:
        return statistics.fmean(self._first_rewards) if self._first_rewards else None

    @property
    def last_reward(self) -> float | None:
        return statistics.fmean(self._last_rewards) if self._last_rewards else None

    @property
    def shadow_share(self) -> float | None:
        """The part of the learner's time that goes into the divergences that don't train."""
        return self._part_seconds / self._whole_seconds if self._whole_seconds else None


class ObjectiveChanges:
    """The objective of the first row, then each other one with the step where it took over.

    An alpha that drifts along its ramp is no change; one that jumps is, at one of `switches`: the steps at which a schedule
    or a change of the config puts a member into force.
    """

    def __init__(self, switches: Container[int]) -> None:
        self.found: list[tuple[int, str]] = []
        self._switches = switches
        self._before: ObjectiveSpec | None = None

    def add(self, row: Row) -> None:
        if "objective" not in row:
            return
        now, before = ObjectiveSpec(**row["objective"]), self._before
        jumps = row["step"] in self._switches
        if before is None or now.text != (before if jumps else replace(before, alpha=now.alpha)).text:
            self.found.append((row["step"], now.text))
        self._before = now


class EventTally:
    """What `summary.json` says of the pushes, the config and the time."""

    def __init__(self) -> None:
        self.switches: set[int] = set()  # first steps of changed divergences
        self.config_changes = 0
        self.pushes_failed = 0
        self.push_bytes: int | None = None
        self.canary_max_abs_diff: float | None = None
        self.earlier_seconds = 0.0  # of the processes before the last one
        self._pauses_ms = array("d")
        self._span: tuple[float, float] | None = None  # of the process whose events are being read

    def add(self, event: Row) -> None:
        match event["kind"]:
            case "push":
                self._pauses_ms.append(event["pause_ms"])
                self.push_bytes = event["byte_count"]
                difference = abs(event["canary_engine"] - event["canary_learner"])
                self.canary_max_abs_diff = max(self.canary_max_abs_diff or 0.0, difference)
            case "push_failed":
                self.pushes_failed += event.get("times", 1)
            case "config_change":
                self.config_changes += 1
                self.switches |= divergence_steps([event])
        self._time(event)

    def _time(self, event: Row) -> None:
        """A process's events go from `starting` to its last one; what a resume changed is written just before the former."""
        if event["kind"] == "starting":
            self.earlier_seconds += self._span[1] - self._span[0] if self._span else 0.0
            self._span = (event["time"], event["time"])
        elif self._span is not None and event.get("source") != "resume":
            self._span = (self._span[0], event["time"])

    @property
    def pushes(self) -> int:
        return len(self._pauses_ms)

    @property
    def pause_ms_p50(self) -> float | None:
        return statistics.median(self._pauses_ms) if self._pauses_ms else None

    @property
    def pause_ms_max(self) -> float | None:
        return max(self._pauses_ms, default=None)


def divergence_steps(versions: Iterable[Row]) -> set[int]:
    """Where a changed config puts a member into force; `versions` have `changed` and `effective_step`."""
    return {version["effective_step"] for version in versions if any(key.startswith("objective.divergence.") for key in version["changed"])}

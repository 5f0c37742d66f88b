"""`summary.json`: the run in numbers, each of them derived from what the run wrote down."""

import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ftb_llm.config import Config
from ftb_llm.config.schema import Member, Objective
from ftb_llm.machine import core_count
from ftb_llm.run_dir import RunDir
from ftb_llm.types import ObjectiveSpec, objective_text

_REWARD_WINDOW_STEPS = 10  # sampled rewards are noisy: without an oracle, start and end are means over this many steps


def summarise(run_dir: RunDir, config: Config, *, state: str, accounting: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that `summary.json` holds; None where this run has no such number.

    `shadow_share` is the part of the learner's time that goes into the divergences that don't train.
    """
    rows = list(run_dir.metrics())
    events = list(run_dir.events())
    steps = [row for row in rows if row["step"] > 0]
    evaluated = [row for row in rows if "eval/exact_tv" in row]
    first, last = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
    pushes = [event for event in events if event["kind"] == "push"]
    return {
        "run": run_dir.path.name,
        "state": state,
        "task": config.data.path.removeprefix("builtin:"),
        "divergence": trained_with(steps, config.objective, events),
        "cores": core_count(),
        "steps": steps[-1]["step"] if steps else 0,
        "exact_tv_start": first.get("eval/exact_tv"),
        "exact_tv_end": last.get("eval/exact_tv"),
        "reward_start": first.get("eval/reward", _mean(steps[:_REWARD_WINDOW_STEPS], "reward/mean")),
        "reward_end": last.get("eval/reward", _mean(steps[-_REWARD_WINDOW_STEPS:], "reward/mean")),
        "target_reward": last.get("eval/target_reward"),
        "modes_found": last.get("eval/modes_found"),
        "modes_total": last.get("eval/modes_total"),
        "train_seconds": sum(row["time/step_seconds"] for row in steps),
        "mean_staleness_steps": _mean(steps, "off_policy/staleness_mean"),
        "generate_tokens_per_second": _mean(steps, "perf/generate_tokens_per_second"),
        "learn_tokens_per_second": _mean(steps, "perf/learn_tokens_per_second"),
        "shadow_share": _share(steps, "time/divergence_seconds", "time/learn_seconds"),
        "pushes": len(pushes),
        "pushes_failed": sum(event["kind"] == "push_failed" for event in events),
        "push_pause_ms_p50": statistics.median(event["pause_ms"] for event in pushes) if pushes else None,
        "push_pause_ms_max": max((event["pause_ms"] for event in pushes), default=None),
        "push_bytes": pushes[-1]["byte_count"] if pushes else None,
        "canary_max_abs_diff": max((abs(event["canary_engine"] - event["canary_learner"]) for event in pushes), default=None),
        "speed_before_push": None,
        "speed_after_push": None,
        "speed_after_push_ratio": None,
        "speed_after_last_push": None,
        "logprob_max_abs_diff": None,
        "logprob_mean_abs_diff": None,
        "logprob_compared": None,
        "trial_seconds": None,
        "peak_rss_gib": None,
        "total_seconds": None,
        **facts,
        "config_versions": 1 + sum(event["kind"] == "config_change" for event in events),
        "accounting": accounting,
    }


def configured(objective: Objective) -> str:
    """What these settings train with: ramps and the whole schedule in words."""
    divergence = objective.divergence
    later = (f", then {_member(entry, objective)} from step {entry.step}" for entry in divergence.schedule)
    members = "".join((_member(divergence, objective), *later))
    return objective_text(objective.kind, members, tempered=objective.tempered, log_z=objective.log_z)


def _member(member: Member, objective: Objective) -> str:
    return f"{member.text} {objective.custom}" if member.name == "custom" else member.text


def objective_changes(rows: Iterable[dict[str, Any]], switches: Container[int]) -> list[tuple[int, str]]:
    """The objective of the first of these rows of `metrics.jsonl`, then each other one with the step where it took over.

    An alpha that drifts along its ramp is no change; one that jumps is, at one of `switches`: the steps at which a schedule
    or a change of the config puts a member into force.
    """
    changes: list[tuple[int, str]] = []
    before: ObjectiveSpec | None = None
    for row in rows:
        if "objective" not in row:
            continue
        now = ObjectiveSpec(**row["objective"])
        jumps = row["step"] in switches
        if before is None or now.text != (before if jumps else replace(before, alpha=now.alpha)).text:
            changes.append((row["step"], now.text))
        before = now
    return changes


def switch_steps(objective: Mapping[str, Any], versions: Iterable[Mapping[str, Any]]) -> set[int]:
    """Where a schedule or a changed config puts a member into force; `versions` have `changed` and `effective_step`."""
    scheduled = {entry["step"] for entry in objective["divergence"].get("schedule", ())}
    return scheduled | {version["effective_step"] for version in versions if any(key.startswith("objective.divergence.") for key in version["changed"])}


def trained_with(steps: Sequence[dict[str, Any]], objective: Objective, events: Iterable[dict[str, Any]]) -> str:
    """`hellinger`, or `forward_kl, then tv from step 200`; before the first step, what the config says."""
    config_changes = [event for event in events if event["kind"] == "config_change"]
    changes = objective_changes(steps, switch_steps(objective.model_dump(mode="json"), config_changes))
    if not changes:
        return configured(objective)
    (_, first), *others = changes
    return "".join((first, *(f", then {text} from step {step}" for step, text in others)))


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return statistics.fmean(row[name] for row in rows) if rows else None


def _share(rows: Sequence[dict[str, Any]], part: str, whole: str) -> float | None:
    """Of all the time in `whole`, how much was `part`, over the steps that have both."""
    both = [row for row in rows if part in row and whole in row]
    return sum(row[part] for row in both) / sum(row[whole] for row in both) if both else None

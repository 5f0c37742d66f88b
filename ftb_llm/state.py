"""What the run looks like right now: written by the controller's loops, read by the control plane and the progress panel."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ftb_llm.types import PushReport


class Phase(StrEnum):
    """The run's life."""

    STARTING = "starting"
    TRAINING = "training"
    STOPPING = "stopping"
    STOPPED = "stopped"  # ended early, on request
    FINISHED = "finished"
    FAILED = "failed"


class GeneratorPhase(StrEnum):
    """A generator's life. Only a serving one is given work."""

    STARTING = "starting"
    SERVING = "serving"
    OUT = "out"  # the canary failed or a push did; back as soon as one succeeds
    DEAD = "dead"


class Throughput:
    """Tokens per second over the last few seconds."""

    def __init__(self, window_seconds: float = 10.0) -> None:
        self._window_seconds = window_seconds
        self._arrivals: deque[tuple[float, int]] = deque()
        self._since = time.monotonic()
        self.total = 0

    def add(self, tokens: int) -> None:
        self.total += tokens
        self._arrivals.append((time.monotonic(), tokens))

    def per_second(self) -> float:
        now = time.monotonic()
        while self._arrivals and self._arrivals[0][0] < now - self._window_seconds:
            self._arrivals.popleft()
        seconds = min(self._window_seconds, now - self._since)
        return sum(tokens for _, tokens in self._arrivals) / seconds if seconds > 0 else 0.0


@dataclass(slots=True, kw_only=True)
class GeneratorState:
    """One generator as the controller sees it."""

    name: str
    phase: GeneratorPhase = GeneratorPhase.STARTING
    version: int = -1  # of the adapter that its engine holds
    groups_in_flight: int = 0
    throughput: Throughput = field(default_factory=Throughput)
    last_push: PushReport | None = None
    unanswered: "asyncio.Task[PushReport] | None" = None  # a push that was sent and has not been answered
    last_error: str | None = None
    serving: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, phase: GeneratorPhase, problem: str | None = None) -> None:
        """Move on; what is dead stays dead, whatever a call that was still under way reports."""
        if self.phase is GeneratorPhase.DEAD:
            return
        self.phase = phase
        if problem is not None:
            self.last_error = problem
        if phase in (GeneratorPhase.SERVING, GeneratorPhase.DEAD):
            self.serving.set()  # whoever waits for a dead one must wake up and see that it is dead
        else:
            self.serving.clear()

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.phase.value,
            "version": self.version if self.version >= 0 else None,
            "groups_in_flight": self.groups_in_flight,
            "tokens_per_second": self.throughput.per_second(),
            "push_pause_ms": self.last_push.pause_ms if self.last_push else None,
            "last_error": self.last_error,
        }


@dataclass(slots=True, kw_only=True)
class RunState:
    """The run as a whole."""

    name: str
    run_dir: str
    url: str | None = None  # of the control plane
    phase: Phase = Phase.STARTING
    step: int = 0  # the last finished one
    started_step: int = 0  # the last one whose config and groups are settled
    policy_version: int = 0  # the newest published adapter
    generators: list[GeneratorState]
    learn_throughput: Throughput = field(default_factory=Throughput)
    last_row: dict[str, Any] = field(default_factory=dict)
    last_eval: dict[str, Any] = field(default_factory=dict)
    last_values: dict[str, float] = field(default_factory=dict)  # of every metric that any step had
    last_checkpoint: int | None = None  # its step
    last_error: str | None = None
    last_error_step: int | None = None
    last_error_time: float | None = None
    last_progress: float = field(default_factory=time.monotonic)

    def finish_step(self, step: int, row: dict[str, Any]) -> None:
        self.step = step
        self.last_row = row
        self.last_eval |= {name: value for name, value in row.items() if name.startswith("eval/")}
        self.last_values |= {name: float(value) for name, value in row.items() if "/" in name and isinstance(value, int | float)}
        self.last_progress = time.monotonic()

    def fail(self, problem: str) -> None:
        """Something went wrong just now."""
        self.last_error, self.last_error_step, self.last_error_time = problem, self.step, time.time()

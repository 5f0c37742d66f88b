"""What happens in a run, told in `events.jsonl`, as the status's last error, and to the person who watches.

Something that goes wrong again and again is one fact, not thousands: of equal events the first is told, then
every few seconds one that stands for all of them, with "(n times)" and the field `times`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftb_llm.ports import Progress
from ftb_llm.run_log import RunLog
from ftb_llm.state import RunState

REPEAT_SECONDS = 10.0
_ERRORS = ("push_failed", "actor_out", "rejected", "warning")
_UNLIMITED = ("push", "config_change", "checkpoint", "started", "finished")  # each is a fact of its own


@dataclass(slots=True)
class _Held:
    """Equal events since the last one that was told."""

    told: float
    times: int = 0
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Events:
    """The one place where an event is written down."""

    def __init__(
        self,
        *,
        log: RunLog,
        state: RunState,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        self._log = log
        self._state = state
        self._progress = progress
        self._clock = clock
        self._repeat_seconds = repeat_seconds
        self._held: dict[tuple[str, str], _Held] = {}
        self._rejected: dict[str, int] = {}
        log.notice = self.emit

    def emit(self, kind: str, message: str, *, same: str | None = None, **details: Any) -> None:
        """Tell of one event. Those with equal `kind` and `same` (by default the message) count as equal."""
        if kind in _ERRORS:
            self._state.fail(message)
        self._tell_due()
        if kind in _UNLIMITED:
            return self._tell(kind, message, details)
        key = (kind, message if same is None else same)
        held = self._held.get(key)
        if held is None:
            self._held[key] = _Held(told=self._clock())
            return self._tell(kind, message, details)
        held.times, held.message, held.details = held.times + 1, message, details

    def close(self) -> None:
        """Tell of those that were held back, and finish the files; who watches is told what can't be written."""
        for (kind, _), held in list(self._held.items()):
            self._tell_held(kind, held)
        self._held.clear()
        unwritten = self._log.close()
        if unwritten is not None:
            self._progress.line(f"warning: {unwritten}")

    def _tell_due(self) -> None:
        """Equal events whose time has come; what has not come again since is forgotten."""
        now = self._clock()
        for key, held in list(self._held.items()):
            if self._held.get(key) is not held or now - held.told < self._repeat_seconds:
                continue  # the first: a notice of trouble with the files, told in this very loop, came before us
            if held.times == 0:
                del self._held[key]
                continue
            self._held[key] = _Held(told=now)
            self._tell_held(key[0], held)

    def _tell_held(self, kind: str, held: _Held) -> None:
        if held.times == 1:
            self._tell(kind, held.message, held.details)
        elif held.times > 1:
            self._tell(kind, f"{held.message} ({held.times} times)", {**held.details, "times": held.times})

    def _tell(self, kind: str, message: str, details: dict[str, Any]) -> None:
        self._log.append_event(kind, message, step=self._state.step, **details)
        if kind == "push" or (kind == "rejected" and not self._worth_a_line(details["reason"])):
            return
        self._progress.line(f"{kind}: {message}")

    def _worth_a_line(self, reason: str) -> bool:
        """The first, second, fourth, eighth … rejection for a reason."""
        count = self._rejected[reason] = self._rejected.get(reason, 0) + 1
        return count & (count - 1) == 0

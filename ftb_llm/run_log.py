"""What a run writes for its readers: `metrics.jsonl`, `events.jsonl`, `eval/*.json`. None of it may end the run.

A write that the disk refuses waits in memory and is tried again with the next one, and when the run ends. One
notice tells of the trouble's begin and one of its end. The books (`run.db`, `config.json`) and the checkpoints
are not written here: a run that can't keep those must not go on.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftb_llm.line_file import LineFile
from ftb_llm.run_dir import EVENTS, METRICS, write_document

Notice = Callable[[str, str], None]  # called with the kind and the message of an event


class RunLog:
    """The open report files of one run. Used from one event loop."""

    def __init__(self, folder: Path) -> None:
        self.notice: Notice = lambda kind, message: None
        self._folder = folder
        self._metrics = LineFile(folder / METRICS)
        self._events = LineFile(folder / EVENTS)
        self._documents: dict[str, Any] = {}  # by name: those that are not on disk yet
        self._document_problem: OSError | None = None
        self._announced: str | None = None  # the trouble of which a notice told

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        self._metrics.append(row)
        self._settle()

    def append_event(self, kind: str, message: str, *, step: int, **details: Any) -> None:
        told = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in details.items()}
        self._events.append({"time": time.time(), "step": step, "kind": kind, "message": message, **told})
        self._settle()

    def write_document(self, name: str, value: Any) -> None:
        """A whole JSON file; of one that waits, only the newest value."""
        self._documents[name] = value
        self._write_documents()
        self._settle()

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that will be taken or written again. It may read much: call it beside the loop."""
        self._metrics.forget_after(step)

    def status(self) -> dict[str, Any]:
        """For `GET /v1/status`."""
        return {
            "ok": self._problem() is None,
            "waiting": self._metrics.waiting + self._events.waiting + len(self._documents),
            "lost": self._metrics.lost + self._events.lost,
            "problem": self._problem(),
        }

    def close(self) -> str | None:
        """Write what still waits and let go of the files. Returns what could not be written, in words."""
        self._settle()
        self._metrics.close()
        self._events.close()
        waiting = self.status()["waiting"]
        return f"{waiting} lines or files could not be written: {self._problem()}" if waiting else None

    def _settle(self) -> None:
        """Try what waits once more, and tell when trouble has begun or ended."""
        for file in (self._metrics, self._events):
            if file.behind:
                file.flush()
        if self._documents:
            self._write_documents()
        problem, before = self._problem(), self._announced
        self._announced = problem
        if problem is not None and before is None:
            self.notice("warning", f"reports can't be written and wait in memory, the run goes on: {problem}")
        elif problem is None and before is not None:
            lost = self.status()["lost"]
            self.notice("reports_back", f"reports are written again; {lost or 'no'} lines were lost")

    def _write_documents(self) -> None:
        try:
            for name in list(self._documents):
                write_document(self._folder / name, self._documents[name])
                del self._documents[name]
        except OSError as error:
            self._document_problem = error
        else:
            self._document_problem = None

    def _problem(self) -> str | None:
        for name, error in (
            (METRICS, self._metrics.problem),
            (EVENTS, self._events.problem),
            (", ".join(self._documents), self._document_problem),
        ):
            if error is not None:
                return f"{name}: {error.strerror or error}"
        return None

"""What a run wrote down, read for the report. Whatever is not there yet is empty."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftb_llm.errors import SetupError
from ftb_llm.line_file import read_rows
from ftb_llm.run_dir import EVENTS, METRICS, damage_text

Row = dict[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The files of one run."""

    name: str
    config: dict[str, Any]  # as it is now
    versions: list[Row]  # of the config, oldest first, from run.db
    summary: dict[str, Any]
    rows: list[Row]  # metrics.jsonl
    events: list[Row]
    first: dict[str, Any]  # EvalReport before training
    last: dict[str, Any]  # the newest EvalReport

    def points(self, metric: str) -> list[Point]:
        """One metric as (step, value), where it was recorded."""
        return [(row["step"], row[metric]) for row in self.rows if row.get(metric) is not None]

    def events_of(self, *kinds: str) -> list[Row]:
        return [event for event in self.events if event["kind"] in kinds]


def read_run(run_dir: Path) -> RunFiles:
    if not run_dir.is_dir():
        raise SetupError(f"run folder {run_dir} does not exist")
    rows, bad_rows = _rows(run_dir / METRICS, needs="step")
    events, bad_events = _rows(run_dir / EVENTS, needs="kind")
    return RunFiles(
        name=run_dir.resolve().name,
        config=_json(run_dir / "config.json"),
        versions=_versions(run_dir / "run.db"),
        summary=_json(run_dir / "summary.json"),
        rows=rows,
        events=[*events, *(_warning(text, rows, events) for text in (bad_rows, bad_events) if text)],
        first=_json(run_dir / "eval" / "first.json"),
        last=_json(run_dir / "eval" / "last.json"),
    )


def thin(points: Sequence[Point], most: int = 500) -> list[Point]:
    """At most `most` points: means over neighbours, so that a long run's page stays small."""
    stride = -(-len(points) // most) or 1
    chunks = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def _json(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SetupError(f"{path} is not JSON: {error}") from None
    return document


def _versions(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    # Without a log beside it the file has no writer: declared immutable, it can be read from a disk that can't be written.
    alone = not path.with_name(f"{path.name}-wal").exists()
    address = f"{path.resolve().as_uri()}?{'immutable=1' if alone else 'mode=ro'}"
    try:
        with closing(sqlite3.connect(address, uri=True)) as db:
            rows = db.execute("SELECT version, effective_step, source, changed, config FROM config_versions ORDER BY version").fetchall()
    except sqlite3.Error as error:
        raise SetupError(f"{path} can't be read: {error}") from None
    return [
        {"version": version, "effective_step": step, "source": source, "changed": json.loads(changed), "config": json.loads(config)}
        for version, step, source, changed, config in rows
    ]


def _rows(path: Path, *, needs: str) -> tuple[list[Row], str | None]:
    """The rows, and in words which lines are none."""
    damaged: list[int] = []
    rows = list(read_rows(path, needs=needs, damaged=damaged))
    return rows, damage_text(path.name, damaged) if damaged else None


def _warning(message: str, rows: Sequence[Row], events: Sequence[Row]) -> Row:
    """What was skipped stands among the run's own warnings, at its end."""
    step = rows[-1]["step"] if rows else 0
    return {"kind": "warning", "step": step, "time": events[-1]["time"] if events else 0.0, "message": message}

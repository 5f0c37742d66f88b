"""Many trials: which ones, and their rows, kept as they come so that an interrupted bench goes on where it stopped."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftb_llm.bench.spec import TrialResult, TrialSpec
from ftb_llm.errors import ConfigError, InvalidConfig, SetupError
from ftb_llm.run_dir import append_line, read_lines, write_whole

Row = dict[str, Any]
Run = Callable[[Sequence[TrialSpec]], Iterator[TrialResult]]
ROWS = "rows.jsonl"


def grid(
    *, tasks: Sequence[str], objectives: Sequence[str], lags: Sequence[int], seeds: Sequence[int], settings: Callable[[str], Sequence[str]]
) -> list[TrialSpec]:
    """Every combination; `settings` gives the KEY=VALUE words of an objective. All of them are checked here."""
    specs = [
        TrialSpec(task=task, objective=objective, lag=lag, seed=seed, settings=tuple(settings(objective)))
        for task in tasks
        for objective in objectives
        for lag in lags
        for seed in seeds
    ]
    for spec in specs:
        if spec.config().objective.truncated == "reject":
            message = "reject is for runs, whose generators give another group instead; in trials it should be keep or mask"
            raise InvalidConfig([ConfigError("objective.truncated", message)])
    return specs


def measure(specs: Sequence[TrialSpec], *, folder: Path, run: Run, say: Callable[[str], None]) -> list[Row]:
    """One row per spec, in their order. Rows that the folder has are not measured again."""
    done = {row["key"]: row for row in kept_rows(folder)}
    wanted = {spec.key(): spec for spec in specs}
    left = sorted((spec for key, spec in wanted.items() if key not in done), key=lambda spec: spec.seed)
    say(f"{len(left)} trials to run, {len(wanted) - len(left)} found in {folder / ROWS}")
    began = time.monotonic()
    for count, result in enumerate(run(left), start=1):
        row = result.row()
        append_line(folder / ROWS, row)
        done[row["key"]] = row
        say(f"{count}/{len(left)} {told(row)}; {remaining(time.monotonic() - began, count, len(left))}")
    return [done[key] for key in wanted]


def kept_rows(folder: Path) -> list[Row]:
    """The rows of an earlier bench; a line that was torn when it was interrupted is removed, so that the next one begins on its own."""
    path = folder / ROWS
    with writing(folder):
        rows = list(read_lines(path))
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make the folder, and put one line in the place of what goes wrong with its files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SetupError(f"--out: {folder} can't be written: {error.strerror}") from None


def told(row: Row) -> str:
    """A row in one line."""
    line = f"{row['task']} {row['name']} lag {row['lag']} seed {row['seed']}: exact TV {row['exact_tv']:.4f}, {row['seconds']:.0f} s"
    return line if row["error"] is None else f"{line}, broke off: {row['error']}"


def remaining(seconds: float, done: int, total: int) -> str:
    """How much longer, at the pace so far."""
    minutes = seconds / done * (total - done) / 60
    return "done" if done == total else f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that agree in these columns, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def names_of(rows: Sequence[Row], objectives: Sequence[str]) -> list[str]:
    """The objectives of these rows in the order in which they were asked for; those that weren't stand behind them, as they come."""
    there = dict.fromkeys(row["name"] for row in rows)
    return list(dict.fromkeys([*(name for name in objectives if name in there), *there]))


def lags_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["lag"] for row in rows})

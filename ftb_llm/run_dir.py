"""The run's folder: what is written where, whole lines and whole files only."""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ftb_llm.errors import SetupError
from ftb_llm.line_file import LineFile, read_rows

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_CHECKPOINT = re.compile(r"step_(\d{6,})")


class RunDir:
    """`runs/<name>/`. JSON lines are appended and flushed; JSON files are replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise what `create` would, and make nothing but the folder above: a start that fails must not block the name for the next one."""
        if path.exists():
            raise _taken(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_created(path, error) from None

    @classmethod
    def create(cls, path: Path) -> "RunDir":
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise _taken(path) from None
        except OSError as error:
            raise _not_created(path, error) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        if not (path / "config.json").is_file():
            raise SetupError(f"--resume: {path} is not a run folder; it has no config.json")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Keep every other process out. The lock ends with this process, however it ends."""
        path = self.path / ".lock"
        try:
            file = path.open("a")
        except OSError as error:
            raise SetupError(f"run.dir: {path} can't be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SetupError(f"run.name: {self.path} is in use by another process; wait until that run has ended, or choose another name") from None
            except OSError as error:
                raise SetupError(f"run.dir: {path} can't be locked: {error.strerror}; choose a folder on a disk that knows locks") from None
            yield self

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        append_line(self.path / METRICS, row)

    def append_event(self, kind: str, message: str, *, step: int, **details: Any) -> dict[str, Any]:
        row = {"time": time.time(), "step": step, "kind": kind, "message": message, **details}
        append_line(self.path / EVENTS, row)
        return row

    def metrics(self, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
        """Rows one by one; the numbers of lines that are none go to `damaged`."""
        return read_rows(self.path / METRICS, needs="step", damaged=damaged)

    def events(self, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
        """As `metrics`."""
        return read_rows(self.path / EVENTS, needs="kind", damaged=damaged)

    def damage(self) -> list[str]:
        """Files with lines that can't be read, in words. It reads both files whole: call it beside the loop."""
        found: list[str] = []
        for name, read in ((METRICS, self.metrics), (EVENTS, self.events)):
            damaged: list[int] = []
            for _ in read(damaged):
                pass
            if damaged:
                found.append(damage_text(name, damaged))
        return found

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will take again, so that each step stands once."""
        if not (self.path / METRICS).exists():
            return
        file = LineFile(self.path / METRICS)
        file.forget_after(step)
        file.close()
        if file.problem is not None:
            raise SetupError(f"--resume: {file.path} can't be written: {file.problem.strerror}")

    def write_json(self, name: str, value: Any) -> Path:
        return write_document(self.path / name, value)

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def newest_checkpoint(self) -> Path | None:
        """The one of the highest step. Folders that only begin like one, such as a copy `step_000080.bak`, don't count."""
        found = [path for path in (self.path / "checkpoints").glob("step_*") if _CHECKPOINT.fullmatch(path.name)]
        return max(found, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def damage_text(name: str, numbers: Sequence[int]) -> str:
    """`events.jsonl: line 17 can't be read and is skipped`."""
    lines = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    if len(numbers) == 1:
        return f"{name}: line {lines} can't be read and is skipped"
    return f"{name}: {len(numbers)} lines can't be read and are skipped: {lines}"


def _taken(path: Path) -> SetupError:
    return SetupError(f"run.name: {path} exists already; choose another name, or go on with it by --resume {path}")


def _not_created(path: Path, error: OSError) -> SetupError:
    return SetupError(f"run.dir: {path} can't be created: {error.strerror}")


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; a torn last line (the machine died while writing) is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_document(target: Path, value: Any) -> Path:
    """A whole JSON file."""
    target.parent.mkdir(exist_ok=True)
    write_whole(target, json.dumps(value, indent=2) + "\n")
    return target


def write_whole(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it; a write that fails leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

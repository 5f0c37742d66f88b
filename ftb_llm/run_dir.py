"""The run's folder: what is written where, whole lines and whole files only."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ftb_llm.errors import SetupError


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
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)  # prompts, completions and settings are nobody else's
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
        append_line(self.path / "metrics.jsonl", row)

    def append_event(self, kind: str, message: str, *, step: int, **details: Any) -> dict[str, Any]:
        row = {"time": time.time(), "step": step, "kind": kind, "message": message, **details}
        append_line(self.path / "events.jsonl", row)
        return row

    def metrics(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.path / "metrics.jsonl")

    def events(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.path / "events.jsonl")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will take again, so that each step stands once."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        write_whole(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def write_json(self, name: str, value: Any) -> Path:
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        write_whole(target, json.dumps(value, indent=2) + "\n")
        return target

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def newest_checkpoint(self) -> Path | None:
        found = sorted((self.path / "checkpoints").glob("step_[0-9]*"))
        return found[-1] if found else None


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(checkpoint.name.removeprefix("step_"))


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


def write_whole(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

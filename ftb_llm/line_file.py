"""Files of JSON lines: one that is kept open and written as well as the disk allows, and readers.

    append -> waiting lines -> the file      a line leaves the waiting ones only when all of it is in the file

A write that fails leaves the lines in memory, and the next one begins with them. What half a write left in
the file is cut off before the next line. Memory is bounded: of too many waiting lines the oldest is given up,
and counted.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

MOST_WAITING = 10_000
_BLOCK_BYTES = 1 << 20


class _Numbered(msgspec.Struct):
    """Of a row, only its step is of interest."""

    step: int


class LineFile:
    """One file of JSON lines, open as long as it is written to. It raises no error of the disk: see `problem`."""

    def __init__(self, path: Path, *, most_waiting: int = MOST_WAITING) -> None:
        self.path = path
        self.lost = 0  # lines that were given up
        self.problem: OSError | None = None  # of the last write, while it stands
        self._most_waiting = most_waiting
        self._waiting: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._cut_at: int | None = None  # from this byte on, the file holds nothing that should stay
        self._lock = threading.Lock()  # forgetting may run beside the event loop

    @property
    def waiting(self) -> int:
        """Lines that are in memory only."""
        return len(self._waiting)

    @property
    def behind(self) -> bool:
        """Whether the file is not yet what it should be."""
        return bool(self._waiting) or self._cut_at is not None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, or keep it until that works. Raises `ValueError` for a number that JSON can't hold."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self._lock:
            if len(self._waiting) >= self._most_waiting:
                self._waiting.popleft()
                self.lost += 1
            self._waiting.append(line)
            self._write()

    def flush(self) -> None:
        """Try once more to write what waits."""
        with self._lock:
            self._write()

    def forget_after(self, step: int) -> None:
        """Drop the rows of later steps. They stand at the end, so only that end is read and cut off."""
        with self._lock:
            self._waiting = deque(line for line in self._waiting if _step_of(line, default=step) <= step)
            try:
                self._cut_at = _end_of_step(self._opened(), step)
            except OSError as error:
                self.problem = error
                return
            self._write()

    def close(self) -> None:
        """Write what waits, if it can be, and let go of the file. A later append opens it again."""
        with self._lock:
            if self.behind:
                self._write()
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)

    def _write(self) -> None:
        try:
            descriptor = self._opened()
            if self._cut_at is not None:
                os.ftruncate(descriptor, self._cut_at)
                self._cut_at = None
            while self._waiting:
                self._write_line(descriptor, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            self.problem = error
        else:
            self.problem = None

    def _write_line(self, descriptor: int, line: bytes) -> None:
        end, written = os.fstat(descriptor).st_size, 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError:
            if written:
                self._cut_at = end
            raise

    def _opened(self) -> int:
        """The open file, which ends with a whole line or will be cut to one. One that was moved away or replaced is begun anew."""
        if self._descriptor is not None and not _is_at(self._descriptor, self.path):
            os.close(self._descriptor)
            self._descriptor = self._cut_at = None
        if self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._descriptor = descriptor
            size = os.fstat(descriptor).st_size
            whole = next((end for _, end in _lines_backwards(descriptor)), 0)
            if whole < size and self._cut_at is None:
                self._cut_at = whole
        return self._descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still stands under its name."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def read_rows(path: Path, *, needs: str, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Every whole line that is a JSON object with the key `needs`. The numbers of others go to `damaged`.

    A torn last line is left out without a word: the machine died while it was written, or it is being written.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            row = _row(line)
            if row is not None and needs in row:
                yield row
            elif damaged is not None:
                damaged.append(number)


def damaged_lines(path: Path, *, needs: str) -> list[int]:
    """The numbers of the lines that `read_rows` would skip; many times faster than reading them."""
    decoder = msgspec.json.Decoder(msgspec.defstruct("Row", [(needs, Any)]))
    damaged: list[int] = []
    with suppress(FileNotFoundError), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                if line.endswith(b"\n"):
                    damaged.append(number)
    return damaged


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: bytes, *, default: int) -> int:
    try:
        return msgspec.json.decode(line, type=_Numbered).step
    except (msgspec.DecodeError, UnicodeDecodeError):
        return default


def _end_of_step(descriptor: int, step: int) -> int:
    """The byte after the last row of a step up to `step`."""
    for line, end in _lines_backwards(descriptor):
        if _step_of(line, default=step + 1) <= step:
            return end
    return 0


def _lines_backwards(descriptor: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines, the last one first, each with the byte after it."""
    begin, held = os.fstat(descriptor).st_size, b""
    end: int | None = None  # of the line whose begin is looked for; None in the torn part behind the last line
    while begin > 0:
        size = min(_BLOCK_BYTES, begin)
        begin -= size
        held = os.pread(descriptor, size, begin) + held
        while (at := held.rfind(b"\n", 0, len(held) if end is None else len(held) - 1)) >= 0:
            if end is not None:
                yield held[at + 1 :], end
            held, end = held[: at + 1], begin + at + 1
    if end is not None:
        yield held, end

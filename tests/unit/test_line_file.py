import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftb_llm import line_file
from ftb_llm.line_file import LineFile, damaged_lines, read_rows


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [row["step"] for row in rows(path)]


class Disk:
    """Stands between a file and the disk: takes `room` bytes, then fails with `number`."""

    def __init__(self, number: int = errno.ENOSPC) -> None:
        self.number = number
        self.room: int | None = None
        self._write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        if self.room is None:
            return self._write(descriptor, data)
        if self.room == 0:
            raise OSError(self.number, os.strerror(self.number))
        taken = self._write(descriptor, data[: self.room])
        self.room -= taken
        return taken


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(line_file.os, "write", disk.write)
    return disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_lines_that_can_not_be_written_wait_and_follow_in_their_order(tmp_path: Path, disk: Disk, number: int) -> None:
    file, disk.number = LineFile(tmp_path / "a.jsonl"), number
    file.append({"step": 0})
    disk.room = 0
    for step in (1, 2, 3):
        file.append({"step": step})
    assert file.problem is not None and file.problem.errno == number
    assert (file.waiting, file.behind, steps(file.path)) == (3, True, [0])
    disk.room = None
    file.append({"step": 4})
    assert (file.waiting, file.behind, file.problem, file.lost) == (0, False, None, 0)
    file.close()
    assert steps(file.path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("room", range(1, 24))
def test_half_a_line_is_cut_off_before_the_next(tmp_path: Path, disk: Disk, room: int) -> None:
    file = LineFile(tmp_path / "a.jsonl")
    file.append({"step": 0})
    disk.room = room
    file.append({"step": 1})
    file.append({"step": 2})
    disk.room = None
    file.flush()
    file.close()
    assert steps(file.path) == [0, 1, 2]


def test_a_file_that_can_not_be_opened_is_tried_again(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "later" / "a.jsonl")
    file.append({"step": 0})
    assert isinstance(file.problem, FileNotFoundError)
    file.path.parent.mkdir()
    file.append({"step": 1})
    file.close()
    assert steps(file.path) == [0, 1]


def test_memory_is_bounded_and_what_is_lost_is_counted(tmp_path: Path, disk: Disk) -> None:
    file, disk.room = LineFile(tmp_path / "a.jsonl", most_waiting=3), 0
    for step in range(10):
        file.append({"step": step})
    assert (file.waiting, file.lost) == (3, 7)
    disk.room = None
    file.flush()
    file.close()
    assert steps(file.path) == [7, 8, 9]


def test_the_file_stays_open_between_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = LineFile(tmp_path / "a.jsonl")
    file.append({"step": 0})
    monkeypatch.setattr(line_file.os, "open", lambda *_: pytest.fail("it was opened again"))
    file.append({"step": 1})
    file.close()
    assert steps(file.path) == [0, 1]


def test_a_closed_file_opens_again(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "a.jsonl")
    for step in (0, 1):
        file.append({"step": step})
        file.close()
    assert steps(file.path) == [0, 1]


@pytest.mark.parametrize("tail", ['{"step": 2, "mes', "x" * 3_000_000])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n' + tail)
    file = LineFile(path)
    file.append({"step": 2})
    file.close()
    assert steps(path) == [0, 1, 2]


def test_a_file_of_one_torn_line_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"st')
    file = LineFile(path)
    file.append({"step": 0})
    file.close()
    assert steps(path) == [0]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2]), (9, [0, 1, 2, 3, 4])])
def test_rows_of_later_steps_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, kept: list[int], block: int) -> None:
    monkeypatch.setattr(line_file, "_BLOCK_BYTES", block)
    file = LineFile(tmp_path / "a.jsonl")
    for number in range(5):
        file.append({"step": number, "text": "x" * number})
    file.forget_after(step)
    file.append({"step": 77})
    file.close()
    assert steps(file.path) == [*kept, 77]


def test_rows_that_still_wait_are_forgotten_too(tmp_path: Path, disk: Disk) -> None:
    file = LineFile(tmp_path / "a.jsonl")
    file.append({"step": 0})
    disk.room = 0
    file.append({"step": 1})
    file.append({"step": 2})
    file.forget_after(1)
    disk.room = None
    file.append({"step": 2, "whole": True})
    file.close()
    assert rows(file.path) == [{"step": 0}, {"step": 1}, {"step": 2, "whole": True}]


def test_damaged_rows_among_the_forgotten_go_with_them_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\nnot a row\n{"step": 1}\n{"st\n{"step": 2}\n\xff\n', encoding="latin-1")
    file = LineFile(path)
    file.forget_after(1)
    file.close()
    assert path.read_text() == '{"step": 0}\nnot a row\n{"step": 1}\n'


def test_only_the_end_is_read_to_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file, "_BLOCK_BYTES", 1000)
    read, pread = [], os.pread
    monkeypatch.setattr(line_file.os, "pread", lambda descriptor, size, at: read.append(size) or pread(descriptor, size, at))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"step": step, "text": "x" * 100}) + "\n" for step in range(1000)))
    file = LineFile(path)
    file.forget_after(990)
    file.close()
    assert steps(path) == list(range(991))
    assert sum(read) <= 5000 < path.stat().st_size / 20


def test_numbers_that_are_not_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        LineFile(tmp_path / "a.jsonl").append({"step": float("nan")})


def test_a_reader_skips_and_numbers_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\n[1]\n{"other": 1}\n\xff\xfe\n{"step": 1}\n{"step": 2, "to')
    damaged: list[int] = []
    assert list(read_rows(path, needs="step", damaged=damaged)) == [{"step": 0}, {"step": 1}]
    assert damaged == damaged_lines(path, needs="step") == [2, 3, 4, 5]
    assert damaged_lines(tmp_path / "gone.jsonl", needs="step") == []
    assert list(read_rows(tmp_path / "gone.jsonl", needs="step")) == []


def test_a_file_that_was_moved_away_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = LineFile(path)
    file.append({"step": 1})
    path.rename(tmp_path / "old.jsonl")
    file.append({"step": 2})
    file.close()
    assert [row["step"] for row in read_rows(path, needs="step")] == [2]
    assert [row["step"] for row in read_rows(tmp_path / "old.jsonl", needs="step")] == [1]

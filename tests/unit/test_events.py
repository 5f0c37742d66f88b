import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.events import Events
from ftb_llm.run_dir import RunDir
from ftb_llm.run_log import RunLog
from tests.fakes import FakeProgress, make_state


class Bench:
    """Events of a run at step 11, at a time that the test moves."""

    def __init__(self, path: Path) -> None:
        self.now = 100.0
        self.run_dir = RunDir.create(path / "run")
        self.state, self.progress = make_state(), FakeProgress()
        self.events = Events(log=RunLog(self.run_dir.path), state=self.state, progress=self.progress, clock=lambda: self.now, repeat_seconds=10)

    def written(self) -> list[dict[str, Any]]:
        return list(self.run_dir.events())

    def messages(self) -> list[str]:
        return [event["message"] for event in self.written()]


def test_an_event_is_written_shown_and_kept_as_the_last_error(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.events.emit("warning", "slow disk", path="a")
    (event,) = bench.written()
    assert (event["kind"], event["message"], event["step"], event["path"]) == ("warning", "slow disk", 11, "a")
    assert bench.progress.lines == ["warning: slow disk"]
    assert (bench.state.last_error, bench.state.last_error_step) == ("slow disk", 11)
    assert bench.state.last_error_time is not None and abs(bench.state.last_error_time - event["time"]) < 5


def test_equal_events_are_one_line_with_their_number_every_few_seconds(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for _ in range(3000):
        bench.now += 0.01
        bench.events.emit("push_failed", "generator-0: no", generator="generator-0")
    bench.events.close()
    lines = bench.written()
    assert len(lines) == 4 and lines[0]["message"] == "generator-0: no" and "times" not in lines[0]
    assert [line["message"] for line in lines[1:]] == [f"generator-0: no ({line['times']} times)" for line in lines[1:]]
    assert 1 + sum(line["times"] for line in lines[1:]) == 3000
    assert len(bench.progress.lines) == 4
    assert all(line["generator"] == "generator-0" for line in lines)


def test_what_comes_once_more_is_told_as_it_is_when_the_run_ends(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.events.emit("warning", "a")
    bench.events.emit("warning", "a")
    assert bench.messages() == ["a"]
    bench.events.close()
    assert bench.messages() == ["a", "a"]


def test_events_that_differ_are_all_told_and_same_makes_them_equal(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for version in range(3):
        bench.events.emit("push_failed", f"push of version {version} failed: no", same="no")
        bench.events.emit("push_failed", f"push of version {version} failed")
        bench.events.emit("push", "same words", version=version)
    bench.events.close()
    assert bench.messages() == [
        "push of version 0 failed: no",
        "push of version 0 failed",
        "same words",
        "push of version 1 failed",
        "same words",
        "push of version 2 failed",
        "same words",
        "push of version 2 failed: no (2 times)",
    ]


def test_what_does_not_come_back_is_told_by_the_next_event_and_forgotten(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for _ in range(3):
        bench.events.emit("warning", "a")
    bench.now += 11
    bench.events.emit("checkpoint", "saved")
    assert bench.messages() == ["a", "a (2 times)", "saved"]
    bench.now += 11
    bench.events.emit("warning", "a")
    assert bench.messages() == ["a", "a (2 times)", "saved", "a"]


def test_rejections_are_all_written_and_shown_ever_more_rarely(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for number in range(9):
        bench.events.emit("rejected", f"group {number} rejected", reason="raised")
    assert len(bench.written()) == 9
    assert bench.progress.lines == [f"rejected: group {number} rejected" for number in (0, 1, 3, 7)]


def test_trouble_with_the_files_while_held_events_are_told_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    for message in ("again", "again", "once"):
        bench.events.emit("warning", message)
    bench.now += 11

    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        bench.events.emit("actor_out", "another")
    bench.events.close()
    assert sorted(message for message in bench.messages() if "report" not in message and "jsonl" not in message) == ["again", "again", "another", "once"]


def test_a_number_that_json_can_not_hold_is_null(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.events.emit("push_failed", "canary", canary_engine=math.nan, canary_learner=-2.0)
    (event,) = bench.written()
    assert (event["canary_engine"], event["canary_learner"]) == (None, -2.0)

import errno
import json
import os
from pathlib import Path

import pytest

from ftb_llm import line_file, run_dir
from ftb_llm.run_log import RunLog


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path)


def notices(log: RunLog) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []

    def notice(kind: str, message: str) -> None:
        told.append((kind, message))
        log.append_event(kind, message, step=0)

    log.notice = notice
    return told


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_notice_when_trouble_begins_and_one_when_it_ends(tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    told = notices(log)
    log.append_metrics({"step": 0})
    with monkeypatch.context() as patch:
        patch.setattr(line_file.os, "write", full)
        for step in (1, 2, 3):
            log.append_metrics({"step": step})
            log.append_event("checkpoint", "saved", step=step)
        assert [kind for kind, _ in told] == ["warning"]
        assert told[0][1] == "reports can't be written and wait in memory, the run goes on: metrics.jsonl: No space left on device"
        assert log.status() == {"ok": False, "waiting": 7, "lost": 0, "problem": "metrics.jsonl: No space left on device"}
    log.append_event("checkpoint", "saved", step=4)
    assert told[1:] == [("reports_back", "reports are written again; no lines were lost")]
    assert log.status() == {"ok": True, "waiting": 0, "lost": 0, "problem": None}
    assert log.close() is None
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["warning", *["checkpoint"] * 4, "reports_back"]


def test_a_document_waits_and_only_its_newest_value_counts(tmp_path: Path, log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    told = notices(log)
    log.write_document("eval/last.json", {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(run_dir.os, "fsync", full)
        log.write_document("eval/last.json", {"step": 2})
        log.write_document("eval/last.json", {"step": 3})
        assert log.status()["waiting"] == 1 and "eval/last.json: No space left" in str(log.status()["problem"])
        assert json.loads((tmp_path / "eval/last.json").read_text()) == {"step": 1}
        assert os.listdir(tmp_path / "eval") == ["last.json"], "half a file was left"
    log.append_metrics({"step": 4})
    assert json.loads((tmp_path / "eval/last.json").read_text()) == {"step": 3}
    assert [kind for kind, _ in told] == ["warning", "reports_back"]


def test_what_can_not_be_written_to_the_end_is_said(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file.os, "write", full)
    log.append_metrics({"step": 0})
    assert log.close() == "1 lines or files could not be written: metrics.jsonl: No space left on device"

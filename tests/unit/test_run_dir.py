import errno
import json
import os
import subprocess
import sys

import pytest

from ftb_llm.errors import SetupError
from ftb_llm.run_dir import RunDir, write_whole


def test_a_run_folder_is_never_overwritten(tmp_path):
    RunDir.create(tmp_path / "a")
    with pytest.raises(SetupError, match=r"run.name.*exists already.*--resume"):
        RunDir.create(tmp_path / "a")


def test_a_name_is_checked_without_taking_it(tmp_path):
    RunDir.check_free(tmp_path / "runs" / "a")
    assert not (tmp_path / "runs" / "a").exists()
    RunDir.create(tmp_path / "runs" / "a")
    with pytest.raises(SetupError, match=r"run.name.*exists already"):
        RunDir.check_free(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"run.dir: .*can't be created"):
        RunDir.check_free(tmp_path / "file" / "a")


def test_a_run_folder_has_one_user_at_a_time(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    code = f"from pathlib import Path; from ftb_llm.run_dir import RunDir\nwith RunDir(Path({str(tmp_path / 'a')!r})).locked(): print('in')"
    with run_dir.locked() as own:
        assert own is run_dir
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert other.returncode != 0
        assert f"SetupError: run.name: {tmp_path / 'a'} is in use by another process" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "in\n"


def test_what_goes_wrong_under_the_lock_is_not_blamed_on_it(tmp_path):
    with pytest.raises(BlockingIOError), RunDir.create(tmp_path / "a").locked():
        raise BlockingIOError


def test_only_a_run_folder_can_be_opened(tmp_path):
    with pytest.raises(SetupError, match=r"no config.json"):
        RunDir.open(tmp_path)


def test_lines_come_back_and_a_torn_last_one_is_left_out(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    run_dir.append_metrics({"step": 1, "reward/mean": 0.5})
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert list(run_dir.metrics()) == [{"step": 1, "reward/mean": 0.5}]


def test_metrics_refuse_numbers_that_are_not_json(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_dir.append_metrics({"step": 1, "reward/mean": float("nan")})


def test_rows_after_a_checkpoint_are_forgotten(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    for step in range(5):
        run_dir.append_metrics({"step": step})
    run_dir.forget_metrics_after(2)
    assert [row["step"] for row in run_dir.metrics()] == [0, 1, 2]


def test_events_carry_step_kind_and_details(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    run_dir.append_event("push", "pushed", step=3, version=3)
    (event,) = run_dir.events()
    assert event["kind"] == "push" and event["step"] == 3 and event["version"] == 3 and event["time"] > 0


def test_json_files_are_replaced_whole(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    run_dir.write_json("eval/last.json", {"a": 1})
    run_dir.write_json("eval/last.json", {"a": 2})
    assert json.loads((tmp_path / "a/eval/last.json").read_text()) == {"a": 2}
    assert [path.name for path in (tmp_path / "a/eval").iterdir()] == ["last.json"]


def test_the_newest_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    assert run_dir.newest_checkpoint() is None
    for step in (100, 900, 200):
        (tmp_path / "a/checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert run_dir.newest_checkpoint().name == "step_000900"


def test_folders_that_only_begin_like_a_checkpoint_are_none(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    for name in ("step_000080", "step_000080.bak", "step_000900~", "step_99", "step_", ".tmp-step_001000-x"):
        (tmp_path / "a/checkpoints" / name).mkdir(parents=True)
    assert run_dir.newest_checkpoint().name == "step_000080"
    (tmp_path / "a/checkpoints/step_1000000").mkdir()
    assert run_dir.newest_checkpoint().name == "step_1000000"


def test_damage_is_told_in_words(tmp_path):
    run_dir = RunDir.create(tmp_path / "a")
    assert run_dir.damage() == []
    (tmp_path / "a/metrics.jsonl").write_text('{"step": 0}\n' + "x\n" * 7 + '{"torn')
    (tmp_path / "a/events.jsonl").write_text('{"kind": "push"}\n{"step": 1}\n')
    assert run_dir.damage() == [
        "metrics.jsonl: 7 lines can't be read and are skipped: 2, 3, 4, 5, 6, ...",
        "events.jsonl: line 2 can't be read and is skipped",
    ]
    assert [row["step"] for row in run_dir.metrics()] == [0]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    run_dir = RunDir.create(tmp_path / "a")
    run_dir.write_json("config.json", 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftb_llm.run_dir.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_dir.write_json("config.json", 2)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.json"]
    assert run_dir.read_json("config.json") == 1


def test_a_full_disk_names_the_file_that_it_refuses(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/summary\.json'$"):
        write_whole(tmp_path / "summary.json", "{}")
    assert list(tmp_path.iterdir()) == []

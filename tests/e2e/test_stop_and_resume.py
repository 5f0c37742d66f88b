"""Ctrl-C in the middle, then on from there: real vLLM, real Ray."""

import os
import subprocess
import sys

import psutil
import pytest

from tests.e2e.conftest import QUICKSTART, START_SECONDS, free_port

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def stopped(launch):
    run = launch(str(QUICKSTART), "run.max_steps=2000")
    run.wait_until(lambda status: status["step"] >= 12, START_SECONDS)
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.interrupt()
    code = run.exit_code(90)
    return run, code, family


def test_ctrl_c_stops_cleanly_with_a_checkpoint(stopped):
    run, code, _ = stopped
    assert code == 130, run.output()
    assert "Traceback" not in run.output()
    summary = run.summary()
    assert summary["state"] == "stopped"
    assert (run.path / "checkpoints" / f"step_{summary['steps']:06d}").is_dir()
    assert (run.path / "report.html").is_file()
    assert summary["accounting"]["leased"] == 0


def test_ctrl_c_leaves_no_process_behind(stopped):
    _, _, family = stopped
    assert len(family) > 3
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_a_resumed_run_goes_on_from_the_checkpoint(stopped):
    run, _, _ = stopped
    last = run.summary()["steps"]
    trained = run.summary()["accounting"]["trained"]
    command = [sys.executable, "-m", "ftb_llm.cli.main", "train", "--resume", str(run.path), f"run.max_steps={last + 8}", f"control.port={free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(last + 9))
    assert run.summary()["accounting"]["trained"] == trained + 8 * 8
    assert run.summary()["state"] == "finished"
    assert rows[last + 1]["off_policy/staleness_max"] >= 1, "groups left in the buffer were trained on first"

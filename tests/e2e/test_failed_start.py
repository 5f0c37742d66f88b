"""Starts that fail, and starts that are broken off: real vLLM, real Ray."""

import tempfile
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import QUICKSTART, START_SECONDS

pytestmark = pytest.mark.timeout(600)


def test_an_engine_that_does_not_start_says_vllms_own_reason_and_leaves_no_folder(launch):
    run = launch(str(QUICKSTART), "actors.kv_cache_gib=0.000001")
    assert run.exit_code(START_SECONDS) == 1
    [line] = [line for line in run.output().splitlines() if line.startswith("ftb-llm: error:")]
    assert "generator-0 did not start: the engine did not start: ValueError:" in line
    assert "memory" in line
    assert "root cause above" not in run.output()
    assert "Traceback" not in run.output()
    assert not run.path.exists()


def test_a_learner_that_does_not_load_says_why(launch):
    run = launch(str(QUICKSTART), "model.lora.targets=[no_such_layer]")
    assert run.exit_code(START_SECONDS) in (1, 2)
    assert "no_such_layer" in run.output()
    assert "Traceback" not in run.output()
    assert not run.path.exists()


def test_an_actor_whose_import_fails_says_which(launch, tmp_path):
    """The driver imports `sitecustomize` like every Python, but only Ray's workers are kept from peft, which the learner needs."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nif any('default_worker.py' in word for word in sys.orig_argv):\n    sys.modules['peft'] = None\n")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    run = launch(str(QUICKSTART), PYTHONPATH=path)
    assert run.exit_code(START_SECONDS) == 1
    [line] = [line for line in run.output().splitlines() if line.startswith("ftb-llm: error:")]
    assert "peft" in line
    assert "actor_id" not in line
    assert not run.path.exists()


def test_ctrl_c_during_the_start_leaves_nothing(launch):
    before = set(Path(tempfile.gettempdir()).glob("ftb-*")) | set(Path("/dev/shm").glob("ftb-llm-*"))
    run = launch(str(QUICKSTART))
    run.wait_until(lambda status: status["state"] == "starting", START_SECONDS)
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.interrupt()
    assert run.exit_code(60) == 130, run.output()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert not run.path.exists()
    assert set(Path(tempfile.gettempdir()).glob("ftb-*")) | set(Path("/dev/shm").glob("ftb-llm-*")) <= before

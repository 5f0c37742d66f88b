"""`RAY_ADDRESS=… ftb-llm train`: the whole job on a running cluster with token authentication."""

import json
import os
import subprocess
import sys

import pytest

from tests.e2e.conftest import QUICKSTART, free_port
from tests.ray_head import TOKEN, clean_env, ray_head

pytestmark = pytest.mark.timeout(600)


def test_the_quickstart_runs_as_a_job_of_a_cluster(tmp_path):
    words = [str(QUICKSTART), "run.max_steps=6", f"run.dir={tmp_path}", "run.name=run", f"control.port={free_port()}", "logging.every_steps=1"]
    environment = {name: os.environ[name] for name in ("FTB_LLM_CACHE", "XDG_CACHE_HOME") if name in os.environ}
    with ray_head(cpus=2) as head:
        done = subprocess.run(
            [sys.executable, "-m", "ftb_llm.cli.main", "train", *words],
            capture_output=True,
            text=True,
            timeout=400,
            env=clean_env(RAY_ADDRESS=head.dashboard, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) | environment,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "step 6/6" in done.stdout, "the job's log is followed"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 6
    assert summary["peak_rss_gib"] > 1, "the actors' memory counts, although they are no children of the job"

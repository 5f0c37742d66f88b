"""What is sent to a cluster. The sending itself is in tests/ray."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from ftb_llm.cluster import rooted, use_token_lying_ready, write_job
from ftb_llm.config import load_config


def test_paths_that_exist_here_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("{}\n")
    tree = rooted(load_config((), ["data.path=prompts.jsonl", "model.path=org/model", "run.dir=runs"]))
    assert tree["data"]["path"] == str(tmp_path / "prompts.jsonl")
    assert tree["model"]["path"] == "org/model"  # not a file here: a Hub name
    assert tree["run"]["dir"] == str(tmp_path / "runs")


def test_the_config_is_written_as_yaml_that_loads_again(tmp_path: Path) -> None:
    config = load_config((), ["learner.learning_rate=1e-5", f"run.dir={tmp_path}"])
    command = write_job(tmp_path, config, ["train", "config.yaml", "--resume", "a run"])
    assert command == "exec sh job.sh train config.yaml --resume 'a run'"
    assert load_config([tmp_path / "config.yaml"]) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learner"]["learning_rate"] == 1e-5


def test_a_cluster_without_the_project_says_so(tmp_path: Path) -> None:
    write_job(tmp_path, load_config(), ["train"])
    done = subprocess.run(["/bin/sh", "job.sh", "train"], capture_output=True, text=True, cwd=tmp_path, env={"PATH": str(tools(tmp_path))}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ftb-llm: error: no Python on the cluster's head can import ftb_llm")


def tools(folder: Path) -> Path:
    """A PATH with a shell's tools, and no Python."""
    path = folder / "bin"
    path.mkdir()
    for name in ("sed", "tr"):
        [found] = [place for place in (Path("/usr/bin") / name, Path("/bin") / name) if place.exists()][:1]
        (path / name).symlink_to(found)
    return path


def test_a_token_lying_ready_switches_authentication_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    use_token_lying_ready()
    assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    use_token_lying_ready()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"  # the user's word goes first
    monkeypatch.delenv("RAY_AUTH_MODE")
    use_token_lying_ready()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.delenv("RAY_AUTH_MODE")

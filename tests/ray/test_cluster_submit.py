"""`ftb_llm.cluster` against a real `ray start --head` with token authentication, on free loopback ports."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ray_head import DEADLINE_SECONDS, TOKEN, Head, clean_env, free_ports, ray_head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(cpus=1) as running:
        yield running


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(**env), timeout=DEADLINE_SECONDS, check=False)


def submit(entrypoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`submit_entrypoint` in a process of its own: Ray reads its authentication mode once per process."""
    return run_python(f"import sys; from ftb_llm.cluster import submit_entrypoint; sys.exit(submit_entrypoint({entrypoint!r}))", **env)


@pytest.mark.parametrize("way", ["dashboard", "gcs"])
def test_a_job_runs_and_its_log_is_shown(head: Head, way: str) -> None:
    done = submit("echo hello from the job", RAY_ADDRESS=getattr(head, way), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "hello from the job\n" in done.stdout


def test_the_exit_code_of_the_job_comes_back_with_a_token_from_the_home_folder(head: Head, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    done = submit("echo going wrong; exit 7", RAY_ADDRESS=head.dashboard, HOME=str(tmp_path))
    assert done.returncode == 7, done.stderr
    assert "going wrong\n" in done.stdout


def train(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`ftb-llm train` from an empty home folder."""
    command = [sys.executable, "-m", "ftb_llm.cli.main", "train"]
    return subprocess.run(
        command, capture_output=True, text=True, env=clean_env(HOME=str(tmp_path), **env), cwd=tmp_path, timeout=DEADLINE_SECONDS, check=False
    )


@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_TOKEN": "f" * 32}], ids=["no token", "wrong token"])
def test_a_refused_token_is_one_clear_line(head: Head, tmp_path: Path, token: dict[str, str]) -> None:
    done = train(tmp_path, RAY_ADDRESS=head.dashboard, **token)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"ftb-llm: error: RAY_ADDRESS: the cluster at {head.dashboard} refuses the token: set RAY_AUTH_MODE=token")
    assert "Traceback" not in done.stderr


def test_no_cluster_is_one_clear_line(tmp_path: Path) -> None:
    [port] = free_ports(1)
    done = train(tmp_path, RAY_ADDRESS=f"http://127.0.0.1:{port}")
    assert done.returncode == 2
    assert f"ftb-llm: error: RAY_ADDRESS: the cluster at http://127.0.0.1:{port} can't be used" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_config_travels_resolved_and_the_clusters_own_python_reads_it(head: Head, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom ftb_llm.cluster import submit_entrypoint, write_job\nfrom ftb_llm.config import load_config\n"
        "config = load_config((), ['learner.learning_rate=1e-5', 'run.dir=here'])\n"
        f"command = write_job(Path({str(tmp_path)!r}), config, ['train', 'config.yaml', '--dry-run', '--json'])\n"
        f"sys.exit(submit_entrypoint(command, working_dir={str(tmp_path)!r}))"
    )
    done = run_python(code, RAY_ADDRESS=head.dashboard, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads(done.stdout[done.stdout.index("{\n") : done.stdout.rindex("\n}") + 2])
    assert config["learner"]["learning_rate"] == 1e-5
    assert config["run"]["dir"] == str(Path.cwd() / "here")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config


def test_ctrl_c_stops_the_job_and_waits_for_it(head: Head, tmp_path: Path) -> None:
    note = tmp_path / "note"
    # `sleep` runs beside the shell, not in front of it: a trap runs only between two commands.
    job = f"trap 'echo bye > {note}; exit 0' TERM; echo the job is up; sleep 600 & wait"
    command = [sys.executable, "-c", f"import sys; from ftb_llm.cluster import submit_entrypoint; sys.exit(submit_entrypoint({job!r}))"]
    env = clean_env(RAY_ADDRESS=head.dashboard, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as client:
        assert client.stdout is not None
        shown = []
        for line in client.stdout:
            shown.append(line)
            if line == "the job is up\n":
                client.send_signal(signal.SIGINT)
        assert client.wait(timeout=DEADLINE_SECONDS) == 130, shown
    assert note.read_text() == "bye\n"
    assert shown[-1].endswith(": stopped\n")

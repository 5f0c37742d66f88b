"""`ftb_llm.cluster` against a real `ray start --head` with token authentication, on free loopback ports."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 2
DEADLINE_SECONDS = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A running cluster of one node."""

    dashboard: str
    gcs: str


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def clean_env(**more: str) -> dict[str, str]:
    """No Ray settings, and a PATH that knows nothing of this test's virtual environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FTB_LLM_", "VIRTUAL_ENV"))}
    return kept | {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"} | more


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    gcs, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ftb_ray_", dir="/tmp")  # Ray's socket paths must stay short
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--temp-dir={folder}", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    with open(Path(folder) / "start.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=clean_env(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN), cwd=folder)
    try:
        wait_until_up(f"http://127.0.0.1:{dashboard}/api/version", process, Path(folder) / "start.log")
        yield Head(dashboard=f"http://127.0.0.1:{dashboard}", gcs=f"127.0.0.1:{gcs}")
    finally:
        shut_down(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    pytest.fail(f"ray start did not come up: {log.read_text()}")


def shut_down(process: subprocess.Popen[bytes]) -> None:
    """End `ray start` and the processes that it started, and no others."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=5)
    for one in alive:
        one.kill()  # psutil refuses when the id has been reused meanwhile


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

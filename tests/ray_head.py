"""A real `ray start --head` with token authentication, on free loopback ports, for the tests that submit jobs to one."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[1]
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


@contextmanager
def ray_head(cpus: int) -> Iterator[Head]:
    gcs, dashboard, agent, client = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ftb_ray_", dir="/tmp")  # Ray's socket paths must stay short
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--temp-dir={folder}", f"--num-cpus={cpus}", "--object-store-memory=100000000", "--disable-usage-stats"]
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

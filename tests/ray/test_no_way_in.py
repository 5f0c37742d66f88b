"""Another user of this machine against a Ray of the run's own: no file of it opens, and no port of it answers without the token."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ftb_llm.local_ray import token
from ftb_llm.remote import running_ray
from ftb_llm.run_dir import RunDir

pytestmark = pytest.mark.ray
NOBODY = 65534
# Ray keeps these two open to everybody, and they say nothing but that its processes are alive.
HEALTH = {"/api/healthz", "/api/local_raylet_healthz"}
PATHS = ["/", "/metrics", "/logs/", "/api/job_agent/jobs/", *sorted(HEALTH)]

# What nobody tries: to read every path, to list and write every folder, and to get anything but a refusal from every port.
INTRUDER = """
import http.client, json, os, sys
asked = json.load(sys.stdin)
got = []
for path in asked["paths"]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1)
        got.append(path)
    except OSError:
        pass
for port in asked["ports"]:
    for path in asked["urls"]:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status not in (401, 403, 404, 405):
                got.append(f"{path} {answer.status} {answer.read(60)!r}")
        except (OSError, http.client.HTTPException):
            pass
print(json.dumps(got))
"""


@ray.remote(num_cpus=0)
class Worker:
    def environment(self) -> dict[str, str]:
        return dict(os.environ)


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def listening() -> list[Any]:
    """Of Ray's processes and of this one; some of Ray's end by themselves meanwhile."""
    links = []
    for process in family():
        with suppress(psutil.NoSuchProcess):
            links += [link for link in process.net_connections("tcp") if link.status == psutil.CONN_LISTEN]
    return links


def command_lines() -> list[str]:
    lines = []
    for process in family():
        with suppress(psutil.NoSuchProcess):
            lines += process.cmdline()
    return lines


def test_nothing_is_left_when_it_ends() -> None:
    if ray.is_initialized():
        pytest.skip("whoever runs the tests has a Ray up in this process, and it is not the run's own")
    with running_ray():
        folder = Path(ray.get_runtime_context().get_temp_dir()).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert "RAY_AUTH_TOKEN" in os.environ
    assert not folder.exists()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    if ray.is_initialized():
        pytest.skip("whoever runs the tests has a Ray up in this process, and it is not the run's own")
    with running_ray():
        ray.get(Worker.remote().environment.remote())  # type: ignore[attr-defined]
        yield Path(ray.get_runtime_context().get_temp_dir()).parent


def test_every_port_is_on_loopback(session: Path) -> None:
    assert listening()
    assert {link.laddr.ip for link in listening()} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_reads_nothing_and_no_port_answers_him(session: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    run = RunDir.create(tmp_path / "run")
    run.append_event("started", "hello", step=0)
    paths = [str(path) for folder in (session, run.path) for path in (folder, *folder.rglob("*"))]
    paths += [f"/proc/{process.pid}/environ" for process in family()]
    assert len(paths) > 20
    asked = {"paths": paths, "ports": sorted({link.laddr.port for link in listening()}), "urls": PATHS}
    intruder = subprocess.run(
        ["python3", "-c", INTRUDER],  # the system's: nobody may be unable to read the one that runs this test
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        timeout=300,
    )
    assert [got for got in json.loads(intruder.stdout) if got.split()[0] not in HEALTH] == []


def test_the_token_is_in_no_file_and_on_no_command_line(session: Path) -> None:
    words = command_lines()
    assert words
    assert not any(token() in word for word in words)
    files = [path for path in session.rglob("*") if path.is_file()]
    assert files
    assert not any(token().encode() in path.read_bytes() for path in files)

"""A Ray of this run's own that nobody else on the machine can use: a token, loopback alone, and a folder that is ours.

Whoever may speak to a Ray may run commands as its owner. Ray would write its token to a file, listen on every interface, and make its
session folder writable by everybody. Here the token is in the environment of the run's own processes and nowhere else, the addresses
are loopback's, and the session lies inside a folder that only this user can enter, and that is removed in the end.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SCRATCH_NAME = "FTB_LLM_SCRATCH_NAME"  # in the actors' environment: what the names of their folders in memory begin with
MEMORY = Path("/dev/shm")
_LONGEST_BASE = 30  # a Unix socket's path has 107 bytes at most, and Ray's part of it takes about 75


@cache
def token() -> str:
    """One for the life of this process: Ray keeps the first one that it reads."""
    return secrets.token_hex(32)


@contextmanager
def private_session() -> Iterator[Path]:
    """Set the environment that Ray's processes inherit; yields the folder for its sessions. Both end with the block."""
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ftb-", dir=base if len(base) <= _LONGEST_BASE else "/tmp"))  # 0700
    try:
        with _environment(_settings(folder)):
            _read_settings_again()
            yield folder / "r"  # Ray opens the folder that it is given to everybody, so it gets one within
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a process that is just ending may still write to its log
        for scratch in MEMORY.glob(f"ftb-llm-{folder.name}-*"):
            shutil.rmtree(scratch, ignore_errors=True)


def _settings(folder: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token(),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's word for: this node is 127.0.0.1, and listens there alone
        "RAY_enable_metrics_collection": "false",
        # Two servers of metrics ask for no token and know no switch; a port that does not exist keeps them from starting.
        "AUTOSCALER_METRIC_PORT": "-1",
        "DASHBOARD_METRIC_PORT": "-1",
        "TMPDIR": str(folder),  # what engines leave in it goes with the folder
        "GLOO_SOCKET_IFNAME": "lo",
        SCRATCH_NAME: folder.name,
    }


def _read_settings_again() -> None:
    """Ray has read its settings when it was imported."""
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without types

    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

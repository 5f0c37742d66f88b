"""A hand-written run behind the real control plane, served over real HTTP from a thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ftb_llm.api import prometheus
from ftb_llm.api.app import create_app
from ftb_llm.api.connection import Limits
from ftb_llm.api.server import serve
from ftb_llm.config import build_config
from ftb_llm.config.ledger import ConfigLedger, ConfigVersion
from ftb_llm.errors import WrongState
from tests.fakes import make_state, make_status

DEADLINE_SECONDS = 20


class FakeRun:
    """A run that stands still at step 11; what the control plane asks of it is recorded."""

    def __init__(self) -> None:
        self.step = 0
        self.state = "training"
        self.cause: str | None = None
        self.broken = False
        self.divergences: dict[str, dict[str, float]] = {
            "reverse_kl": {"estimate": 0.25, "stderr": 0.125, "loss": 0.5, "weight_rms": 1.0, "weight_max": 2.0, "ess": 200.0},
            "pearson": {"estimate": float("nan"), "stderr": float("inf"), "loss": 0.5, "weight_rms": 1.0, "weight_max": 2.0, "ess": 12.5},
        }
        self.commands: list[tuple[str, str]] = []
        self.changes: list[ConfigVersion] = []
        self.ledger = ConfigLedger(build_config({"run": {"max_steps": 50}}), next_step=lambda: self.step + 1, on_change=self.changes.append)
        self.step = 11

    def status(self) -> dict[str, Any]:
        if self.broken:
            raise KeyError("a secret of the inside")
        status = make_status(make_state(step=self.step), self.ledger)
        return status | {"state": self.state, "divergences": self.divergences}

    def not_ready_cause(self) -> str | None:
        return self.cause

    def request_stop(self, source: str) -> None:
        if self.state == "stopping":
            raise WrongState("the run is already stopping")
        self.state = "stopping"
        self.commands.append(("stop", source))

    def request_checkpoint(self, source: str) -> dict[str, Any]:
        if self.state != "training":
            raise WrongState(f"no checkpoint while {self.state}")
        self.commands.append(("checkpoint", source))
        return {"after_step": self.step + 1}

    def metrics_text(self) -> bytes:
        return prometheus.render(self.status(), make_state(step=self.step).last_values)


@contextmanager
def serving(app: FastAPI, *, limits: Limits | None = None) -> Iterator[str]:
    """The base URL of a real server in a thread of its own, on a free port."""
    urls: list[str] = []
    stops: list[Callable[[], object]] = []
    started = threading.Event()

    async def main() -> None:
        stop = asyncio.Event()
        async with serve(app, "127.0.0.1", 0, limits=limits) as url:
            urls.append(url)
            loop = asyncio.get_running_loop()
            stops.append(lambda: loop.call_soon_threadsafe(stop.set))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert started.wait(DEADLINE_SECONDS), "the server did not start"
        yield urls[0]
    finally:
        for stop in stops:
            stop()
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, tuple[FastAPI, str]]]:
    """One server without and one with the token `s3cret`; the runs behind them change from test to test."""
    free, guarded = create_app(FakeRun()), create_app(FakeRun(), token="s3cret")
    with serving(free) as free_url, serving(guarded) as guarded_url:
        yield {"free": (free, free_url), "guarded": (guarded, guarded_url)}


@pytest.fixture
def run(servers: dict[str, tuple[FastAPI, str]]) -> FakeRun:
    """A fresh run behind both servers."""
    fresh = FakeRun()
    for app, _ in servers.values():
        app.state.run = fresh
    return fresh


@pytest.fixture
def url(servers: dict[str, tuple[FastAPI, str]], run: FakeRun) -> str:
    return servers["free"][1]


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=DEADLINE_SECONDS) as client:
        yield client


@pytest.fixture
def guarded(servers: dict[str, tuple[FastAPI, str]], run: FakeRun) -> Iterator[httpx.Client]:
    """A client, without credentials, of the server that wants the token `s3cret`."""
    with httpx.Client(base_url=servers["guarded"][1], trust_env=False, timeout=DEADLINE_SECONDS) as client:
        yield client

"""Real runs, started as a user starts them: the `ftb-llm` command in a process of its own, with a fresh port and run folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.api.client import Client
from ftb_llm.errors import FtbError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
START_SECONDS = 240  # the base model is built when the cache is empty


@dataclass(slots=True, kw_only=True)
class Run:
    """A run under way."""

    process: subprocess.Popen[bytes]
    path: Path
    url: str
    log: Path

    def wait_until(self, condition: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
        """Poll the real status until the condition holds; the run ending first, or the deadline, fails the test with the log."""
        deadline = time.monotonic() + seconds
        with Client(self.url) as client:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    pytest.fail(f"the run ended with exit code {self.process.returncode}:\n{self.output()}")
                try:
                    status = client.status()
                except FtbError:
                    status = None  # it does not listen yet
                if status is not None and condition(status):
                    return status
                time.sleep(0.1)
        pytest.fail(f"waited {seconds} s in vain:\n{self.output()}")

    def interrupt(self) -> None:
        """As a terminal does it on Ctrl-C: every process of the group gets the signal, not just the first."""
        os.killpg(self.process.pid, signal.SIGINT)

    def exit_code(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run did not end within {seconds} s:\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_run(folder: Path, *words: str, **environment: str) -> Run:
    """`ftb-llm train WORDS…`; the run is named so that its folder is known."""
    port = free_port()
    log = folder / f"train-{port}.log"
    command = [sys.executable, "-m", "ftb_llm.cli.main", "train", *words, f"run.dir={folder}", "run.name=run", f"control.port={port}"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True)
    return Run(process=process, path=folder / "run", url=f"http://127.0.0.1:{port}", log=log)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Starts runs; whatever still runs at the end of the module is interrupted, then killed."""
    runs: list[Run] = []

    def start(*words: str, folder: Path | None = None, **environment: str) -> Run:
        runs.append(start_run(folder or tmp_path_factory.mktemp("runs"), *words, **environment))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.interrupt()
            try:
                run.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(run.process.pid, signal.SIGKILL)

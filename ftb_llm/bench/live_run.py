"""A small real run in a process of its own, for what has to be measured or tried on a live one."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ftb_llm.api.client import Client
from ftb_llm.errors import ApiError, ApiUnreachable, SetupError
from ftb_llm.run_dir import read_lines

START_SECONDS = 240.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.5
WARM_STEPS = 20  # after the first push, when the step rate is steady
TOKEN_VARIABLE = "FTB_LLM_TOKEN"
ENDLESS = ("run.max_steps=1000000", "eval.every_steps=1000000", "checkpoint.every_steps=1000000")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """A run that trains. Its process is the one that serves HTTP."""

    process: "subprocess.Popen[bytes]"
    port: int
    token: str | None
    run_dir: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def alive(self) -> bool:
        return self.process.poll() is None

    def step_times(self) -> list[float]:
        """When each step ended, as time.time() has it."""
        return [row["time"] for row in read_lines(self.run_dir / "metrics.jsonl") if row["step"] > 0]

    def private_bytes(self) -> int:
        """Memory that is this process's alone, without what Ray's object store maps; 0 when it has ended."""
        try:
            memory = psutil.Process(self.process.pid).memory_info()
        except psutil.NoSuchProcess:
            return 0
        return int(memory.rss - memory.shared)

    def cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "no message"


@contextmanager
def live_run(words: Sequence[str], *, token: str | None = None, open_files: int | None = None) -> Iterator[LiveRun]:
    """Start `ftb-llm train` with these words and without an end in sight, wait until it trains, and stop it after the block.

    `open_files` bounds the files that it may hold open. SetupError says why it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="ftb-llm-live-", ignore_cleanup_errors=True) as folder:
        run = _start([*words, *ENDLESS], folder=Path(folder), token=token, open_files=open_files)
        try:
            _wait_until_it_trains(run)
            yield run
        finally:
            _stop(run)


def _start(words: Sequence[str], *, folder: Path, token: str | None, open_files: int | None) -> LiveRun:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = [f"control.port={port}", f"run.dir={folder}", "run.name=live"]
    env = {name: value for name, value in os.environ.items() if name not in (TOKEN_VARIABLE, "RAY_ADDRESS")}
    if token is not None:
        settings.append(f"control.token_env={TOKEN_VARIABLE}")
        env[TOKEN_VARIABLE] = token
    command = [sys.executable, "-m", "ftb_llm.cli.main", "train", *words, *settings]
    log = folder / "log.txt"
    with log.open("wb") as file:
        process = _popen(command, env=env, output=file)
    if open_files is not None:
        import resource

        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_files, open_files))
    return LiveRun(process=process, port=port, token=token, run_dir=folder / "live", log=log)


def _popen(command: Sequence[str], *, env: Mapping[str, str], output: Any) -> "subprocess.Popen[bytes]":
    """In a session of its own, so that Ctrl-C is ours to hand on."""
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def _wait_until_it_trains(run: LiveRun) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if not run.alive():
            raise SetupError(f"the run ended before it trained: {run.last_words()}")
        if len(run.step_times()) >= WARM_STEPS:
            return
        time.sleep(POLL_SECONDS)
    raise SetupError(f"the run did not train within {START_SECONDS:.0f} s: {run.last_words()}")


def _stop(run: LiveRun) -> None:
    """By its API, as a user would; then by a signal; then, with all that it started, for good."""
    if run.alive():
        try:
            with Client(run.url, run.token) as client:
                client.stop()
        except (ApiUnreachable, ApiError):
            run.process.send_signal(signal.SIGINT)
    try:
        run.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()

"""Reward functions in TRL's contract, run in processes of their own.

A reward is the user's code: it may raise, hang, print, or crash its interpreter. None of that may hurt the run, so each
worker is a subprocess that is killed and replaced when a group takes too long. Whatever goes wrong becomes a
`RewardError` with a short reason, which the controller counts as the reason of a rejected group.

The subprocess is this module run as a script; see `_serve` for its side of the pipe.
"""

import asyncio
import importlib
import json
import math
import os
import reprlib
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from ftb_llm.config.schema import Reward, Rewards
from ftb_llm.errors import ConfigError, FtbError, InvalidConfig, RewardError
from ftb_llm.types import Group

RewardFunction = Callable[..., Sequence[float | None]]

_LENGTH = struct.Struct(">I")
_START_TIMEOUT_SECONDS = 120.0


class RewardSet:
    """The configured functions with their weights: plain, synchronous, usable anywhere."""

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self._functions = [(reward.function, load_function(reward.function), reward.weight) for reward in rewards]

    def score(self, call: dict[str, Any]) -> list[float]:
        """The weighted sum per completion. `None` from a function means that it has nothing to say about that completion."""
        count = len(call["completions"])
        totals = [0.0] * count
        heard = [False] * count
        for name, function, weight in self._functions:
            for index, value in enumerate(_checked(name, function, call, count)):
                if value is not None:
                    totals[index] += weight * value
                    heard[index] = True
        if not all(heard):
            raise RewardError("no_reward", f"every reward function returned None for completion {heard.index(False)}")
        for index, total in enumerate(totals):
            if not math.isfinite(total):
                raise RewardError("not_finite", f"the weighted sum of the rewards of completion {index} is {total}")
        return totals


def load_function(path: str) -> RewardFunction:
    """Import a reward function."""
    function = load_object("rewards.functions", path)
    if not callable(function):
        raise InvalidConfig([ConfigError("rewards.functions", f"{path} is a {type(function).__name__}; it must be a function")])
    return function


def load_object(key: str, path: str) -> Any:
    """Import `package.module:object` for the setting `key`; the working directory counts as an import folder, as it does for `python -m`."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # noqa: BLE001 - a module may raise anything while it is imported
        raise InvalidConfig([ConfigError(key, f"{path} can't be imported: {type(error).__name__}: {error}")]) from None


def reward_call(group: Group) -> dict[str, Any]:
    """One group as TRL's keyword arguments: every one a list with one entry per completion."""
    count = len(group.completions)
    texts = [completion.text for completion in group.completions]
    messages = group.prompt.messages
    columns = {name: [value] * count for name, value in group.prompt.columns.items()}
    return columns | {
        "prompts": [group.prompt.text if messages is None else messages] * count,
        "completions": texts if messages is None else [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(completion.token_ids) for completion in group.completions],
    }


def _checked(name: str, function: RewardFunction, call: dict[str, Any], count: int) -> list[float | None]:
    try:
        values = list(function(**call))
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything: it becomes a reason
        raise RewardError("raised", f"{name} raised {type(error).__name__}: {error}") from None
    if len(values) != count:
        raise RewardError("wrong_length", f"{name} returned {len(values)} values for {count} completions")
    return [None if value is None else _number(name, value) for value in values]


def _number(name: str, value: Any) -> float:
    """Anything that is a number (NumPy's and torch's scalars too) but not text that looks like one."""
    try:
        number = float(value) if hasattr(value, "__float__") and not isinstance(value, str | bytes) else None
    except Exception:  # noqa: BLE001 - an array of several numbers raises this in NumPy, that in torch, and the user's own class anything
        number = None
    if number is None:
        raise RewardError("not_a_number", f"{name} returned {reprlib.repr(value)}; it must return floats or None")
    if not math.isfinite(number):
        raise RewardError("not_finite", f"{name} returned {number}")
    return number


class RewardWorkers:
    """A few subprocesses that score groups. Use as an async context manager."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()

    async def __aenter__(self) -> "RewardWorkers":
        for _ in range(self._rewards.workers):
            self._idle.put_nowait(_Worker([reward.model_dump() for reward in self._rewards.functions]))
        return self

    async def __aexit__(self, *_: object) -> None:
        while not self._idle.empty():
            await self._idle.get_nowait().stop()

    async def score(self, group: Group) -> tuple[float, ...]:
        """One reward per completion, or `RewardError`."""
        worker = await self._idle.get()
        try:
            return tuple(await worker.score(reward_call(group), self._rewards.timeout_seconds))
        finally:
            self._idle.put_nowait(worker)


class _Worker:
    """One subprocess, started when it is first needed and again after it had to be killed."""

    def __init__(self, functions: list[dict[str, Any]]) -> None:
        self._functions = functions
        self._process: asyncio.subprocess.Process | None = None

    async def score(self, call: dict[str, Any], timeout_seconds: float) -> list[float]:
        if self._process is None:
            await self._start()
        try:
            async with asyncio.timeout(timeout_seconds):
                reply = await self._ask(call)
        except TimeoutError:
            await self.stop()
            raise RewardError("timeout", f"took longer than rewards.timeout_seconds = {timeout_seconds:g}") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.stop()
            raise RewardError("crashed", "the reward process died") from None
        except asyncio.CancelledError:
            await self.stop()  # a half-read reply must never be taken for the next one's
            raise
        if "rewards" not in reply:
            raise RewardError(reply["reason"], reply["message"])
        return list(reply["rewards"])

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ftb_llm.rewards",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the controller's to handle
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_SECONDS):
                ready = await self._ask({"functions": self._functions})
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            await self.stop()
            raise FtbError(f"the reward process did not start: {type(error).__name__}") from None
        if "ready" not in ready:
            raise FtbError(f"the reward process could not load its functions: {ready['message']}")

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        body = json.dumps(message).encode()
        self._process.stdin.write(_LENGTH.pack(len(body)) + body)
        await self._process.stdin.drain()
        (length,) = _LENGTH.unpack(await self._process.stdout.readexactly(_LENGTH.size))
        reply: dict[str, Any] = json.loads(await self._process.stdout.readexactly(length))
        return reply

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """The subprocess: first message names the functions, each further one is a call."""
    functions = _receive(requests)
    if functions is None:
        return
    try:
        rewards = RewardSet([Reward(**reward) for reward in functions["functions"]])
    except FtbError as error:
        _send(replies, {"reason": "import", "message": str(error)})
        return
    _send(replies, {"ready": True})
    while (call := _receive(requests)) is not None:
        try:
            _send(replies, {"rewards": rewards.score(call)})
        except RewardError as error:
            _send(replies, {"reason": error.reason, "message": error.message})


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None  # the controller closed the pipe
    message: dict[str, Any] = json.loads(stream.read(_LENGTH.unpack(header)[0]))
    return message


def _send(stream: BinaryIO, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


if __name__ == "__main__":
    # The pipe is kept aside and whatever the user's code prints goes to stderr, so that a print can't tear a reply.
    # It lives until the pipe closes: a signal meant for the run (Ctrl-C, a stopped job) must not cost the groups under way.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, pipe)

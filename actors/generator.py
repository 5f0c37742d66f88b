"""One generator: an engine that completes prompts, and takes new adapters while it does.

Consumes: group requests and published adapters. Produces: groups with exact policy versions, and push reports.
Waits for: nothing outside itself. A push pauses the engine, so requests in flight wait for it; the learner never does.

A push, in order: check payload and adapter while the engine runs; pause; merge; name the new version; resume; ask the canary.
The engine keeps the requests in flight, but drops their key-value cache together with the prefix cache and computes it again
under the new weights: no token is ever sampled from a mixture of two policies, and each completion records the versions of
its tokens. No group that holds a token of a new version leaves before the canary has spoken for that version.
"""

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.canary import judge
from actors.engine import start_engine
from ftb_llm.config import Config
from ftb_llm.config.resolve import resolve_canary_tolerance
from ftb_llm.errors import CheckpointError, NotServing, RequestRefused, WrongState
from ftb_llm.local_ray import MEMORY, SCRATCH_NAME
from ftb_llm.machine import tree_rss_bytes
from ftb_llm.types import AdapterRef, Completion, Group, GroupRequest, PushReport, SamplingSpec

BASE_VERSION = 0
SPEED_PROMPT_TOKENS = 8
SPEED_TOKENS = 8
SPEED_SECONDS = 6.0  # long enough to outlast a short disturbance
SPEED_GROUPS = 8
SPEED_GROUP_SIZE = 32


class EnginePort(Protocol):
    """What a generator needs of its engine; `actors.engine.Engine` is the real one."""

    vocabulary_size: int

    async def sample(self, prompt_ids: Sequence[int], spec: SamplingSpec, *, ignore_eos: bool = False) -> tuple[Completion, ...]: ...

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float: ...

    async def name_version(self, version: int) -> None: ...

    async def swap(self, adapter: Path, scale: float, version: int) -> float: ...

    async def stop(self) -> None: ...


class Generator:
    """A plain class; `ray_actor.py` puts it into Ray."""

    def __init__(self, config: Config, *, name: str, model_path: str | Path, engine: EnginePort | None = None) -> None:
        self.name = name
        self._config = config
        self._model_path = Path(model_path)
        self._engine = engine  # started by `start` unless one is given
        self._scratch: Path | None = None
        self._version = BASE_VERSION  # the newest that a canary has confirmed
        self._problem: str | None = None  # why this generator serves nothing
        self._pushing = asyncio.Lock()
        self._settled = asyncio.Event()  # cleared from a pause to its canary's verdict
        self._settled.set()
        self._failures = 0  # of pushes; a group that lived through one may hold tokens of half-delivered weights
        self._completions = 0
        self._tokens = 0

    async def start(self) -> dict[str, Any]:
        """Start the engine and warm it up, so that the first real group is as fast as any."""
        began = time.monotonic()
        self._scratch = await asyncio.to_thread(_scratch_folder)
        if self._engine is None:
            seed = engine_seed(self._config.run.seed, self.name)
            self._engine = start_engine(self._config, self._model_path, seed=seed, scratch=self._scratch)
        await self._engine.name_version(BASE_VERSION)
        loaded = time.monotonic()
        await self._engine.score([0], [0])  # the canary's path
        await self.measure_speed(seconds=0.0)
        return {"name": self.name, "version": self._version, "load_seconds": loaded - began, "warm_up_seconds": time.monotonic() - loaded}

    async def stop(self) -> None:
        """Shut the engine down; neither a process nor a file of it is left."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()
        if self._scratch is not None:
            await asyncio.to_thread(shutil.rmtree, self._scratch)
            self._scratch = None

    async def generate(self, request: GroupRequest) -> Group:
        """Complete one prompt K times. Many calls may be under way at once."""
        engine = self._running()
        if self._problem is not None:
            raise NotServing(f"generator {self.name} serves nothing until a push succeeds: {self._problem}")
        self._check_length(request)
        began, failures = time.monotonic(), self._failures
        completions = await engine.sample(request.prompt.token_ids, request.sampling)
        if any(completion.max_version > self._version for completion in completions):
            await self._settled.wait()
        if self._failures != failures:
            raise NotServing(f"generator {self.name} dropped group {request.group_id}: a push failed while it was in flight")
        group = Group(
            id=request.group_id,
            prompt=request.prompt,
            completions=completions,
            generator=self.name,
            generate_seconds=time.monotonic() - began,
        )
        self._completions += len(completions)
        self._tokens += group.token_count
        return group

    async def push(self, adapter: AdapterRef, payload: bytes) -> PushReport:
        """Merge the adapter into the engine and check it with the canary. One push at a time; later calls wait.

        A payload or adapter that is wrong in itself raises and changes nothing. Once the engine was touched, anything but a
        good canary takes the generator out until a later push succeeds.
        """
        engine = self._running()
        async with self._pushing:
            began = time.monotonic()
            async with self._unpacked(adapter, payload) as file:
                pause_ms, value = await self._deliver(engine, adapter, file)
            return PushReport(
                generator=self.name,
                version=adapter.version,
                byte_count=len(payload),
                pause_ms=pause_ms,
                total_ms=(time.monotonic() - began) * 1e3,
                canary_engine=value,
                canary_learner=adapter.canary.adapted,
                canary_base=adapter.canary.base,
                ok=self._problem is None,
                problem=self._problem,
            )

    async def _deliver(self, engine: EnginePort, adapter: AdapterRef, file: Path) -> tuple[float, float]:
        """Swap the weights and judge the result; returns the pause in milliseconds and the engine's canary value."""
        canary = adapter.canary
        problem: str | None = f"push of version {adapter.version} broke off"
        self._settled.clear()
        try:
            pause_ms = await engine.swap(file, adapter.scale, adapter.version)
            value = await engine.score(canary.prompt_ids, canary.completion_ids)
            problem = judge(value, canary.adapted, canary.base, resolve_canary_tolerance(self._config))
        finally:  # also when cancelled: no verdict is a bad verdict
            self._problem = problem
            if problem is None:
                self._version = adapter.version
            else:
                self._failures += 1
            self._settled.set()
        return pause_ms, value

    @contextlib.asynccontextmanager
    async def _unpacked(self, adapter: AdapterRef, payload: bytes) -> AsyncIterator[Path]:
        """The payload as a file, checked in every way that needs no engine."""
        assert self._scratch is not None
        file = self._scratch / f"v{adapter.version:06d}.safetensors"
        try:
            await asyncio.to_thread(_unpack, adapter, payload, file, self._model_path)
            yield file
        finally:
            file.unlink(missing_ok=True)

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
        """The engine's log-prob of the completion, summed over its tokens."""
        return await self._running().score(prompt_ids, completion_ids)

    async def measure_speed(self, seconds: float = SPEED_SECONDS) -> float:
        """Tokens per second on a fixed workload: the best of the short windows that fit, since whatever interferes only slows it down."""
        engine = self._running()
        length = min(SPEED_TOKENS, self._config.actors.max_model_len - SPEED_PROMPT_TOKENS)
        size = min(SPEED_GROUP_SIZE, self._config.sampling.group_size)
        groups = min(SPEED_GROUPS, self._config.actors.groups_in_flight)
        spec = SamplingSpec(group_size=size, temperature=1.0, top_p=1.0, max_tokens=length)
        prompts = [[(group + position) % engine.vocabulary_size for position in range(SPEED_PROMPT_TOKENS)] for group in range(groups)]
        best = 0.0
        end = time.monotonic() + seconds
        while best == 0.0 or time.monotonic() < end:
            began = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for prompt in prompts:
                    tasks.create_task(engine.sample(prompt, spec, ignore_eos=True))
            best = max(best, groups * size * length / (time.monotonic() - began))
        return best

    async def info(self) -> dict[str, Any]:
        """Facts about the generator and its processes."""
        return {
            "name": self.name,
            "version": self._version,
            "problem": self._problem,
            "completions": self._completions,
            "tokens": self._tokens,
            "pid": os.getpid(),
            "rss_bytes": await asyncio.to_thread(tree_rss_bytes),
        }

    def _running(self) -> EnginePort:
        if self._engine is None:
            raise WrongState(f"generator {self.name} is not running")
        return self._engine

    def _check_length(self, request: GroupRequest) -> None:
        longest, prompt, room = self._config.actors.max_model_len, len(request.prompt.token_ids), request.sampling.max_tokens
        if prompt + room > longest:
            raise RequestRefused(
                f"actors.max_model_len {longest} is too short for prompt {request.prompt.index} of {prompt} tokens "
                f"with sampling.max_tokens {room}; it must be at least {prompt + room}"
            )


def engine_seed(run_seed: int, name: str) -> int:
    """One per generator: two engines with the same seed would draw the same numbers."""
    return zlib.crc32(f"{run_seed}/{name}".encode()) % 2**31


def _scratch_folder() -> Path:
    """In memory, and named so that a Ray of our own takes away what a killed actor leaves."""
    name = os.environ.get(SCRATCH_NAME, "")
    return Path(tempfile.mkdtemp(prefix=f"ftb-llm-{name}-", dir=MEMORY if MEMORY.is_dir() else None))


def _unpack(adapter: AdapterRef, payload: bytes, file: Path, base: Path) -> None:
    from actors.merge import check_adapter

    digest = hashlib.sha256(payload).hexdigest()
    if digest != adapter.sha256:
        raise CheckpointError(f"adapter of version {adapter.version} arrived damaged: sha256 is {digest}, {adapter.sha256} was published")
    file.write_bytes(payload)
    check_adapter(base, file)

"""The generator as a Ray actor: the plain class, nothing added."""

from pathlib import Path
from typing import Any

import ray

from actors.generator import Generator
from ftb_llm.config import Config
from ftb_llm.types import AdapterRef, Group, GroupRequest, PushReport

CALLS_AT_ONCE = 1000


@ray.remote(max_concurrency=CALLS_AT_ONCE)
class GeneratorActor:
    """All methods run in one event loop. Start it with `num_cpus` and `num_gpus` of the config, then call `start`."""

    def __init__(self, config: Config, *, name: str, model_path: str | Path) -> None:
        self._generator = Generator(config, name=name, model_path=model_path)

    async def start(self) -> dict[str, Any]:
        return await self._generator.start()

    async def generate(self, request: GroupRequest) -> Group:
        return await self._generator.generate(request)

    async def push(self, adapter: AdapterRef, payload: bytes) -> PushReport:
        """Pass the payload as an `ObjectRef`: Ray brings the bytes here without a stop in the caller."""
        return await self._generator.push(adapter, payload)

    async def score(self, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> float:
        return await self._generator.score(prompt_ids, completion_ids)

    async def measure_speed(self) -> float:
        return await self._generator.measure_speed()

    async def info(self) -> dict[str, Any]:
        return await self._generator.info()

    async def stop(self) -> None:
        await self._generator.stop()

"""What the machine and the job use of it."""

import asyncio
import os
from collections.abc import Awaitable, Callable

import psutil


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_count() -> int:
    """GPUs that torch can use; it asks the driver without taking one."""
    import torch

    return torch.cuda.device_count()


def tree_rss_bytes() -> int:
    """Resident memory of this process and everything it started. Shared pages count once per process: an upper bound."""
    total = 0
    root = psutil.Process()
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # it ended between the listing and the look
    return total


class PeakMemory:
    """Samples the job's memory in the background and keeps the largest value. Use as an async context manager."""

    def __init__(self, sample_bytes: Callable[[], Awaitable[int]], every_seconds: float = 2.0) -> None:
        self._sample_bytes = sample_bytes
        self._every_seconds = every_seconds
        self._peak_bytes = 0
        self._watch: asyncio.Task[None] | None = None

    @property
    def peak_gib(self) -> float:
        return self._peak_bytes / 2**30

    async def __aenter__(self) -> "PeakMemory":
        self._watch = asyncio.create_task(self._sample_forever(), name="peak memory")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watch is not None
        self._watch.cancel()

    async def _sample_forever(self) -> None:
        while True:
            self._peak_bytes = max(self._peak_bytes, await self._sample_bytes())
            await asyncio.sleep(self._every_seconds)

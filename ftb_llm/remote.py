"""Ray at arm's length: starting it, and actor handles as the ports that the controller knows."""

import asyncio
import os
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ftb_llm.errors import FtbError, ProcessDied, RemoteError, SetupError
from ftb_llm.machine import core_count
from ftb_llm.types import AdapterRef, EvalReport, Group, GroupRequest, PushReport, StepReport, StepRequest

_START_TIMEOUT_SECONDS = 600.0  # real checkpoints are large; an actor that can't be placed must still not hang for ever
_STOP_TIMEOUT_SECONDS = 20.0


@contextmanager
def running_ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, or a Ray of our own that ends with the run."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=core_count(), include_dashboard=False, logging_level="warning", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def log_folder() -> str:
    """Where the actors' own logs are."""
    return os.path.join(ray.get_runtime_context().get_session_dir(), "logs")


def check_resources(cpus: float, gpus: float) -> None:
    """The actors must fit into what is free now; otherwise Ray would wait without a word."""
    free = ray.available_resources()
    if free.get("CPU", 0) < cpus or free.get("GPU", 0) < gpus:
        raise SetupError(
            f"actors.cpus_each, actors.gpus_each, learner.cpus, learner.gpus: the run needs {cpus:g} CPUs and {gpus:g} GPUs, "
            f"but the cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
        )


async def _call(reply: Awaitable[Any]) -> Any:
    """Await a remote call; errors arrive as what they were, in one line, not wrapped in a remote traceback."""
    try:
        return await reply
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, FtbError) else RemoteError(f"{type(cause).__name__}: {' '.join(str(cause).split())}")) from error
    except RayActorError as error:
        raise ProcessDied(" ".join(str(error).split())) from error


async def _started(reply: Awaitable[Any], name: str) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_START_TIMEOUT_SECONDS):
            facts: dict[str, Any] = await _call(reply)
    except (RemoteError, ProcessDied) as error:
        raise RemoteError(f"{name} did not start: {error}; the actors' logs are in {log_folder()}") from error
    except TimeoutError:
        raise RemoteError(f"{name} did not start within {_START_TIMEOUT_SECONDS:g} s; the actors' logs are in {log_folder()}") from None
    return facts


async def _stopped(reply: Awaitable[Any], actor: Any) -> None:
    """Ask first, so that engines end their own processes; then make sure."""
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_SECONDS):
            await _call(reply)
    except (TimeoutError, RemoteError, ProcessDied):
        pass  # it is dead or deaf already, and killed now
    finally:
        ray.kill(actor)


class RemoteGenerator:
    """A generator actor. See `ftb_llm.ports.GeneratorPort`."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    async def start(self) -> dict[str, Any]:
        return await _started(self._actor.start.remote(), self.name)

    async def generate(self, request: GroupRequest) -> Group:
        group: Group = await _call(self._actor.generate.remote(request))
        return group

    async def push(self, adapter: AdapterRef, payload: Any) -> PushReport:
        report: PushReport = await _call(self._actor.push.remote(adapter, payload))
        return report

    async def measure_speed(self) -> float:
        speed: float = await _call(self._actor.measure_speed.remote())
        return speed

    async def info(self) -> dict[str, Any]:
        facts: dict[str, Any] = await _call(self._actor.info.remote())
        return facts

    async def stop(self) -> None:
        await _stopped(self._actor.stop.remote(), self._actor)


class RemoteLearner:
    """The learner actor. See `ftb_llm.ports.LearnerPort`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def start(self) -> dict[str, Any]:
        return await _started(self._actor.info.remote(), "learner")

    async def step(self, request: StepRequest) -> StepReport:
        report: StepReport = await _call(self._actor.step.remote(request))
        return report

    async def publish(self, version: int) -> tuple[AdapterRef, Any]:
        """The payload stays in the object store: generators fetch it from there, never through this process."""
        adapter, payload = self._actor.publish.options(num_returns=2).remote(version)
        return await _call(adapter), payload

    async def evaluate(self, step: int, beta: float) -> EvalReport | None:
        report: EvalReport | None = await _call(self._actor.evaluate.remote(step, beta))
        return report

    async def logprobs(self, groups: list[Group]) -> list[list[float]]:
        values: list[list[float]] = await _call(self._actor.logprobs.remote(groups))
        return values

    async def save_checkpoint(self, step: int) -> str:
        path: str = await _call(self._actor.save_checkpoint.remote(step))
        return path

    async def load_checkpoint(self, path: str) -> int:
        step: int = await _call(self._actor.load_checkpoint.remote(path))
        return step

    async def info(self) -> dict[str, Any]:
        facts: dict[str, Any] = await _call(self._actor.info.remote())
        return facts

    async def stop(self) -> None:
        ray.kill(self._actor)

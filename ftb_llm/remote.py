"""Ray at arm's length: starting it, and actor handles as the ports that the controller knows."""

import asyncio
import itertools
import os
import re
import time
from collections.abc import Awaitable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ftb_llm.errors import EngineError, FtbError, ProcessDied, RemoteError, SetupError
from ftb_llm.local_ray import private_session
from ftb_llm.machine import core_count
from ftb_llm.tracebacks import last_exception, one_line
from ftb_llm.types import AdapterRef, EvalReport, Group, GroupRequest, PushReport, StepReport, StepRequest

_START_TIMEOUT_SECONDS = 600.0  # real checkpoints are large; an actor that can't be placed must still not hang for ever
_STOP_TIMEOUT_SECONDS = 20.0
_GRACE_SECONDS = 3.0  # Ray knows of a death sooner
_PLACEMENT_SECONDS = 30.0  # what is wanted is known to be free


@contextmanager
def running_ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, or a Ray of our own that ends with the run."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, logging_level="warning", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    with private_session() as folder:
        try:
            ray.init(
                address="local",
                num_cpus=core_count(),
                include_dashboard=False,
                logging_level="error",  # its warnings (file descriptors, missing metrics) would break the live panel
                log_to_driver=False,
                _temp_dir=str(folder),
            )
            yield
        finally:
            ray.shutdown()


def where_logs_are() -> str:
    """Where a cluster's actors keep their logs, as the end of an error's line; a Ray of our own takes them away with itself."""
    if not os.environ.get("RAY_ADDRESS"):
        return ""
    context = ray.get_runtime_context()
    return f"; the actors' logs are in {Path(context.get_temp_dir()) / context.get_session_name() / 'logs'} on their nodes"


def check_resources(cpus: float, gpus: float) -> None:
    """The actors must fit into what is free now; otherwise Ray would wait without a word."""
    free = ray.available_resources()
    if free.get("CPU", 0) < cpus or free.get("GPU", 0) < gpus:
        raise SetupError(
            "actors.cpus_each, actors.gpus_each, learner.ranks, learner.cpus, learner.gpus, learner.reference_actors: "
            f"the run needs {cpus:g} CPUs and {gpus:g} GPUs, "
            f"but the cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
        )


@contextmanager
def reserved(bundle: Mapping[str, float], *, count: int, strategy: str) -> Iterator[PlacementGroup | None]:
    """A place for each of the learner's ranks, taken together or not at all; one rank needs no such thing."""
    if count == 1:
        yield None
        return
    group = placement_group([dict(bundle) for _ in range(count)], strategy=strategy.upper())
    try:
        if not group.wait(_PLACEMENT_SECONDS):
            each = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            raise SetupError(f"learner.placement: {strategy} finds no place for learner.ranks {count} with {each} each on this cluster's nodes; try pack")
        yield group
    finally:
        remove_placement_group(group)


async def _call(reply: Awaitable[Any]) -> Any:
    """Await a remote call; errors arrive as what they were, in one line, not wrapped in a remote traceback."""
    try:
        return await reply
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, FtbError) else RemoteError(told(cause))) from error
    except RayActorError as error:
        raise ProcessDied(death_reason(str(error))) from error


def told(cause: BaseException) -> str:
    """An actor's exception in one line. Where a class could not be imported, Ray raises an exception whose message holds the traceback."""
    words = str(cause)
    return (last_exception(words) if "Traceback" in words else None) or f"{type(cause).__name__}: {' '.join(words.split())}"


def death_reason(text: str) -> str:
    """The useful part of what Ray says of a dead actor: it puts names, numbers and guesses around it."""
    if raised := last_exception(text):
        return raised
    if detail := re.search(r"Worker exit detail: (.+?)(?: There are some potential root causes|$)", one_line(text)):
        return f"its process ended: {detail[1]} It was killed, perhaps for lack of memory, or it crashed."
    return one_line(text.partition("\n\t")[0])


async def _started(reply: Awaitable[Any], name: str) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_START_TIMEOUT_SECONDS):
            facts: dict[str, Any] = await _call(reply)
    except (RemoteError, ProcessDied, EngineError) as error:
        raise RemoteError(f"{name} did not start: {error}{where_logs_are()}") from None
    except TimeoutError:
        raise RemoteError(f"{name} did not start within {_START_TIMEOUT_SECONDS:g} s{where_logs_are()}") from None
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
    """The learner's ranks, one actor each, as one. See `ftb_llm.ports.LearnerPort`.

    Every call goes to every rank, since they compute together, and rank 0's answer counts. When one fails, the others may
    wait for it in the middle of a sum: nobody waits for them, they are killed.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    async def start(self) -> dict[str, Any]:
        facts: dict[str, Any] = await _started(self._meet(), "learner")
        return facts

    async def step(self, request: StepRequest) -> StepReport:
        report: StepReport = await self._answer("step", ray.put(request))
        return report

    async def publish(self, version: int) -> tuple[AdapterRef, Any]:
        """The payload stays in the object store: generators fetch it from there, never through this process."""
        replies = [actor.publish.options(num_returns=2).remote(version) for actor in self._actors]
        adapters = await self._together([adapter for adapter, _ in replies])
        return adapters[0], replies[0][1]

    async def evaluate(self, step: int, beta: float) -> EvalReport | None:
        report: EvalReport | None = await self._answer("evaluate", step, beta)
        return report

    async def logprobs(self, groups: list[Group]) -> list[list[float]]:
        values: list[list[float]] = await self._answer("logprobs", ray.put(groups))
        return values

    async def save_checkpoint(self, step: int) -> str:
        path: str = await self._answer("save_checkpoint", step)
        return path

    async def load_checkpoint(self, path: str) -> int:
        step: int = await self._answer("load_checkpoint", path)
        return step

    async def info(self) -> dict[str, Any]:
        """Rank 0's facts, with the memory of all."""
        facts = await self._all("info")
        return facts[0] | {"rss_bytes": sum(fact["rss_bytes"] for fact in facts)}

    async def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    async def _meet(self) -> dict[str, Any]:
        """Several ranks meet where rank 0 says; each then loads, which is the first thing that they do together."""
        if len(self._actors) > 1:
            address = await _call(self._actors[0].rendezvous.remote())
            await self._together([actor.join.remote(rank, address) for rank, actor in enumerate(self._actors)])
        return await self.info()

    async def _answer(self, method: str, *arguments: Any) -> Any:
        return (await self._all(method, *arguments))[0]

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await self._together([getattr(actor, method).remote(*arguments) for actor in self._actors])

    async def _together(self, replies: Sequence[Awaitable[Any]]) -> list[Any]:
        if len(replies) == 1:
            return [await _call(replies[0])]
        try:
            return await all_ranks([_call(reply) for reply in replies], grace_seconds=_GRACE_SECONDS)
        except Exception:
            await self.stop()
            raise


class RemoteReference:
    """The reference actors, which take groups in turn. See `ftb_llm.ports.ReferencePort`. One that dies ends the run, as the learner does."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._turns = itertools.cycle(self._actors)

    async def start(self) -> None:
        await asyncio.gather(*(_started(actor.info.remote(), f"reference-{index}") for index, actor in enumerate(self._actors)))

    async def score(self, group: Group) -> tuple[tuple[float, ...], ...]:
        try:
            values: tuple[tuple[float, ...], ...] = await _call(next(self._turns).score.remote(group))
        except ProcessDied as error:
            raise ProcessDied(f"a reference actor died: {error}") from error
        return values

    async def info(self) -> dict[str, Any]:
        facts = await asyncio.gather(*(_call(actor.info.remote()) for actor in self._actors))
        return {"rss_bytes": sum(fact["rss_bytes"] for fact in facts)}

    async def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


async def all_ranks(calls: Sequence[Coroutine[Any, Any, Any]], *, grace_seconds: float) -> list[Any]:
    """Every rank's answer, or at once what is wrong with one of them.

    When a rank dies, the others' sums may break before the death is known. What they say is then only a consequence, so a
    breakdown is given a moment to be explained by a death, or by an error raised on purpose.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    deadline: float | None = None
    try:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            waiting = [task for task in tasks if not task.done()]
            if waiting:
                await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            failed = {rank: error for rank, task in enumerate(tasks) if task.done() and (error := task.exception()) is not None}
            over = left == 0 or all(task.done() for task in tasks)
            if not failed and over:
                return [task.result() for task in tasks]
            explained = [rank for rank, error in failed.items() if not isinstance(error, RemoteError)]
            if explained or (failed and over):
                raise _of_rank((explained or list(failed))[0], len(tasks), failed)
            if failed and deadline is None:
                deadline = time.monotonic() + grace_seconds
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _of_rank(rank: int, count: int, failed: Mapping[int, BaseException]) -> BaseException:
    """The rank's error with its name on it; one that was raised on purpose says the same on every rank and stays as it is."""
    error = failed[rank]
    if isinstance(error, ProcessDied):
        return ProcessDied(f"learner rank {rank} of {count} died: {error}")
    return RemoteError(f"learner rank {rank} of {count}: {error}") if isinstance(error, RemoteError) else error

"""Adapters to generators: each generator has a delivery loop of its own that always takes the newest adapter.

Consumes: the newest published adapter. Produces: push reports, and each generator's SERVING / OUT phase.
Waits for: a newer adapter than the one its engine holds. Unblocked by: the learner loop publishing one.
The learner never waits here, and a slow or broken generator holds up no other.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ftb_llm.config import Config
from ftb_llm.errors import ProcessDied
from ftb_llm.ports import GeneratorPort
from ftb_llm.state import GeneratorPhase, GeneratorState
from ftb_llm.types import AdapterRef, PushReport

Emit = Callable[..., None]


class NewestAdapter:
    """The last published adapter. Readers that fall behind skip the ones in between."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._newest: tuple[AdapterRef, Any] | None = None

    async def publish(self, adapter: AdapterRef, payload: Any) -> None:
        async with self._changed:
            self._newest = (adapter, payload)
            self._changed.notify_all()

    async def newer_than(self, version: int) -> tuple[AdapterRef, Any]:
        async with self._changed:
            await self._changed.wait_for(lambda: self._newest is not None and self._newest[0].version > version)
            assert self._newest is not None
            return self._newest


async def deliver(
    port: GeneratorPort,
    state: GeneratorState,
    adapter: AdapterRef,
    payload: Any,
    *,
    timeout_seconds: float,
    emit: Emit,
) -> PushReport | None:
    """One push with its verdict written down. A failed one takes the generator out; None when there is no report.

    A push that takes too long goes on in its actor. Until it is answered nothing else is sent there: this call then waits
    for that answer, which counts however late it comes.
    """
    told = state.unanswered is not None and state.phase is GeneratorPhase.OUT
    if state.unanswered is None:
        state.unanswered = asyncio.create_task(_send(port, adapter, payload), name=f"push of version {adapter.version}")
    answer = state.unanswered
    await asyncio.wait({answer}, timeout=timeout_seconds)
    if not answer.done():
        if not told:
            limit = f"actors.push_timeout_seconds = {timeout_seconds:g}"
            _take_out(state, adapter, f"{answer.get_name()} took longer than {limit}", emit, same="late")
        return None
    state.unanswered = None
    try:
        report = answer.result()
    except ProcessDied as error:
        bury(state, error, emit)
        return None
    except Exception as error:  # noqa: BLE001 - the supervisor's boundary: whatever broke, this generator is out and the run goes on
        _take_out(state, adapter, f"{answer.get_name()} failed: {error}", emit, same=str(error))
        return None
    return _judged(state, adapter, report, emit)


async def _send(port: GeneratorPort, adapter: AdapterRef, payload: Any) -> PushReport:
    return await port.push(adapter, payload)


def _judged(state: GeneratorState, adapter: AdapterRef, report: PushReport, emit: Emit) -> PushReport:
    """The report may be of an older adapter than the one that is due, when it came late."""
    if not report.ok:
        problem = f"canary failed at version {report.version}: {report.problem}"
        _take_out(state, adapter, problem, emit, same=str(report.problem), **asdict(report))
        return report
    was_out = state.phase is GeneratorPhase.OUT
    state.version = report.version
    state.last_push = report
    state.enter(GeneratorPhase.SERVING)
    emit("push", f"{state.name} holds version {report.version} after a pause of {report.pause_ms:.0f} ms", **asdict(report))
    if was_out:
        emit("actor_back", f"{state.name} serves again, at version {report.version}", generator=state.name)
    return report


async def catch_up(
    port: GeneratorPort,
    state: GeneratorState,
    adapter: AdapterRef,
    payload: Any,
    *,
    timeout_seconds: float,
    emit: Emit,
) -> None:
    """Bring a generator to this adapter, after the answer to an earlier push where one is due; give up at the first failure."""
    while state.version < adapter.version and state.phase is not GeneratorPhase.DEAD:
        report = await deliver(port, state, adapter, payload, timeout_seconds=timeout_seconds, emit=emit)
        if report is None or not report.ok:
            return


async def abandon(state: GeneratorState) -> None:
    """Nobody waits for the answer to a push any more."""
    answer, state.unanswered = state.unanswered, None
    if answer is not None:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


def bury(state: GeneratorState, error: Exception, emit: Emit) -> None:
    """The generator is gone; the others go on."""
    if state.phase is not GeneratorPhase.DEAD:
        emit("actor_out", f"{state.name} died: {error}", generator=state.name)
    state.enter(GeneratorPhase.DEAD, str(error))


def _take_out(state: GeneratorState, adapter: AdapterRef, problem: str, emit: Emit, /, *, same: str, **details: Any) -> None:
    """Failures of one generator for the same reason count as equal, whichever version they are of."""
    told = {"generator": state.name, "version": adapter.version, **details}
    emit("push_failed", f"{state.name}: {problem}", same=f"{state.name}: {same}", **told)
    if state.phase not in (GeneratorPhase.OUT, GeneratorPhase.DEAD):
        emit(
            "actor_out",
            f"{state.name} is out until a push succeeds: {problem}",
            same=f"{state.name}: {same}",
            generator=state.name,
        )
    state.enter(GeneratorPhase.OUT, problem)


async def deliver_forever(port: GeneratorPort, state: GeneratorState, newest: NewestAdapter, config: Callable[[], Config], emit: Emit) -> None:
    """The delivery loop of one generator; a failed push is tried again with whatever is newest by then."""
    while state.phase is not GeneratorPhase.DEAD:
        adapter, payload = await newest.newer_than(state.version)
        actors = config().actors
        report = await deliver(port, state, adapter, payload, timeout_seconds=actors.push_timeout_seconds, emit=emit)
        if report is None or not report.ok:
            await asyncio.sleep(actors.push_retry_seconds)

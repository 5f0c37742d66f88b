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


async def deliver(port: GeneratorPort, state: GeneratorState, adapter: AdapterRef, payload: Any, *, timeout_seconds: float, emit: Emit) -> PushReport | None:
    """One push with its verdict written down. A failed one takes the generator out; None when there is no report."""
    try:
        async with asyncio.timeout(timeout_seconds):
            report = await port.push(adapter, payload)
    except TimeoutError:
        _take_out(state, adapter, f"push of version {adapter.version} took longer than actors.push_timeout_seconds = {timeout_seconds:g}", emit)
        return None
    except ProcessDied as error:
        bury(state, error, emit)
        return None
    except Exception as error:  # noqa: BLE001 - the supervisor's boundary: whatever broke, this generator is out and the run goes on
        _take_out(state, adapter, f"push of version {adapter.version} failed: {error}", emit)
        return None
    if not report.ok:
        _take_out(state, adapter, f"canary failed at version {adapter.version}: {report.problem}", emit, **asdict(report))
        return report
    was_out = state.phase is GeneratorPhase.OUT
    state.version = adapter.version
    state.last_push = report
    state.enter(GeneratorPhase.SERVING)
    emit("push", f"{state.name} holds version {adapter.version} after a pause of {report.pause_ms:.0f} ms", **asdict(report))
    if was_out:
        emit("actor_back", f"{state.name} serves again, at version {adapter.version}", generator=state.name)
    return report


def bury(state: GeneratorState, error: Exception, emit: Emit) -> None:
    """The generator is gone; the others go on."""
    if state.phase is not GeneratorPhase.DEAD:
        emit("actor_out", f"{state.name} died: {error}", generator=state.name)
    state.enter(GeneratorPhase.DEAD, str(error))


def _take_out(state: GeneratorState, adapter: AdapterRef, problem: str, emit: Emit, /, **details: Any) -> None:
    emit("push_failed", f"{state.name}: {problem}", **{"generator": state.name, "version": adapter.version, **details})
    if state.phase not in (GeneratorPhase.OUT, GeneratorPhase.DEAD):
        emit("actor_out", f"{state.name} is out until a push succeeds: {problem}", generator=state.name)
    state.enter(GeneratorPhase.OUT, problem)


async def deliver_forever(port: GeneratorPort, state: GeneratorState, newest: NewestAdapter, config: Callable[[], Config], emit: Emit) -> None:
    """The delivery loop of one generator; a failed push is tried again with whatever is newest by then."""
    while state.phase is not GeneratorPhase.DEAD:
        adapter, payload = await newest.newer_than(state.version)
        actors = config().actors
        report = await deliver(port, state, adapter, payload, timeout_seconds=actors.push_timeout_seconds, emit=emit)
        if report is None or not report.ok:
            await asyncio.sleep(actors.push_retry_seconds)

import asyncio

from ftb_llm.config import build_config
from ftb_llm.delivery import NewestAdapter, abandon, catch_up, deliver, deliver_forever
from ftb_llm.errors import ProcessDied
from ftb_llm.state import GeneratorPhase, GeneratorState
from tests.fakes import FakeGenerator, make_adapter


class Events:
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.messages: list[str] = []

    def __call__(self, kind: str, message: str, **details: object) -> None:
        self.kinds.append(kind)
        self.messages.append(message)


async def until(condition):
    """Let the loop run until the condition holds, within a bound."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition is somebody else's state
            await asyncio.sleep(0.001)


async def test_readers_that_fall_behind_get_the_newest_only():
    newest = NewestAdapter()
    await newest.publish(make_adapter(0), b"0")
    waiting = asyncio.ensure_future(newest.newer_than(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await newest.publish(make_adapter(4), b"4")
    await newest.publish(make_adapter(8), b"8")
    adapter, payload = await asyncio.wait_for(newest.newer_than(0), 1)
    assert (adapter.version, payload) == (8, b"8")
    assert (await waiting)[0].version == 8


async def test_a_good_push_puts_the_generator_into_service():
    state, events = GeneratorState(name="generator-0"), Events()
    report = await deliver(FakeGenerator(), state, make_adapter(3), b"", timeout_seconds=1, emit=events)
    assert report is not None and report.ok
    assert (state.phase, state.version, state.serving.is_set()) == (GeneratorPhase.SERVING, 3, True)
    assert events.kinds == ["push"]


async def test_a_failed_canary_takes_the_generator_out_until_a_push_succeeds():
    port, state, events, newest = FakeGenerator(bad_pushes=2), GeneratorState(name="generator-0"), Events(), NewestAdapter()
    config = build_config({"actors": {"push_retry_seconds": 0.1}})
    await newest.publish(make_adapter(4), b"")
    loop = asyncio.ensure_future(deliver_forever(port, state, newest, lambda: config, events))
    await until(lambda: state.phase is GeneratorPhase.OUT)
    assert not state.serving.is_set()
    assert "base model" in state.last_error
    await until(lambda: state.phase is GeneratorPhase.SERVING)
    loop.cancel()
    assert port.pushed == [4, 4, 4]
    assert events.kinds == ["push_failed", "actor_out", "push_failed", "push", "actor_back"]


async def test_a_push_that_hangs_is_given_up_and_named():
    class Hanging(FakeGenerator):
        async def push(self, adapter, payload):
            await asyncio.Event().wait()

    state, events = GeneratorState(name="generator-0"), Events()
    assert await deliver(Hanging(), state, make_adapter(1), b"", timeout_seconds=0.01, emit=events) is None
    assert state.phase is GeneratorPhase.OUT
    assert "actors.push_timeout_seconds = 0.01" in events.messages[0]
    await abandon(state)
    assert state.unanswered is None


class Slow(FakeGenerator):
    """Answers a push when it is let go, and counts how many it holds at once."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()
        self.held = 0
        self.most_held = 0
        self.fault: Exception | None = None

    async def push(self, adapter, payload):
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        await self.let_go.wait()
        self.held -= 1
        if self.fault is not None:
            raise self.fault
        return await super().push(adapter, payload)


async def test_no_push_is_sent_while_one_is_unanswered_and_its_late_success_counts():
    port, state, events, newest = Slow(), GeneratorState(name="generator-0"), Events(), NewestAdapter()
    await newest.publish(make_adapter(4), b"")
    for _ in range(50):
        assert await deliver(port, state, make_adapter(4), b"", timeout_seconds=0.001, emit=events) is None
    assert (port.most_held, state.phase) == (1, GeneratorPhase.OUT)
    assert events.kinds == ["push_failed", "actor_out"]

    await newest.publish(make_adapter(8), b"")
    loop = asyncio.ensure_future(deliver_forever(port, state, newest, lambda: build_config({}), events))
    port.let_go.set()
    await until(lambda: state.version == 8)
    loop.cancel()
    assert port.pushed == [4, 8] and port.most_held == 1
    assert events.kinds == ["push_failed", "actor_out", "push", "actor_back", "push"]


async def test_a_settings_change_can_not_pile_pushes_up():
    """The smallest timeout and retry that the config allows, against an actor that needs longer."""
    config = build_config({"actors": {"push_timeout_seconds": 1, "push_retry_seconds": 0.1}})
    port, state, events, newest = Slow(), GeneratorState(name="generator-0"), Events(), NewestAdapter()
    await newest.publish(make_adapter(4), b"")
    loop = asyncio.ensure_future(deliver_forever(port, state, newest, lambda: config, events))
    await asyncio.sleep(2.5)
    assert port.most_held == 1 and events.kinds == ["push_failed", "actor_out"]
    port.let_go.set()
    await until(lambda: state.phase is GeneratorPhase.SERVING)
    loop.cancel()
    assert port.pushed == [4]


async def test_a_late_failure_is_tried_again_and_a_late_death_is_one():
    port, state, events = Slow(), GeneratorState(name="generator-0"), Events()
    await deliver(port, state, make_adapter(4), b"", timeout_seconds=0.001, emit=events)
    port.fault = RuntimeError("no such engine")
    port.let_go.set()
    await deliver(port, state, make_adapter(8), b"", timeout_seconds=1, emit=events)
    assert "failed: no such engine" in events.messages[-1] and state.unanswered is None

    port.let_go.clear()
    await deliver(port, state, make_adapter(8), b"", timeout_seconds=0.001, emit=events)
    port.fault = ProcessDied("the actor is gone")
    port.let_go.set()
    await deliver(port, state, make_adapter(8), b"", timeout_seconds=1, emit=events)
    assert state.phase is GeneratorPhase.DEAD


async def test_catching_up_waits_for_the_answer_and_then_pushes_the_newest():
    port, state, events = Slow(), GeneratorState(name="generator-0"), Events()
    await deliver(port, state, make_adapter(4), b"", timeout_seconds=0.001, emit=events)
    port.let_go.set()
    await catch_up(port, state, make_adapter(8), b"", timeout_seconds=1, emit=events)
    assert (port.pushed, state.version) == ([4, 8], 8)


async def test_catching_up_ends_at_the_first_failure():
    port, state, events = FakeGenerator(bad_pushes=9), GeneratorState(name="generator-0"), Events()
    await catch_up(port, state, make_adapter(8), b"", timeout_seconds=1, emit=events)
    assert port.pushed == [8] and state.phase is GeneratorPhase.OUT


async def test_a_push_that_raises_is_named_and_tried_again():
    class Broken(FakeGenerator):
        async def push(self, adapter, payload):
            raise RuntimeError("no such engine")

    state, events = GeneratorState(name="generator-0"), Events()
    assert await deliver(Broken(), state, make_adapter(1), b"", timeout_seconds=1, emit=events) is None
    assert events.kinds == ["push_failed", "actor_out"] and "no such engine" in events.messages[0]


async def test_what_is_dead_wakes_up_who_waits_for_it_and_stays_dead():
    state = GeneratorState(name="generator-0")
    waiting = asyncio.ensure_future(state.serving.wait())
    await asyncio.sleep(0)
    state.enter(GeneratorPhase.DEAD, "gone")
    await asyncio.wait_for(waiting, 1)
    state.enter(GeneratorPhase.SERVING)
    assert state.phase is GeneratorPhase.DEAD

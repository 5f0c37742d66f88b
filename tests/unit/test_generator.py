"""The generator around a scripted engine: versions, pushes, verdicts, and what it refuses."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from actors.generator import Generator, engine_seed
from ftb_llm.config import build_config
from ftb_llm.errors import CheckpointError, EngineError, NotServing, RequestRefused, WrongState
from ftb_llm.types import AdapterRef, CanaryValue, Completion, FinishReason, Group, Prompt, SamplingSpec
from tests.fakes import make_request
from tests.tiny_llama import build

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
PAYLOAD = save({f"{MODULE}.lora_A.weight": torch.zeros(4, 16), f"{MODULE}.lora_B.weight": torch.ones(16, 4)})
DEADLINE = 10.0


class FakeEngine:
    """Holds a version. Its canary value is that of whatever was really `delivered`. `gate` holds samples back, `canary_gate` scores."""

    vocabulary_size = 71

    def __init__(self) -> None:
        self.version = 0
        self.canary = -3.0
        self.delivers = True
        self.swap_error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.canary_gate = asyncio.Event()
        self.canary_gate.set()
        self.started = 0
        self.swaps: list[tuple[bytes, float, int]] = []
        self.swapping = 0
        self.most_swapping = 0
        self.stopped = False

    async def sample(self, prompt_ids: Sequence[int], spec: SamplingSpec, *, ignore_eos: bool = False) -> tuple[Completion, ...]:
        first, self.started = self.version, self.started + 1
        await asyncio.sleep(0)
        await self.gate.wait()
        length = spec.max_tokens if ignore_eos else 2
        one = Completion(token_ids=tuple(range(length)), text="a", finish_reason=FinishReason.STOP, logprob=-1.0, min_version=first, max_version=self.version)
        return (one,) * spec.group_size

    async def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
        await self.canary_gate.wait()
        return self.canary

    async def name_version(self, version: int) -> None:
        self.version = version

    async def swap(self, adapter: Path, scale: float, version: int) -> float:
        self.swapping += 1
        self.most_swapping = max(self.most_swapping, self.swapping)
        await asyncio.sleep(0)
        self.swaps.append((adapter.read_bytes(), scale, version))  # noqa: ASYNC240
        self.swapping -= 1
        if self.swap_error is not None:
            raise self.swap_error
        self.version = version
        if self.delivers:
            self.canary = -2.0
        return 5.0

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def generator(engine: FakeEngine, model_path: Path) -> AsyncIterator[Generator]:
    config = build_config({"actors": {"max_model_len": 32, "groups_in_flight": 2}, "sampling": {"max_tokens": 4, "group_size": 2}})
    generator = Generator(config, name="generator-0", model_path=model_path, engine=engine)
    await generator.start()
    yield generator
    await generator.stop()


def adapter(version: int, **changes: Any) -> AdapterRef:
    canary = CanaryValue(prompt_ids=(1,), completion_ids=(2, 3), adapted=-2.0, base=-3.0)
    ref = AdapterRef(version=version, path="", sha256=hashlib.sha256(PAYLOAD).hexdigest(), byte_count=len(PAYLOAD), scale=2.0, canary=canary)
    return replace(ref, **changes)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  the fakes know no events
            await asyncio.sleep(0)


async def test_group_carries_the_request_and_what_the_engine_said(generator: Generator) -> None:
    request = make_request(7, size=3)
    group = await generator.generate(request)
    assert isinstance(group, Group)
    assert (group.id, group.prompt, group.generator) == ("g000000007", request.prompt, "generator-0")
    assert len(group.completions) == 3
    assert (group.min_version, group.max_version) == (0, 0)
    info = await generator.info()
    assert (info["completions"], info["tokens"], info["version"]) == (3, 6, 0)
    assert info["rss_bytes"] > 0


async def test_push_hands_the_bytes_to_the_engine_and_reports(generator: Generator, engine: FakeEngine) -> None:
    report = await generator.push(adapter(12), PAYLOAD)
    assert report.ok
    assert report.problem is None
    assert engine.swaps == [(PAYLOAD, 2.0, 12)]
    assert (report.generator, report.version, report.byte_count, report.pause_ms) == ("generator-0", 12, len(PAYLOAD), 5.0)
    assert (report.canary_engine, report.canary_learner, report.canary_base) == (-2.0, -2.0, -3.0)
    assert (await generator.generate(make_request())).min_version == 12


async def test_group_in_flight_over_a_push_spans_both_versions(generator: Generator, engine: FakeEngine) -> None:
    engine.gate.clear()
    under_way = asyncio.create_task(generator.generate(make_request()))
    await until(lambda: engine.started == 3)  # two of the warm-up
    await generator.push(adapter(3), PAYLOAD)
    engine.gate.set()
    group = await under_way
    assert (group.min_version, group.max_version) == (0, 3)


async def test_no_group_of_a_new_version_leaves_before_its_canary(generator: Generator, engine: FakeEngine) -> None:
    engine.canary_gate.clear()
    push = asyncio.create_task(generator.push(adapter(1), PAYLOAD))
    await until(lambda: engine.version == 1)
    group = asyncio.create_task(generator.generate(make_request()))
    await until(lambda: engine.started == 3)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not group.done()
    engine.canary_gate.set()
    assert (await push).ok
    assert (await group).min_version == 1


async def test_undelivered_adapter_takes_the_generator_out_until_a_push_succeeds(generator: Generator, engine: FakeEngine) -> None:
    engine.delivers = False
    report = await generator.push(adapter(1), PAYLOAD)
    assert not report.ok
    assert report.problem is not None
    assert "adapter was not delivered" in report.problem
    with pytest.raises(NotServing, match=r"generator-0 serves nothing until a push succeeds: adapter was not delivered"):
        await generator.generate(make_request())
    assert (await generator.info())["version"] == 0
    engine.delivers = True
    assert (await generator.push(adapter(2), PAYLOAD)).ok
    assert (await generator.generate(make_request())).min_version == 2


async def test_group_in_flight_over_a_failed_push_is_dropped(generator: Generator, engine: FakeEngine) -> None:
    engine.gate.clear()
    under_way = asyncio.create_task(generator.generate(make_request()))
    await until(lambda: engine.started == 3)
    engine.delivers = False
    assert not (await generator.push(adapter(1), PAYLOAD)).ok
    engine.delivers = True
    assert (await generator.push(adapter(2), PAYLOAD)).ok  # even when the generator is back before the group ends
    engine.gate.set()
    with pytest.raises(NotServing, match="a push failed while it was in flight"):
        await under_way


async def test_swap_that_breaks_takes_the_generator_out(generator: Generator, engine: FakeEngine) -> None:
    engine.swap_error = EngineError("the engine failed: no memory")
    with pytest.raises(EngineError, match="no memory"):
        await generator.push(adapter(1), PAYLOAD)
    with pytest.raises(NotServing, match="push of version 1 broke off"):
        await generator.generate(make_request())
    engine.swap_error = None
    assert (await generator.push(adapter(1), PAYLOAD)).ok


async def test_cancelled_push_takes_the_generator_out_and_frees_the_waiting(generator: Generator, engine: FakeEngine) -> None:
    engine.canary_gate.clear()
    push = asyncio.create_task(generator.push(adapter(1), PAYLOAD))
    await until(lambda: engine.version == 1)
    group = asyncio.create_task(generator.generate(make_request()))
    await until(lambda: engine.started == 3)
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    with pytest.raises(NotServing):
        await asyncio.wait_for(group, DEADLINE)
    engine.canary_gate.set()
    assert (await generator.push(adapter(2), PAYLOAD)).ok


async def test_damaged_payload_changes_nothing(generator: Generator, engine: FakeEngine) -> None:
    with pytest.raises(CheckpointError, match="adapter of version 1 arrived damaged"):
        await generator.push(adapter(1), PAYLOAD[:-1] + b"x")
    assert engine.swaps == []
    assert (await generator.generate(make_request())).max_version == 0


async def test_adapter_that_fits_no_weight_changes_nothing(generator: Generator, engine: FakeEngine) -> None:
    payload = save({f"{MODULE}x.lora_A.weight": torch.zeros(4, 16), f"{MODULE}x.lora_B.weight": torch.ones(16, 4)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_projx\.weight, which base model .* does not have"):
        await generator.push(adapter(1, sha256=hashlib.sha256(payload).hexdigest()), payload)
    assert engine.swaps == []
    assert (await generator.generate(make_request())).max_version == 0


async def test_pushes_wait_for_each_other(generator: Generator, engine: FakeEngine) -> None:
    reports = await asyncio.gather(*(generator.push(adapter(version), PAYLOAD) for version in (1, 2, 3)))
    assert [report.version for report in reports] == [1, 2, 3]
    assert engine.most_swapping == 1
    assert engine.version == 3


async def test_prompt_that_leaves_no_room_is_refused_with_the_key(generator: Generator) -> None:
    request = make_request()
    long = Prompt(index=5, text="", token_ids=tuple(range(29)))
    with pytest.raises(RequestRefused, match=r"actors\.max_model_len 32 is too short for prompt 5 of 29 tokens .* at least 33"):
        await generator.generate(replace(request, prompt=long))


async def test_speed_is_tokens_per_second_of_the_fixed_workload(generator: Generator, engine: FakeEngine) -> None:
    before = engine.started
    assert await generator.measure_speed(seconds=0.0) > 0
    assert engine.started - before == 2  # one window of the groups in flight, however short the time


async def test_stop_leaves_nothing(engine: FakeEngine, model_path: Path) -> None:
    generator = Generator(build_config({}), name="generator-0", model_path=model_path, engine=engine)
    await generator.start()
    scratch = generator._scratch
    assert scratch is not None
    await generator.push(adapter(1), PAYLOAD)
    assert list(scratch.iterdir()) == []
    await generator.stop()
    assert engine.stopped
    assert not scratch.exists()
    for call in (generator.generate(make_request()), generator.push(adapter(2), PAYLOAD), generator.measure_speed(), generator.score([1], [2])):
        with pytest.raises(WrongState, match="generator-0 is not running"):
            await call
    await generator.stop()  # a second time is fine


def test_generators_draw_from_seeds_of_their_own() -> None:
    seeds = [engine_seed(run, f"generator-{index}") for run in range(3) for index in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == engine_seed(0, "generator-0")

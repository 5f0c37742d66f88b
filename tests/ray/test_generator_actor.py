"""The generator as it really runs: vLLM in a Ray actor, its samples and pushes compared with transformers and PEFT."""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import ray
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from actors.ray_actor import GeneratorActor
from ftb_llm.config import Config, build_config
from ftb_llm.errors import CheckpointError, NotServing, ProcessDied, RequestRefused
from ftb_llm.remote import RemoteGenerator, running_ray
from ftb_llm.types import AdapterRef, CanaryValue, FinishReason, Group, GroupRequest, Prompt, SamplingSpec
from tests.tiny_llama import build

# One event loop for the module: the engine takes some ten seconds to start, so the tests share one.
pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

CANARY = ((5, 6, 7, 8), (9, 10, 11, 12, 13, 14))
SCALE = 2.0
DEADLINE = 60.0
END = 0


def config() -> Config:
    actors = {"max_model_len": 64, "groups_in_flight": 4, "kv_cache_gib": 0.125}
    return build_config({"actors": actors, "sampling": {"max_tokens": 8, "group_size": 16}})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=96)  # heads of 32, which vLLM's CPU attention has


@pytest.fixture(scope="module")
def adapters(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that change the model a lot."""
    folders = []
    for seed in (1, 2):
        lora = LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(LlamaForCausalLM.from_pretrained(model_path), lora)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.4)
        folders.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        model.save_pretrained(folders[-1])
    return folders


def logprobs(model_path: Path, adapter: Path | None, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[float]:
    """Summed log-probs of completions after prompts, by transformers and PEFT, unmerged."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    values = []
    with torch.no_grad():
        for prompt, completion in pairs:
            logp_TV = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            values.append(logp_TV.gather(1, torch.tensor(completion)[:, None]).sum().item())
    return values


def published(model_path: Path, folder: Path, version: int) -> tuple[AdapterRef, bytes]:
    payload = (folder / "adapter_model.safetensors").read_bytes()
    (adapted,), (base,) = logprobs(model_path, folder, [CANARY]), logprobs(model_path, None, [CANARY])
    canary = CanaryValue(prompt_ids=CANARY[0], completion_ids=CANARY[1], adapted=adapted, base=base)
    digest = hashlib.sha256(payload).hexdigest()
    return AdapterRef(version=version, path=str(folder), sha256=digest, byte_count=len(payload), scale=SCALE, canary=canary), payload


def engine_of(actor: psutil.Process) -> psutil.Process:
    """The child that holds the model. Its name tells nothing: whether a process can rename itself depends on its environment."""
    engine = max(actor.children(), key=lambda process: process.memory_info().rss)
    assert engine.memory_info().rss > 200 * 2**20
    return engine


def request(number: int, *, max_tokens: int = 8, temperature: float = 1.0) -> GroupRequest:
    prompt = Prompt(index=number, text="", token_ids=(5 + number, 6, 7))
    return GroupRequest(
        group_id=f"g{number:09d}",
        prompt=prompt,
        sampling=SamplingSpec(group_size=16, temperature=temperature, top_p=1.0, max_tokens=max_tokens),
    )


def largest_difference(model_path: Path, adapter: Path | None, groups: list[Group]) -> float:
    pairs = [(group.prompt.token_ids, completion.token_ids) for group in groups for completion in group.completions]
    engine = [completion.logprob for group in groups for completion in group.completions]
    return max(abs(a - b) for a, b in zip(engine, logprobs(model_path, adapter, pairs), strict=True))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with running_ray():
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def generator(model_path: Path) -> AsyncIterator[RemoteGenerator]:
    remote = RemoteGenerator("generator-0", GeneratorActor.options(num_cpus=1).remote(config(), name="generator-0", model_path=model_path))  # type: ignore[attr-defined]
    facts = await remote.start()
    assert facts["version"] == 0
    yield remote
    await remote.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  other processes set no events
            await asyncio.sleep(0.05)


async def test_base_samples_have_the_log_probs_that_transformers_gives(generator: RemoteGenerator, model_path: Path) -> None:
    groups = await asyncio.gather(*(generator.generate(request(number)) for number in range(6)))
    assert largest_difference(model_path, None, groups) < 1e-4
    for completion in (completion for group in groups for completion in group.completions):
        assert (completion.min_version, completion.max_version) == (0, 0)
        ended = completion.token_ids[-1] == END
        assert completion.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(completion.token_ids) == 8
        assert END not in completion.token_ids[:-1]
    finishes = {completion.finish_reason for group in groups for completion in group.completions}
    assert finishes == {FinishReason.STOP, FinishReason.LENGTH}  # otherwise half of the above was not tried


async def test_log_probs_are_the_models_own_at_any_temperature(generator: RemoteGenerator, model_path: Path) -> None:
    groups = [await generator.generate(request(1, temperature=1.7))]
    assert largest_difference(model_path, None, groups) < 1e-4


async def test_groups_of_one_prompt_are_sampled_independently(generator: RemoteGenerator) -> None:
    groups = await asyncio.gather(*(generator.generate(request(3)) for _ in range(4)))
    seen = [completion.token_ids for group in groups for completion in group.completions]
    # A random model over a hundred words: equal samples of eight tokens mean that random numbers were used twice.
    assert len([ids for ids in seen if len(ids) == 8]) == len({ids for ids in seen if len(ids) == 8})


async def test_pushes_with_groups_in_flight_deliver_the_adapter(generator: RemoteGenerator, model_path: Path, adapters: list[Path]) -> None:
    async def keep_busy(number: int) -> list[Group]:
        groups = []
        while not done.is_set():
            groups.append(await generator.generate(request(number, max_tokens=48)))
        return groups

    done = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(keep_busy(number)) for number in range(4)]
        for version, folder in ((4, adapters[0]), (9, adapters[1]), (12, adapters[0])):
            adapter, payload = published(model_path, folder, version)
            report = await generator.push(adapter, ray.put(payload))
            assert report.ok, report.problem
            assert abs(report.canary_engine - adapter.canary.adapted) < 1e-4
            assert abs(adapter.canary.adapted - adapter.canary.base) > 0.1  # or else the canary would have told nothing
            assert 0 < report.pause_ms < report.total_ms
            assert report.byte_count == len(payload)
        done.set()
    groups = [group for worker in workers for group in worker.result()]
    assert any(completion.min_version < completion.max_version for group in groups for completion in group.completions)
    assert {completion.max_version for group in groups for completion in group.completions} >= {4, 9, 12}

    fresh = await asyncio.gather(*(generator.generate(request(number)) for number in range(6)))
    assert {(group.min_version, group.max_version) for group in fresh} == {(12, 12)}
    assert largest_difference(model_path, adapters[0], list(fresh)) < 1e-4
    assert largest_difference(model_path, None, list(fresh)) > 0.1


async def test_damaged_payload_is_refused_and_the_old_policy_goes_on(generator: RemoteGenerator, model_path: Path, adapters: list[Path]) -> None:
    before = (await generator.info())["version"]
    adapter, payload = published(model_path, adapters[1], 20)
    with pytest.raises(CheckpointError, match="arrived damaged"):
        await generator.push(adapter, ray.put(payload[:-1] + b"\x01"))
    assert (await generator.generate(request(0))).max_version == before


async def test_failed_canary_takes_the_generator_out_until_a_good_push(generator: RemoteGenerator, model_path: Path, adapters: list[Path]) -> None:
    base, _ = published(model_path, adapters[0], 21)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(adapters[0] / "adapter_model.safetensors").items()}
    nothing = save(zeros)  # an adapter that arrives as nothing, while the learner speaks of a real one
    lying = replace(base, sha256=hashlib.sha256(nothing).hexdigest())
    report = await generator.push(lying, ray.put(nothing))
    assert not report.ok
    assert "adapter was not delivered" in str(report.problem)
    with pytest.raises(NotServing, match="serves nothing until a push succeeds"):
        await generator.generate(request(0))
    good, payload = published(model_path, adapters[1], 22)
    assert (await generator.push(good, ray.put(payload))).ok
    group = await generator.generate(request(0))
    assert group.min_version == 22
    assert largest_difference(model_path, adapters[1], [group]) < 1e-4


async def test_request_that_vllm_refuses_is_our_error(generator: RemoteGenerator) -> None:
    with pytest.raises(RequestRefused, match="refused a request: temperature must be"):
        await generator.generate(request(0, temperature=5.0))


async def test_driver_needs_no_vllm(generator: RemoteGenerator) -> None:
    assert await generator.measure_speed() > 0
    assert "vllm" not in sys.modules


async def test_dead_engine_is_an_error_and_never_a_hang(generator: RemoteGenerator, model_path: Path, adapters: list[Path]) -> None:
    """The last test of the shared engine: it kills it under a group and asks for more."""
    actor = psutil.Process((await generator.info())["pid"])
    engine = engine_of(actor)
    under_way = asyncio.create_task(generator.generate(request(0, max_tokens=60)))
    await asyncio.sleep(0)
    engine.kill()
    async with asyncio.timeout(DEADLINE):
        results = await asyncio.gather(under_way, return_exceptions=True)
        assert isinstance(results[0], ProcessDied | Group)  # it may have been quicker
        await until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
        with pytest.raises(ProcessDied, match="the engine process died"):
            await generator.generate(request(1))
        adapter, payload = published(model_path, adapters[0], 30)
        with pytest.raises(ProcessDied, match="the engine process died"):
            await generator.push(adapter, ray.put(payload))


async def test_stop_leaves_no_process(model_path: Path) -> None:
    remote = RemoteGenerator("generator-1", GeneratorActor.options(num_cpus=1).remote(config(), name="generator-1", model_path=model_path))  # type: ignore[attr-defined]
    await remote.start()
    actor = psutil.Process((await remote.info())["pid"])
    family = [actor, *actor.children(recursive=True)]
    assert engine_of(actor) in family
    await remote.stop()
    await until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family))

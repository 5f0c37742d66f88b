"""What the engine is told, without starting one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.engine import SPARE_SEQUENCES, Engine, engine_environment, engine_settings, start_engine
from ftb_llm.config import build_config
from ftb_llm.errors import EngineError, ProcessDied, SetupError
from ftb_llm.types import FinishReason, SamplingSpec


def test_cpu_engine_gets_its_cores_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    environment = engine_environment(build_config({"actors": {"cpus_each": 3.5}}), Path("/scratch"))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert {environment[name] for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")} == {"1"}
    assert environment["VLLM_LOGGING_LEVEL"] == "ERROR"


def test_log_level_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert engine_environment(build_config({}), Path("/scratch"))["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_gpu_engine_keeps_its_own_threads_and_processes() -> None:
    environment = engine_environment(build_config({"actors": {"gpus_each": 1.0}}), Path("/scratch"))
    assert not {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"} & set(environment)


def test_settings_of_a_cpu_engine() -> None:
    actors = {"groups_in_flight": 4, "kv_cache_gib": 0.25, "max_model_len": 128}
    settings = engine_settings(build_config({"actors": actors, "sampling": {"group_size": 16, "max_tokens": 8}}), Path("/models/tiny"), seed=5)
    assert settings["model"] == "/models/tiny"
    assert settings["max_num_seqs"] == 4 * 16 + SPARE_SEQUENCES
    assert settings["kv_cache_memory_bytes"] == 2**28
    assert settings["max_model_len"] == 128
    assert settings["seed"] == 5
    assert settings["logprobs_mode"] == "raw_logprobs"
    assert "gpu_memory_utilization" not in settings


def test_settings_of_a_gpu_engine() -> None:
    settings = engine_settings(build_config({"actors": {"gpus_each": 2.0, "gpu_memory_utilization": 0.5}}), Path("/models/large"), seed=5)
    assert settings["gpu_memory_utilization"] == 0.5
    assert settings["tensor_parallel_size"] == 2
    assert "kv_cache_memory_bytes" not in settings


def test_model_folder_without_a_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"model\.path: .* has no config\.json"):
        start_engine(build_config({}), tmp_path, seed=0, scratch=tmp_path)


class FakeModelConfig:
    def get_vocab_size(self) -> int:
        return 71


class DyingLlm:
    """vLLM's client as it behaves when the engine process dies under a call: the call is never answered."""

    def __init__(self) -> None:
        self.errored = False
        self.model_config = FakeModelConfig()

    def get_tokenizer(self) -> Any:
        return None

    async def update_weight_version(self, version: str) -> None:
        self.errored = True
        await asyncio.Event().wait()


class RefusingLlm(DyingLlm):
    async def update_weight_version(self, version: str) -> None:
        raise LookupError("no such method")


async def test_call_that_the_dead_engine_never_answers_is_an_error() -> None:
    with pytest.raises(ProcessDied, match="the engine process died"):
        await Engine(DyingLlm(), Path()).name_version(1)  # type: ignore[arg-type]


async def test_failure_inside_the_engine_arrives_as_an_engine_error() -> None:
    with pytest.raises(EngineError, match="the engine failed: no such method"):
        await Engine(RefusingLlm(), Path()).name_version(1)  # type: ignore[arg-type]


class FakeTokenizer:
    def batch_decode(self, ids: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


class SamplingLlm(DyingLlm):
    """Answers every request with the same two completions, in vLLM's own words; a position may name other tokens beside the sampled one."""

    def get_tokenizer(self) -> Any:
        return FakeTokenizer()

    async def generate(self, prompt: Any, sampling: Any, request_id: str) -> AsyncIterator[Any]:
        self.sampling = sampling
        spans = [SimpleNamespace(version="3"), SimpleNamespace(version="4")]
        ended = {"finish_reason": "stop", "cumulative_logprob": -1.75, "weight_versions": spans}
        cut = {"finish_reason": "length", "cumulative_logprob": -0.5, "weight_versions": spans[:1]}
        outputs = [
            SimpleNamespace(index=1, token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-0.5)}], **cut),
            SimpleNamespace(
                index=0,
                token_ids=[7, 2],
                logprobs=[{9: SimpleNamespace(logprob=-0.1), 7: SimpleNamespace(logprob=-1.5)}, {2: SimpleNamespace(logprob=-0.25)}],
                **ended,
            ),
        ]
        yield SimpleNamespace(finished=True, outputs=outputs)


@pytest.mark.parametrize(("wanted", "expected"), [(True, [(-1.5, -0.25), (-0.5,)]), (False, [None, None])])
async def test_log_probs_of_the_sampled_tokens_come_where_they_are_wanted(wanted: bool, expected: list[Any]) -> None:
    llm = SamplingLlm()
    spec = SamplingSpec(group_size=2, temperature=1.0, top_p=1.0, max_tokens=4, token_logprobs=wanted)
    completions = await Engine(llm, Path()).sample([1], spec)  # type: ignore[arg-type]
    assert [completion.token_logprobs for completion in completions] == expected
    assert [completion.logprob for completion in completions] == [-1.75, -0.5]
    assert [completion.finish_reason for completion in completions] == [FinishReason.STOP, FinishReason.LENGTH]
    assert [(completion.min_version, completion.max_version) for completion in completions] == [(3, 4), (3, 3)]
    assert (llm.sampling.n, llm.sampling.logprobs) == (2, 0)

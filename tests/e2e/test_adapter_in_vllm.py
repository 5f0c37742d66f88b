"""What a run exports, in a real vLLM that knows nothing of us: adapters by LoRARequest, a merged model by its path.

Tokens are sampled rather than prompts scored: on a CPU, vLLM 0.32 with LoRA enabled fails at `prompt_logprobs`, whatever the adapter.
"""

import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from actors.engine import QUIET_AND_OFFLINE
from actors.merge import check_adapter, merged_weights
from ftb_llm.export import export_adapter, export_merged
from ftb_llm.run_dir import RunDir
from learner.learner import Learner
from learner.packing import pack
from tests import tiny_llama
from tests.fakes import FakeProgress

PROMPTS = [[5, 6, 7, 8], [11, 12], [3, 60, 61, 62, 20]]
LORAS: list[dict[str, Any]] = [{}, {"rslora": True}, {"targets": ["all-linear", "lm_head"], "rslora": True}, {"targets": ["lm_head"]}]
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
Sampled = list[tuple[list[int], float]]  # tokens and their summed log-prob, per prompt


def sample(model: Path, adapters: list[Path]) -> list[Sampled]:
    """By vLLM, with each of the adapters in turn, or with the model alone when there are none."""
    os.environ |= QUIET_AND_OFFLINE | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8} if adapters else {}
    engine = LLM(model=str(model), dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=2**27, **lora)
    params = SamplingParams(max_tokens=8, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    requests = [LoRARequest(adapter.parent.parent.name, number, str(adapter)) for number, adapter in enumerate(adapters, start=1)] or [None]
    answers = [engine.generate(prompts, params, lora_request=request, use_tqdm=False) for request in requests]
    return [[(list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob) for output in outputs] for outputs in answers]


def in_vllm(model: Path, adapters: list[Path] | None = None) -> list[Sampled]:
    """In a process of its own: an engine changes the one it starts in."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(sample, model, adapters or []).result(timeout=240)


def check(learner: Learner, sampled: Sampled) -> None:
    """The learner gives the engine's tokens the engine's log-prob, and its base model another."""
    batch = pack(PROMPTS, [[tokens] for tokens, _ in sampled])
    engine = torch.tensor([logprob for _, logprob in sampled])
    with torch.no_grad():
        torch.testing.assert_close(learner._model.scorer.completion_logprobs(batch).flatten(), engine, rtol=0, atol=1e-4)
        with learner._model.as_reference():
            assert (learner._model.scorer.completion_logprobs(batch).flatten() - engine).abs().max().item() > 0.05


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=96)  # heads of 32, which vLLM's CPU attention has


@pytest.fixture(scope="module")
def qwen2(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a family whose head vLLM gives no LoRA."""
    shape = {name: getattr(AutoConfig.from_pretrained(base), name) for name in SHAPE}
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("qwen2"), dirs_exist_ok=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, lora: dict[str, Any]) -> tuple[Path, Learner]:
    config = tiny_llama.tiny_config(model={"path": str(base), "lora": {"rank": 4, "alpha": 6.0} | lora})
    run = RunDir.create(folder)
    run.write_json("config.json", config.model_dump(mode="json"))
    learner = Learner(config, model_path=base, run_dir=folder, prompts=tiny_llama.PROMPTS, task_name=None)
    for step in range(1, 4):
        learner.step(tiny_llama.step_request(step))
    learner.publish(3)
    return folder, learner


def test_vllm_samples_from_the_learners_policy_through_its_exported_adapters(base: Path, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{number}", base, lora) for number, lora in enumerate(LORAS)]
    adapters = [export_adapter(run, None, None).path for run, _ in runs]
    for (_, learner), sampled in zip(runs, in_vllm(base, adapters), strict=True):
        check(learner, sampled)


def test_a_head_that_vllm_gives_no_lora_is_served_merged(qwen2: Path, tmp_path: Path) -> None:
    run, learner = make_run(tmp_path / "run", qwen2, {"targets": ["all-linear", "lm_head"]})
    with pytest.raises(ValueError, match=r"expected target modules in .* but received .*lm_head"):
        in_vllm(qwen2, [export_adapter(run, None, None).path])
    exported = export_merged(run, None, None, progress=FakeProgress(), merge=merged_weights, check=check_adapter)
    (sampled,) = in_vllm(exported.path)
    check(learner, sampled)

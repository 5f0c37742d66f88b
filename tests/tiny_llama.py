"""A random Llama of a few thousand parameters, and groups for it: what the learner's tests train."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftb_llm.config import Config, build_config
from ftb_llm.tasks import get_task
from ftb_llm.tasks.tokenizer import build_tokenizer
from ftb_llm.types import Completion, FinishReason, Group, ObjectiveSpec, Prompt, ScoredGroup, StepReport, StepRequest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
PROMPTS = [Prompt(index=index, text=f"p{index}", token_ids=tuple(range(5, 7 + index))) for index in range(4)]  # of different lengths
GROUP_SIZE = 6
RUN = {"run": {"seed": 3}, "model": {"lora": {"rank": 4, "alpha": 8.0}}, "learner": {"groups_per_step": 4, "micro_batch_tokens": 1000}}


def tiny_config(**sections: dict[str, Any]) -> Config:
    return build_config(RUN | sections)


def build(folder: Path, **changes: Any) -> Path:
    """Save the model and a tokenizer that knows the hypergrid's words."""
    tokenizer = build_tokenizer(get_task("hypergrid"))
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scored_group(seed: int, *, group_size: int = GROUP_SIZE) -> ScoredGroup:
    """Random completions of one to four tokens, with random rewards and engine log-probs."""
    generator = torch.Generator().manual_seed(seed)

    def completion() -> Completion:
        length = int(torch.randint(1, 5, (), generator=generator))
        ids = tuple(torch.randint(1, 71, (length,), generator=generator).tolist())
        return Completion(token_ids=ids, text="", finish_reason=FinishReason.STOP, logprob=-4.0 * length, min_version=0, max_version=0)

    completions = tuple(completion() for _ in range(group_size))
    group = Group(id=f"g{seed}", prompt=PROMPTS[seed % len(PROMPTS)], completions=completions, generator="generator-0", generate_seconds=0.1)
    return ScoredGroup(group=group, rewards=tuple(torch.rand(group_size, generator=generator).tolist()))


def step_request(step: int, *, seeds: tuple[int, ...] = (0, 1, 2, 3), divergence: str = "reverse_kl", **changes: Any) -> StepRequest:
    values: dict[str, Any] = {
        "step": step,
        "config_version": 1,
        "objective": ObjectiveSpec(kind="ftb", divergence=divergence, alpha=None, beta=0.5, tempered=False),
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "groups": tuple(scored_group(seed) for seed in seeds),
    }
    return StepRequest(**values | changes)


def untimed(report: StepReport) -> StepReport:
    """The report without its clock: what two equal steps have in common."""
    return replace(report, metrics={name: value for name, value in report.metrics.items() if not name.startswith("time/")})

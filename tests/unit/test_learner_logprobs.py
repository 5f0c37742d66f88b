import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from learner.logprobs import Scorer
from learner.packing import pack
from tests import tiny_llama

PROMPTS = [[5, 6], [9, 8, 7, 6, 5], [3, 1], [3]]
COMPLETIONS = [[[4, 2, 0], [7, 0]], [[1], [60, 61, 62, 63]], [[2, 2, 2], [0]], [[1], [2]]]
SHAPE: dict[str, Any] = {
    "vocab_size": 71,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
PACKED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE)),
    "mistral, long window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=128)),
}
NOT_PACKED = {
    "mistral, short window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gemma2, capped logits": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=1.0)),
}


def made(make: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def one_at_a_time(model: PreTrainedModel) -> Tensor:
    """Without padding, batching or cache: the whole sequence through the model, log-softmax, sum."""
    rows = []
    for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in completions:
            logp = torch.log_softmax(model(torch.tensor([prompt + completion]), use_cache=False).logits[0].double(), -1)
            rows.append(sum(logp[len(prompt) - 1 + place, token] for place, token in enumerate(completion)))
    return torch.stack(rows).view(len(PROMPTS), -1)


def value_and_gradient(logp_GK: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """With weights of both signs, as the loss has them; the gradient as one vector."""
    weights = torch.linspace(-1, 1, logp_GK.numel(), dtype=logp_GK.dtype).view_as(logp_GK)
    gradients = torch.autograd.grad((weights * logp_GK).sum(), list(model.parameters()))
    return logp_GK.detach().double(), torch.cat([part.double().flatten() for part in gradients])


@pytest.mark.parametrize("name", [*PACKED, *NOT_PACKED])
def test_value_and_gradient_are_exact(name: str) -> None:
    """In float32 against one sequence at a time in float64: 1e-6 relative, or as near as one sequence at a time in float32 comes."""
    model = made((PACKED | NOT_PACKED)[name])
    exact = copy.deepcopy(model).double()
    expected = value_and_gradient(one_at_a_time(exact), exact)
    naive = value_and_gradient(one_at_a_time(model), model)
    scorer = Scorer(model, longest=64)
    assert scorer.packed is (name in PACKED)
    got = value_and_gradient(scorer.completion_logprobs(pack(PROMPTS, COMPLETIONS)), model)
    for a, b, plain in zip(got, expected, naive, strict=True):
        assert (a - b).norm() <= max(1e-6 * b.norm(), 1.5 * (plain - b).norm())


def test_recomputing_activations_changes_nothing() -> None:
    batch = pack(PROMPTS, COMPLETIONS)
    plain, recomputing = made(PACKED["qwen2"]), made(PACKED["qwen2"])
    saved: dict[bool, int] = {}
    results = []
    for model, recompute in ((plain, False), (recomputing, True)):
        scorer = Scorer(model, longest=64, recompute=recompute)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor.nelement()) or tensor, lambda tensor: tensor):
            logp_GK = scorer.completion_logprobs(batch)
        saved[recompute] = sum(kept)
        results.append(value_and_gradient(logp_GK, model))
    torch.testing.assert_close(results[0], results[1])
    assert saved[True] < 0.5 * saved[False]


def test_a_model_that_goes_its_own_way_is_found_out() -> None:
    """GPT-2's attention is not asked for a shared prefix by this head; whatever way is taken, the numbers are the model's."""
    model = made(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=71, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)))
    got = Scorer(model, longest=64).completion_logprobs(pack(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(got, one_at_a_time(model).float(), rtol=1e-5, atol=1e-5)


def test_what_is_computed() -> None:
    """Packed, the row and its padding; otherwise a row for every completion, as long as the longest."""
    batch = pack(PROMPTS, COMPLETIONS)
    packed, plain = (Scorer(made(make), longest=64) for make in (PACKED["llama"], NOT_PACKED["gemma2, capped logits"]))
    assert packed.computed_places(batch) == len(batch.ids_N) + batch.padding
    assert plain.computed_places(batch) == 8 * (5 + 4 - 1)


def test_one_token_completions_need_the_prompt_pass_only(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    batch = pack([[5, 6], [7]], [[[3], [4]], [[5], [6]]])
    assert batch.ids_N.tolist() == [5, 6, 7]
    got = Scorer(model, longest=64).completion_logprobs(batch)
    total = torch.stack([torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1) for ids in ([5, 6], [7])])
    torch.testing.assert_close(got, torch.stack([total[0, 3:5], total[1, 5:7]]), rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_continuations_sum_to_one(llama: Path) -> None:
    every = [[first, second] for first in range(71) for second in range(71)]
    scorer = Scorer(LlamaForCausalLM.from_pretrained(llama).eval(), longest=64)
    assert scorer.completion_logprobs(pack([[5, 6, 7]], [every])).double().exp().sum().item() == pytest.approx(1, abs=1e-5)

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.logprobs import completion_logprobs, pack
from tests import tiny_llama

PROMPTS = [[5, 6], [9, 8, 7, 6, 5], [3]]
COMPLETIONS = [[[4, 2, 0], [7, 0]], [[1], [60, 61, 62, 63]], [[2, 2, 2], [0]]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> PreTrainedModel:
    path: Path = tiny_llama.build(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=request.param).eval()


def one_at_a_time(model: PreTrainedModel) -> Tensor:
    """Without padding, batching or cache: the whole sequence through the model, log-softmax, sum."""
    rows = []
    for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in completions:
            logp = torch.log_softmax(model(torch.tensor([prompt + completion]), use_cache=False).logits[0].float(), -1)
            rows.append(sum(logp[len(prompt) - 1 + place, token] for place, token in enumerate(completion)))
    return torch.stack(rows).view(len(PROMPTS), -1)


def test_equals_one_sequence_at_a_time(model: PreTrainedModel) -> None:
    got = completion_logprobs(model, pack(PROMPTS, COMPLETIONS))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, one_at_a_time(model), rtol=1e-5, atol=1e-5)


def test_gradient_equals_one_sequence_at_a_time(model: PreTrainedModel) -> None:
    """Gradients flow back through the shared prompt's cache."""
    weights = torch.linspace(-1, 1, 6).view(3, 2)
    parameters = list(model.parameters())
    got = torch.autograd.grad((weights * completion_logprobs(model, pack(PROMPTS, COMPLETIONS))).sum(), parameters)
    expected = torch.autograd.grad((weights * one_at_a_time(model)).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_token_completions_need_the_prompt_pass_only(model: PreTrainedModel) -> None:
    got = completion_logprobs(model, pack([[5, 6], [7]], [[[3], [4]], [[5], [6]]]))
    total = torch.stack([torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1) for ids in ([5, 6], [7])])
    torch.testing.assert_close(got, torch.stack([total[0, 3:5], total[1, 5:7]]), rtol=1e-5, atol=1e-5)


def test_probabilities_of_all_continuations_sum_to_one(model: PreTrainedModel) -> None:
    every = [[first, second] for first in range(71) for second in range(71)]
    assert completion_logprobs(model, pack([[5, 6, 7]], [every])).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("prompts", "completions", "problem"),
    [
        ([[1], [2]], [[[1]], [[1], [2]]], r"same number of completions, got \[1, 2\]"),
        ([[1]], [[[1], []]], "without tokens"),
        ([[]], [[[1]]], "without tokens"),
        ([[1], [2]], [[[1]]], "for 2 prompts"),
    ],
)
def test_wrong_groups_are_refused(prompts: list[list[int]], completions: list[list[list[int]]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        pack(prompts, completions)

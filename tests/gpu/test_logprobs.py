"""Packed log-probs on CUDA against one completion at a time in float64 on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.logprobs import Scorer
from learner.packing import pack
from tests import tiny_llama

PROMPTS = [list(range(5, 45)), list(range(8, 48)), [7, 9, 4]]
COMPLETIONS = [[list(range(3, 40)), [6]], [[11, 12, 13], list(range(20, 50))], [[1, 2], list(range(10, 60))]]


@pytest.fixture(scope="module", params=[64, 128])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads of 64 or 128, one of them with keys of its own."""
    shape = {"hidden_size": 2 * request.param, "intermediate_size": 96, "initializer_range": 0.08}
    return tiny_llama.build(tmp_path_factory.mktemp("model"), **shape)


def load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """All frozen but the embeddings, whose gradient comes through every layer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    return model.eval()


def one_at_a_time(model: PreTrainedModel) -> Tensor:
    rows = []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in group:
            logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).sum())
    return torch.stack(rows).view(len(PROMPTS), -1)


def with_gradient(logp_GK: Tensor, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    weights_GK = torch.linspace(-1, 1, logp_GK.numel(), dtype=logp_GK.dtype, device=logp_GK.device).view(logp_GK.shape)
    gradient = torch.autograd.grad((weights_GK * logp_GK).sum(), model.get_input_embeddings().weight)[0]
    return logp_GK.detach().cpu().double(), gradient.cpu().double()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerances"), [(torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (5e-3, 5e-2))], ids=["float32", "bfloat16"])
def test_value_and_gradient_are_those_of_one_at_a_time(
    device: torch.device, path: Path, dtype: torch.dtype, tolerances: tuple[float, float], recompute: bool
) -> None:
    """In norm; both models start from the weights rounded to the dtype."""
    exact = load(path, dtype).double()
    expected, slope = with_gradient(one_at_a_time(exact), exact)
    model = load(path, dtype).to(device)
    scorer = Scorer(model, longest=128, recompute=recompute)
    assert scorer.packed
    value, gradient = with_gradient(scorer.completion_logprobs(pack(PROMPTS, COMPLETIONS, device)), model)
    assert (value - expected).norm() <= tolerances[0] * expected.norm()
    assert (gradient - slope).norm() <= tolerances[1] * slope.norm()

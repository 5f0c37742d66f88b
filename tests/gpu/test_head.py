"""The chunked head on CUDA against float64 on the CPU, and its memory."""

import pytest
import torch
from torch import Tensor, nn

from learner.head import chosen_logprobs

PLACES, TOKENS, VOCABULARY, WIDTH = 130, 200, 1003, 64
ROW_BYTES = 4 * VOCABULARY


def problem(dtype: torch.dtype, device: torch.device) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=True).requires_grad_(False)
    head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
    head.bias.copy_(torch.randn(VOCABULARY, generator=generator))
    hidden = torch.randn(PLACES, WIDTH, generator=generator)
    source = torch.randint(PLACES, (TOKENS,), generator=generator)
    target = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return head.to(device, dtype), hidden.to(device, dtype), source.to(device), target.to(device)


def with_gradient(logp_M: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    weights_M = torch.linspace(-1, 1, len(logp_M), dtype=logp_M.dtype, device=logp_M.device)
    return logp_M.detach().cpu().double(), torch.autograd.grad((weights_M * logp_M).sum(), hidden)[0].cpu().double()


@pytest.mark.parametrize("chunk_bytes", [PLACES * 4, 7 * ROW_BYTES, PLACES * ROW_BYTES, 64 * 2**20])
@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
def test_any_chunk_gives_the_value_and_the_gradient(device: torch.device, dtype: torch.dtype, tolerance: float, float32: bool, chunk_bytes: int) -> None:
    """In norm. bfloat16 sums in float32, so its values are as exact as its inputs; only the gradient is rounded."""
    head, hidden, source, target = problem(dtype, device)
    value, gradient = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target, float32=float32, chunk_bytes=chunk_bytes), hidden)
    exact = hidden.detach().cpu().double().requires_grad_()
    logits = nn.functional.linear(exact, head.weight.cpu().double(), head.bias.cpu().double())
    expected, slope = with_gradient(logits.log_softmax(-1)[source.cpu(), target.cpu()], exact)
    assert (value - expected).norm() <= 1e-5 * expected.norm()
    assert (gradient - slope).norm() <= tolerance * slope.norm()


def peak_bytes(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of the log-probs and their gradient, beyond the head's own weight and the hidden states."""
    head = nn.Linear(512, vocabulary, bias=False, dtype=dtype, device=device).requires_grad_(False)
    hidden = torch.randn(2048, 512, dtype=dtype, device=device, requires_grad=True)
    source, target = torch.arange(2048, device=device), torch.randint(vocabulary, (2048,), device=device)

    def once() -> None:
        torch.autograd.grad(chosen_logprobs(head, hidden, source, target).sum(), hidden)

    once()  # what the libraries set up for themselves is not the head's
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    once()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_depend_on_the_vocabulary(device: torch.device, dtype: torch.dtype) -> None:
    small, large = (peak_bytes(vocabulary, dtype, device) for vocabulary in (32_000, 152_000))
    assert abs(large - small) <= 0.1 * small

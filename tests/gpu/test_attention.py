"""The packed attention's CUDA kernels against a masked softmax in float64 on the CPU."""

import pytest
import torch
from torch import Tensor, nn

from learner.attention import attention_forward
from learner.packing import Batch, pack

HEADS, KEY_HEADS = 4, 2
RAGGED = ([[1] * 33, [1] * 33, [1] * 70, [1]], [[[1] * 40, [1]], [[1] * 2, [1] * 65], [[1] * 34, [1] * 33], [[1], [1]]])
PADDED = ([[1] * 70, [1] * 33, [1] * 33, [1] * 33], [[[1] * 64, [1] * 60], [[1] * 70, [1]], [[1] * 65, [1] * 2], [[1] * 3, [1] * 2]])  # in both kinds of call
SHORT = ([[1] * 3, [1] * 5], [[[1]] * 3, [[1]] * 3])  # completions of one token have no queries of their own
ONE_EACH = ([[1] * 32, [1] * 32], [[[1] * 33], [[1] * 12]])
EVEN = ([[1] * 128, [1] * 128], [[[1] * 65] * 8] * 2)
Layout = tuple[list[list[int]], list[list[list[int]]]]
Result = tuple[Tensor, ...]  # the output and the gradients of query, key and value


def inputs(batch: Batch, width: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, len(batch.ids_N), width, dtype=torch.float64, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return parts, torch.randn(1, len(batch.ids_N), HEADS, width, dtype=torch.float64, generator=generator)


def who_sees_whom(layout: Layout) -> Tensor:
    prompts, completions = layout
    size = sum(map(len, prompts)) + sum(len(row) - 1 for group in completions for row in group)
    sees = torch.zeros(size, size, dtype=torch.bool)
    place = 0
    for prompt, group in zip(prompts, completions, strict=True):
        start, end = place, place + len(prompt)
        sees[start:end, start:end] = torch.ones(len(prompt), len(prompt)).tril().bool()
        place = end
        for own in (len(row) - 1 for row in group):
            sees[place : place + own, start:end] = True
            sees[place : place + own, place : place + own] = torch.ones(own, own).tril().bool()
            place += own
    return sees


def softmax(parts: list[Tensor], grad: Tensor, sees: Tensor, scale: float) -> Result:
    query, key, value = (part.clone().requires_grad_() for part in parts)
    repeat = HEADS // KEY_HEADS
    scores = scale * query @ key.repeat_interleave(repeat, 1).transpose(-1, -2)
    out = (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value.repeat_interleave(repeat, 1)).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), grad)


def packed(parts: list[Tensor], grad: Tensor, batch: Batch, scale: float, device: torch.device, dtype: torch.dtype) -> Result:
    query, key, value = (part.to(device, dtype).requires_grad_() for part in parts)
    out, _ = attention_forward(nn.Module(), query, key, value, None, packed=batch, scaling=scale)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), grad.to(device, dtype))


@pytest.mark.parametrize("layout", [RAGGED, PADDED, SHORT, ONE_EACH, EVEN], ids=["ragged", "padded", "short", "one-each", "even"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_value_and_gradients_are_those_of_the_softmax(device: torch.device, dtype: torch.dtype, tolerance: float, width: int, layout: Layout) -> None:
    """In norm, relative to the whole tensor."""
    parts, grad = inputs(pack(*layout), width)
    parts, grad = [part.to(dtype).double() for part in parts], grad.to(dtype).double()  # both start from the same numbers
    expected = softmax(parts, grad, who_sees_whom(layout), width**-0.5)
    got = packed(parts, grad, pack(*layout, device), width**-0.5, device, dtype)
    for name, own, exact in zip(("value", "query", "key", "value's gradient"), got, expected, strict=True):
        assert (own.cpu().double() - exact).norm() <= tolerance * exact.norm(), name

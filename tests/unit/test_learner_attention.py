import random

import pytest
import torch
from torch import Tensor, nn

from learner.attention import attention_forward
from learner.packing import Batch, pack

PROMPTS = [[1] * 3, [1] * 3, [1] * 5, [1]]
COMPLETIONS = [[[1] * 4, [1]], [[1] * 2, [1] * 6], [[1] * 3, [1] * 3], [[1], [1]]]
HEADS, KEY_HEADS, WIDTH = 4, 2, 8
RANDOM = random.Random(0)
UNLIKE = {  # lengths of prompts and completions
    "uniform": ([20] * 3, [[RANDOM.randint(1, 64) for _ in range(8)] for _ in range(3)]),
    "uniform, prompts too": ([RANDOM.randint(1, 40) for _ in range(3)], [[RANDOM.randint(1, 64) for _ in range(8)] for _ in range(3)]),
    "nearly equal": ([20] * 3, [[RANDOM.randint(57, 64) for _ in range(8)] for _ in range(3)]),
    "one long of many short": ([20] * 2, [[200] + [3] * 7, [2] * 8]),
    "one completion each": ([20, 3, 30, 7], [[9], [1], [40], [3]]),
}


def parts(batch: Batch) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(batch.ids_N), WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def who_sees_whom(batch: Batch, prompts: list[list[int]], completions: list[list[list[int]]]) -> Tensor:
    """Token by token, from what the row means: the past of the same completion, and of its prompt."""
    sees = torch.zeros(len(batch.ids_N), len(batch.ids_N), dtype=torch.bool)
    place = 0
    for prompt, group in zip(prompts, completions, strict=True):
        start, end = place, place + len(prompt)
        for token in range(start, end):
            sees[token, start : token + 1] = True
        place = end
        for completion in group:
            for token in range(place, place + len(completion) - 1):
                sees[token, start:end] = True
                sees[token, place : token + 1] = True
            place += len(completion) - 1
    return sees


def packed(query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
    return attention_forward(nn.Module(), query, key, value, None, packed=batch, scaling=0.3)[0]


def softmax(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)


def test_equals_a_softmax_over_what_each_token_sees() -> None:
    batch = pack(PROMPTS, COMPLETIONS)
    expected = softmax(*parts(batch), who_sees_whom(batch, PROMPTS, COMPLETIONS))
    torch.testing.assert_close(packed(*parts(batch), batch), expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    batch = pack(PROMPTS, COMPLETIONS)
    assert torch.autograd.gradcheck(lambda *some: packed(*some, batch), parts(batch))


@pytest.mark.parametrize("size", [1, 100])  # the larger, scores are far apart, and the exponential of what padding sees overflows
@pytest.mark.parametrize("name", UNLIKE)
def test_value_and_gradients_are_exact_with_padding_and_many_calls(name: str, size: float) -> None:
    lengths, unlike = UNLIKE[name]
    prompts, completions = [[1] * length for length in lengths], [[[1] * length for length in group] for group in unlike]
    batch = pack(prompts, completions)
    query, key, value = parts(batch)
    query = (size * query.detach()).requires_grad_()
    expected = softmax(query, key, value, who_sees_whom(batch, prompts, completions))
    got = packed(query, key, value, batch)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for own, exact in zip(*(torch.autograd.grad(out, (query, key, value), grad) for out in (got, expected)), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))


def test_the_unlike_lengths_are_padded_somewhere() -> None:
    """So that the test above says something about padding, near and far."""
    batches = [pack([[1] * length for length in prompts], [[[1] * length for length in group] for group in unlike]) for prompts, unlike in UNLIKE.values()]
    assert {call.causal for batch in batches for call in batch.calls if call.queries.padding} == {True, False}


def test_bfloat16_keeps_its_log_sum_exps_in_float32() -> None:
    batch = pack(PROMPTS, COMPLETIONS)
    low = [part.detach().bfloat16() for part in parts(batch)]
    got, expected = packed(*low, batch), softmax(*(part.double() for part in low), who_sees_whom(batch, PROMPTS, COMPLETIONS))
    assert got.dtype is torch.bfloat16
    assert (got.double() - expected).norm() <= 1e-2 * expected.norm()

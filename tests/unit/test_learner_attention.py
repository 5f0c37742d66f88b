import torch
from torch import Tensor, nn

from learner.attention import attention_forward
from learner.packing import Batch, pack

PROMPTS = [[1] * 3, [1] * 3, [1] * 5, [1]]
COMPLETIONS = [[[1] * 4, [1]], [[1] * 2, [1] * 6], [[1] * 3, [1] * 3], [[1], [1]]]
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def parts(batch: Batch) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, len(batch.ids_N), WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def who_sees_whom(batch: Batch) -> Tensor:
    """Token by token, from what the row means: the past of the same completion, and of its prompt."""
    sees = torch.zeros(len(batch.ids_N), len(batch.ids_N), dtype=torch.bool)
    place = 0
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
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


def test_equals_a_softmax_over_what_each_token_sees() -> None:
    batch = pack(PROMPTS, COMPLETIONS)
    query, key, value = parts(batch)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    expected = scores.masked_fill(~who_sees_whom(batch), -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(packed(query, key, value, batch), expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    batch = pack(PROMPTS, COMPLETIONS)
    assert torch.autograd.gradcheck(lambda *some: packed(*some, batch), parts(batch))

import random

import pytest
import torch

from learner.packing import Batch, pack
from learner.rectangles import calls


def test_the_row_holds_each_prompt_once_and_no_padding() -> None:
    batch = pack([[5, 6], [9, 8, 7]], [[[4, 2, 0], [7, 0]], [[1], [3, 3, 3, 0]]])
    assert batch.ids_N.tolist() == [5, 6, 4, 2, 7, 9, 8, 7, 3, 3, 3]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3, 4, 5]
    assert batch.target_M.tolist() == [4, 2, 0, 7, 0, 1, 3, 3, 3, 0]
    predicted_from = batch.place_S[batch.source_M]
    assert batch.ids_N[predicted_from].tolist() == [6, 4, 2, 6, 7, 7, 7, 3, 3, 3]
    assert len(batch.place_S) == len(set(batch.place_S.tolist())), "each place goes through the head once"
    assert batch.token_mask_GKT.int().tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 1]]]
    assert batch.spread(batch.target_M).tolist() == [[[4, 2, 0, 0], [7, 0, 0, 0]], [[1, 0, 0, 0], [3, 3, 3, 0]]]


def stretches(batch: Batch, *, causal: bool) -> list[list[list[int]]]:
    return [call.queries.place_XY.tolist() for call in batch.calls if call.causal is causal]


def test_equally_long_completions_make_one_call_and_no_padding() -> None:
    batch = pack([[1], [2]], [[[5] * 3] * 2] * 2)
    assert stretches(batch, causal=True) == [[[0], [5]], [[1, 2], [3, 4], [6, 7], [8, 9]]]
    assert stretches(batch, causal=False) == [[[1, 2, 3, 4], [6, 7, 8, 9]]]
    assert [call.keys.place_XY.tolist() for call in batch.calls if not call.causal] == [[[0], [5]]]
    assert batch.padding == 0


def test_prompts_of_a_length_are_asked_in_one_call_wherever_they_stand() -> None:
    batch = pack([[1], [3, 3], [2]], [[[5, 5]] * 2] * 3)
    assert stretches(batch, causal=True) == [[[3, 4]], [[0], [7]], [[1], [2], [5], [6], [8], [9]]]
    assert stretches(batch, causal=False) == [[[1, 2], [8, 9]], [[5, 6]]]


def test_a_single_completion_goes_on_where_its_prompt_ends() -> None:
    batch = pack([[1], [3, 3], [2]], [[[5, 5]], [[5]], [[5, 6, 7]]])
    assert stretches(batch, causal=True) == [[[4, 5, 6]], [[0, 1], [2, 3]]]
    assert stretches(batch, causal=False) == []


def test_completions_of_one_token_need_no_call() -> None:
    batch = pack([[1, 1], [2, 2]], [[[5]] * 3, [[5], [5, 6, 7], [5]]])
    assert stretches(batch, causal=True) == [[[0, 1], [2, 3]], [[4, 5]]]
    assert stretches(batch, causal=False) == [[[4, 5]]]


RANDOM = random.Random(0)
UNLIKE = {
    "uniform, one prompt": ([40], [[RANDOM.randint(1, 64) for _ in range(8)]]),
    "uniform": ([40] * 6, [[RANDOM.randint(1, 64) for _ in range(8)] for _ in range(6)]),
    "uniform, prompts too": ([RANDOM.randint(1, 64) for _ in range(6)], [[RANDOM.randint(1, 64) for _ in range(8)] for _ in range(6)]),
    "one long of many short": ([40] * 3, [[500] + [3] * 7] * 3),
    "one long in all": ([5] * 4, [[500] + [3] * 7, *[[3] * 8] * 3]),
    "a tail": ([40] * 4, [[int(RANDOM.paretovariate(0.7)) for _ in range(8)] for _ in range(4)]),
    "one token, and many": ([40] * 2, [[1] * 8, [1] * 7 + [64]]),
    "a short row": ([1], [[1, 2, 3, 4]]),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_little_is_padded_however_unlike_the_lengths(name: str) -> None:
    prompts, completions = UNLIKE[name]
    batch = pack([[1] * length for length in prompts], [[[1] * length for length in group] for group in completions])
    computed = sum(call.queries.place_XY.numel() for call in batch.calls)
    needed = sum(prompts) + 2 * sum(length - 1 for group in completions for length in group)  # a completion's token looks at itself and at its prompt
    assert batch.padding == computed - needed
    assert batch.padding < 0.05 * (len(batch.ids_N) + batch.padding)
    causal = [call.queries.place_R for call in batch.calls if call.causal]
    assert torch.cat(causal).sort().values.tolist() == list(range(len(batch.ids_N))), "each token looks at itself once"


def test_calls_are_cut_where_it_saves_the_most() -> None:
    """Of 9, 8, 4, 1 the last two go first, which saves 10 of 14 places; then the last one, of the 4 that are left over 3."""
    stacks = [[(range(stop), range(stop)) for stop in (4, 9, 1, 8)]]
    widths = {spare: [call.queries.place_XY.shape for call in calls(stacks, spare=spare, device="cpu")] for spare in (14, 13, 4, 3, 0)}
    assert widths == {14: [(4, 9)], 13: [(2, 9), (2, 4)], 4: [(2, 9), (2, 4)], 3: [(2, 9), (1, 4), (1, 1)], 0: [(1, 9), (1, 8), (1, 4), (1, 1)]}


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

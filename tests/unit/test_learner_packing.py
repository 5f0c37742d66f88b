import pytest

from learner.packing import pack


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


def test_neighbours_with_equally_long_prompts_make_one_run() -> None:
    batch = pack([[1], [2], [3, 3], [4]], [[[5]]] * 4)
    assert [len(run.prompt_GP) for run in batch.runs] == [2, 1, 1]


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

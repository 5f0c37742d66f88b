from dataclasses import replace

import pytest

from ftb_llm.types import Group, Prompt
from learner.batching import plan, slices, token_cost
from tests import tiny_llama


def group(prompt: int, *completions: int) -> Group:
    scored = tiny_llama.scored_group(0).group
    rows = tuple(replace(scored.completions[0], token_ids=(1,) * length) for length in completions)
    return replace(scored, prompt=Prompt(index=0, text="", token_ids=(1,) * prompt), completions=rows)


GROUPS = [group(3, 4, 4), group(9, 1, 2), group(3, 1, 1), group(30, 40, 5), group(3, 2, 6), group(9, 2, 2), group(5, 5, 5)]


def test_a_prompt_costs_once() -> None:
    assert token_cost(group(9, 1, 2)) == 12


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("budget", [1, 13, 30, 1000])
def test_every_group_is_computed_once_within_the_budget(budget: int, ranks: int) -> None:
    shares = plan(GROUPS, budget=budget, ranks=ranks)
    assert len(shares) == ranks
    assert sorted(place for share in shares for batch in share for place in batch) == list(range(len(GROUPS)))
    for batch in (batch for share in shares for batch in share):
        assert batch and (len(batch) == 1 or sum(token_cost(GROUPS[place]) for place in batch) <= budget)


def test_ranks_get_even_loads() -> None:
    groups = [group(10, 5 + place % 7, 20) for place in range(64)]
    loads = [sum(token_cost(groups[place]) for batch in share for place in batch) for share in plan(groups, budget=200, ranks=4)]
    assert max(loads) <= 1.02 * min(loads)


def test_equal_prompts_stand_together() -> None:
    (share,) = plan(GROUPS, budget=1000)
    assert [len(GROUPS[place].prompt.token_ids) for place in share[0]] == sorted(len(one.prompt.token_ids) for one in GROUPS)


def test_parts_of_a_large_group_keep_within_the_budget_where_one_completion_does() -> None:
    large = group(10, 5, 5, 30, 1, 1)
    assert slices(large, budget=20) == [range(2), range(2, 3), range(3, 5)]
    assert slices(large, budget=1000) == [range(5)]

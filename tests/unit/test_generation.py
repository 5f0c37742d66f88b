from dataclasses import replace

import pytest

from ftb_llm.buffer import GroupBuffer
from ftb_llm.config import build_config
from ftb_llm.config.schema import OBJECTIVES
from ftb_llm.datasets import PromptOrder
from ftb_llm.generation import Generation, WorkList, group_id, group_number, truncation
from ftb_llm.journal import Journal
from ftb_llm.types import FinishReason
from tests.fakes import FakeRewards, make_group, make_prompt


def test_numbers_are_handed_out_in_order():
    work = WorkList()
    assert [work.take() for _ in range(3)] == [0, 1, 2]


def test_a_number_that_came_to_nothing_is_next():
    work = WorkList()
    taken = [work.take() for _ in range(4)]
    work.put_back(taken[2])
    work.put_back(taken[1])
    assert [work.take() for _ in range(3)] == [1, 2, 4]


def test_a_resumed_list_hands_out_the_gaps_first():
    work = WorkList([0, 1, 3, 6])
    assert [work.take() for _ in range(5)] == [2, 4, 5, 7, 8]


def test_numbers_and_identifiers_match():
    assert group_number(group_id(1234)) == 1234


def generation(tmp_path, **sections):
    """Of a run that has done nothing yet."""
    return Generation(
        config=lambda: build_config(sections),
        work=WorkList(),
        prompts=PromptOrder([make_prompt()], seed=0, shuffle=False),
        buffer=GroupBuffer(capacity=4, journal=Journal(tmp_path / "run.db")),
        rewards=FakeRewards(),
        reference=None,
        emit=lambda kind, message, **details: None,
    )


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_only_the_token_level_objectives_ask_for_token_logprobs(tmp_path, kind):
    spec = generation(tmp_path, objective={"kind": kind}).request(0).sampling
    assert spec.token_logprobs is (kind in ("ppo_clip", "grpo"))


def test_a_request_samples_as_the_config_says(tmp_path):
    spec = generation(tmp_path, sampling={"group_size": 3, "temperature": 0.5, "top_p": 0.25, "max_tokens": 7}).request(0).sampling
    assert (spec.group_size, spec.temperature, spec.top_p, spec.max_tokens) == (3, 0.5, 0.25, 7)


def cut(group, *places):
    """The group with the completions at these places cut off."""
    completions = tuple(
        replace(completion, finish_reason=FinishReason.LENGTH, token_ids=(5, 6, 7, 8)) if place in places else completion
        for place, completion in enumerate(group.completions)
    )
    return replace(group, completions=completions)


def test_a_truncated_group_says_how_it_was_cut():
    assert truncation(make_group(size=4)) is None
    assert str(truncation(cut(make_group(size=4), 1, 3))) == (
        "truncated: 2 of 4 completions were cut at sampling.max_tokens 4, and objective.truncated is reject; "
        "raise sampling.max_tokens, or set objective.truncated to keep or mask"
    )

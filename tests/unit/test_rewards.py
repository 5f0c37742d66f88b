import sys
import textwrap

import pytest

from ftb_llm.config.schema import Reward, Rewards
from ftb_llm.errors import InvalidConfig, RewardError
from ftb_llm.rewards import RewardSet, RewardWorkers, load_function, reward_call
from ftb_llm.types import Prompt
from tests.fakes import make_group, make_prompt

CODE = """
    import os, time

    def length(prompts, completions, completion_ids, **columns):
        return [float(len(text)) for text in completions]

    def answer(prompts, completions, completion_ids, answer, **columns):
        return [float(a) for a in answer]

    def nothing(completions, **kwargs):
        return [None for _ in completions]

    def first_only(completions, **kwargs):
        return [1.0] + [None] * (len(completions) - 1)

    def raises(**kwargs):
        raise KeyError("gold")

    def short(completions, **kwargs):
        return [1.0]

    def nan(completions, **kwargs):
        return [float("nan")] * len(completions)

    def text(completions, **kwargs):
        return ["1.0"] * len(completions)

    def arrays(completions, **kwargs):
        import numpy
        return [numpy.zeros(2)] * len(completions)

    def tensors(completions, **kwargs):
        import torch
        return [torch.zeros(2)] * len(completions)

    def large(completions, **kwargs):
        return [10 ** 400] * len(completions)

    def strange(completions, **kwargs):
        class Strange:
            def __float__(self):
                raise OSError("no")
            def __repr__(self):
                raise KeyError("no")
        return [Strange()] * len(completions)

    def scalars(completions, **kwargs):
        import numpy
        return [numpy.float32(0.5)] * len(completions)

    def slow(completions, **kwargs):
        time.sleep(3600)

    def dies(completions, **kwargs):
        os._exit(3)

    def prints(completions, **kwargs):
        print("a reward may print what it likes")
        return [2.0] * len(completions)

    not_a_function = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    name = "user_rewards"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop(name, None)
    yield name
    sys.modules.pop(name, None)


def score(module, *names, group=None, weights=None):
    weights = weights or [1.0] * len(names)
    rewards = [Reward(function=f"{module}:{name}", weight=weight) for name, weight in zip(names, weights, strict=True)]
    return RewardSet(rewards).score(reward_call(group or make_group()))


def test_rewards_are_weighted_and_summed(module):
    group = make_group(prompt=make_prompt(answer=3))
    assert score(module, "length", "answer", group=group, weights=[1.0, 10.0]) == [36.0, 36.0]


def test_none_means_nothing_to_say(module):
    assert score(module, "length", "first_only") == [7.0, 6.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "no_reward"),
        ("raises", "raised"),
        ("short", "wrong_length"),
        ("nan", "not_finite"),
        ("text", "not_a_number"),
        ("arrays", "not_a_number"),
        ("tensors", "not_a_number"),
        ("large", "not_a_number"),
        ("strange", "not_a_number"),
    ],
)
def test_a_bad_reward_becomes_a_reason(module, name, reason):
    with pytest.raises(RewardError) as caught:
        score(module, name)
    assert caught.value.reason == reason
    assert module in str(caught.value) or reason == "no_reward"


def test_a_scalar_of_numpy_is_a_number(module):
    assert score(module, "scalars") == [0.5, 0.5]


def test_a_sum_that_is_not_finite_becomes_a_reason(module):
    """Each reward is finite, their weighted sum is not."""
    with pytest.raises(RewardError, match="the weighted sum of the rewards of completion 0 is inf") as caught:
        score(module, "length", "scalars", weights=[1e308, 1e308])
    assert caught.value.reason == "not_finite"


def test_a_conversation_reaches_the_reward_as_messages():
    messages = [{"role": "user", "content": "hello"}]
    call = reward_call(make_group(prompt=Prompt(index=0, text="<user>hello", token_ids=(1,), messages=messages, columns={"gold": 4})))
    assert call["prompts"] == [messages] * 2
    assert call["completions"][0] == [{"role": "assistant", "content": "text 0"}]
    assert call["completion_ids"] == [[5, 2], [5, 2]]
    assert call["gold"] == [4, 4]


@pytest.mark.parametrize("path", ["no_such_module:f", "user_rewards:no_such_function", "user_rewards:not_a_function"])
def test_a_reward_that_is_not_there_is_refused_by_name(module, path):
    with pytest.raises(InvalidConfig, match=f"rewards.functions: {path}"):
        load_function(path)


@pytest.mark.parametrize(("name", "reason"), [("slow", "timeout"), ("dies", "crashed"), ("raises", "raised"), ("arrays", "not_a_number")])
async def test_a_worker_outlives_a_bad_reward(module, name, reason):
    """The group gets its reason, and the next one is scored as if nothing had happened."""
    config = Rewards(functions=[Reward(function=f"{module}:{name}")], timeout_seconds=1.0)
    async with RewardWorkers(config) as workers:
        for _ in range(2):
            with pytest.raises(RewardError) as caught:
                await workers.score(make_group())
            assert caught.value.reason == reason


async def test_prints_do_not_tear_the_answer(module):
    async with RewardWorkers(Rewards(functions=[Reward(function=f"{module}:prints")])) as workers:
        assert await workers.score(make_group()) == (2.0, 2.0)
        assert await workers.score(make_group()) == (2.0, 2.0)

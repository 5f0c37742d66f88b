import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ftb_llm.bench.spec import TrialSpec
from ftb_llm.custom import load_custom
from ftb_llm.errors import InvalidConfig, RewardError
from ftb_llm.tasks.hypergrid import reward
from ftb_llm.types import FinishReason
from learner.step import policy_logprobs
from learner.trial import Trial, run
from tests import tiny_llama

SMALL = ("sampling.group_size=4", "learner.groups_per_step=4", "learner.micro_batch_tokens=1000", "model.lora.rank=4")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def make(path: Path, *words: str, steps: int = 6, **changes: Any) -> Trial:
    spec = {"task": "hypergrid", "objective": "hellinger", "settings": (*SMALL, f"run.max_steps={steps}", *words)} | changes
    return Trial(TrialSpec(**spec), model_path=path)


class Rewards:
    """One and the same for all is the task's reward for what an untrained model writes; these differ, and break after `good` groups."""

    def __init__(self, good: int = 1000) -> None:
        self.good = good

    def score(self, call: dict[str, Any]) -> list[float]:
        self.good -= 1
        return [ids[0] / 10 if self.good >= 0 else math.inf for ids in call["completion_ids"]]


def learning(path: Path, *words: str, good: int = 1000, **changes: Any) -> Trial:
    """A trial whose weights move."""
    trial = make(path, *words, **changes)
    trial.rewards = Rewards(good)
    return trial


@pytest.mark.parametrize("lag", [0, 1, 4, 10])
def test_every_step_trains_on_samples_that_are_exactly_so_old(path: Path, lag: int) -> None:
    for step, batch in enumerate(make(path, lag=lag).steps(), start=1):
        versions = {(completion.min_version, completion.max_version) for scored in batch for completion in scored.group.completions}
        version = max(0, step - 1 - lag)
        assert versions == {(version, version)}


def test_samples_are_those_of_the_weights_they_name(path: Path) -> None:
    trial = learning(path, lag=2)
    states = [trial.model.adapter_state()]
    batches = []
    for batch in trial.steps():
        batches.append(batch)
        states.append(trial.model.adapter_state())
    assert not torch.equal(*(states[step]["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] for step in (0, 6)))
    for batch in batches:
        groups = [scored.group for scored in batch]
        trial.model.load_adapter_state(states[groups[0].max_version])
        sampled = torch.tensor([[completion.logprob for completion in group.completions] for group in groups])
        scored = torch.tensor(policy_logprobs(trial.model, groups, micro_batch_tokens=1000))
        torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-5)


def test_groups_visit_all_prompts_and_get_the_tasks_rewards(path: Path) -> None:
    batches = list(make(path, lag=1).steps())
    groups = [scored for batch in batches for scored in batch]
    assert [scored.group.id for scored in groups] == [f"g{number:09d}" for number in range(24)]
    for batch in batches:
        assert {scored.group.prompt.text for scored in batch} == {"north:", "east:", "south:", "west:"}
    for scored in groups:
        texts = [completion.text for completion in scored.group.completions]
        assert list(scored.rewards) == reward([scored.group.prompt.text] * len(texts), texts)
        assert all(completion.finish_reason in FinishReason for completion in scored.group.completions)


@pytest.mark.parametrize(("objective", "wanted"), [("hellinger", False), ("grpo", True)])
def test_only_token_level_objectives_get_each_tokens_logprob(path: Path, objective: str, wanted: bool) -> None:
    batch = next(make(path, objective=objective).steps())
    assert {completion.token_logprobs is not None for scored in batch for completion in scored.group.completions} == {wanted}


def test_the_curve_starts_at_the_reference_and_ends_with_the_last_step(path: Path) -> None:
    result = run(learning(path, "eval.every_steps=4"))
    assert [(point.step, point.completions) for point in result.curve] == [(0, 0), (4, 64), (6, 96)]
    assert len({point.exact_tv for point in result.curve}) == 3
    assert all(0 <= point.exact_jsd <= math.log(2) for point in result.curve)
    assert (result.error, result.modes_total, set(result.pass_at_k)) == (None, 16, {"1", "4", "16", "64", "256"})


def test_a_seed_settles_a_trial(path: Path) -> None:
    first, again, other = (run(learning(path, seed=seed)) for seed in (1, 1, 2))
    assert first.curve == again.curve
    assert first.coverage_target == again.coverage_target
    assert first.curve[-1] != other.curve[-1]


def test_a_training_that_breaks_off_is_judged_as_far_as_it_came(path: Path) -> None:
    result = run(learning(path, "eval.every_steps=2", good=3 * 4))
    assert result.error is not None
    assert result.error.startswith("step 4: ")
    assert [point.step for point in result.curve] == [0, 2, 3]


def test_weights_that_can_not_be_judged_leave_the_verdict_before(path: Path) -> None:
    trial = learning(path, "eval.every_steps=2")
    for step, _ in enumerate(trial.steps(), start=1):
        if step == 3:
            break
    for name, parameter in trial.model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(math.nan)
    trial.judge_what_is_left()
    result = trial.result(seconds=1.0, error="step 4: bad")
    assert [point.step for point in result.curve] == [0, 2]
    assert result.row()["exact_tv"] == result.curve[-1].exact_tv


def test_a_reward_function_that_fails_is_no_result(path: Path) -> None:
    class Failing:
        def score(self, call: dict[str, Any]) -> list[float]:
            raise RewardError("raised", "reward: no table")

    trial = make(path)
    trial.rewards = Failing()
    with pytest.raises(RewardError, match=r"^raised: reward: no table$"):
        run(trial)


MODULE = """
from ftb_llm.divergences import CustomDivergence

def slope(delta):
    if len(delta.shape) > 1:
        raise LookupError("no table\\nfor this")
    return delta

member = CustomDivergence(slope=slope)
"""


def test_a_custom_member_that_fails_is_one_line_and_no_result(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slope_of_this_test.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    load_custom.cache_clear()
    trial = learning(path, "objective.custom=slope_of_this_test:member", objective="custom")
    with pytest.raises(InvalidConfig) as caught:
        run(trial)
    assert str(caught.value) == "objective.custom: slope_of_this_test:member failed in step 1: LookupError: no table for this"


def test_what_is_not_the_users_code_is_not_blamed_on_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise LookupError("ours")

    monkeypatch.setattr("learner.trial.take_step", broken)
    with pytest.raises(LookupError, match=r"^'?ours'?$"):
        run(make(path))

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftb_llm.baselines import BASELINES
from ftb_llm.types import ScoredGroup
from learner.model import AdaptedModel
from learner.passes import pack_groups
from learner.reference import Reference
from learner.step import take_step
from tests import tiny_llama
from tests.tiny_llama import untimed


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("budget", "dtype"), [(8, "float32"), (1000, "float32"), (1000, "bfloat16")])  # in bfloat16, other parts round otherwise
@pytest.mark.parametrize("targets", ["all-linear", ["all-linear", "lm_head"]])
def test_it_scores_as_the_learner_without_its_adapter(path: Path, targets: Any, budget: int, dtype: str) -> None:
    config = tiny_llama.tiny_config(learner={"micro_batch_tokens": budget}, model={"dtype": dtype, "lora": {"rank": 4, "alpha": 8.0, "targets": targets}})
    model, reference = AdaptedModel(config, path), Reference(config, path)
    group = tiny_llama.scored_group(0).group
    with torch.no_grad(), model.as_reference():
        expected = model.scorer.token_logprobs(pack_groups([group], model))[0]
    rows = reference.score(group)
    assert [len(row) for row in rows] == [len(completion.token_ids) for completion in group.completions]
    for row, wanted in zip(rows, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row), wanted[: len(row)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ftb", *BASELINES])
def test_a_step_on_what_came_with_the_groups_is_the_same_step(path: Path, kind: str) -> None:
    """And it comes back from the journal as it went in."""
    request = tiny_llama.step_request(1)
    groups = []
    reference = Reference(tiny_llama.tiny_config(), path)
    for scored in request.groups:
        completions = tuple(replace(one, token_logprobs=(-1.0,) * len(one.token_ids)) for one in scored.group.completions)
        groups.append(replace(scored, group=replace(scored.group, completions=completions)))
    plain = replace(request, groups=tuple(groups), objective=replace(request.objective, kind=kind))
    known = replace(plain, groups=tuple(ScoredGroup.decode(replace(one, reference=reference.score(one.group)).encode()) for one in groups))
    some = replace(plain, groups=(known.groups[0], *plain.groups[1:]))
    first, *others = (untimed(take_step(AdaptedModel(tiny_llama.tiny_config(), path), one, micro_batch_tokens=1000)) for one in (plain, known, some))
    for other in others:
        assert other.metrics == pytest.approx(first.metrics, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(torch.tensor(other.delta_GK), torch.tensor(first.delta_GK), rtol=1e-5, atol=1e-5)


def test_the_reference_that_came_is_what_counts(path: Path) -> None:
    request = tiny_llama.step_request(1)
    zeros = [replace(one, reference=tuple((0.0,) * len(completion.token_ids) for completion in one.group.completions)) for one in request.groups]
    report = take_step(AdaptedModel(tiny_llama.tiny_config(), path), replace(request, groups=tuple(zeros)), micro_batch_tokens=1000)
    rewards = torch.tensor([one.rewards for one in zeros])
    torch.testing.assert_close(torch.tensor(report.delta_GK), torch.tensor(report.logp_GK) - rewards / 0.5, rtol=1e-5, atol=1e-5)

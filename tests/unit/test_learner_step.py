from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.errors import FtbError
from ftb_llm.types import ScoredGroup, StepReport, StepRequest
from learner.model import AdaptedModel
from learner.step import policy_logprobs, take_step
from tests import tiny_llama


class Recording(AdaptedModel):
    """Keeps the gradient that the update sees."""

    gradient: dict[str, Tensor]

    def update(self, *, step: int, learning_rate: float, max_grad_norm: float) -> float:
        self.gradient = {name: parameter.grad.clone() for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return super().update(step=step, learning_rate=learning_rate, max_grad_norm=max_grad_norm)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def moved(path: Path) -> Recording:
    """A model some way off its reference, so that no weight of the step vanishes by symmetry."""
    model = Recording(tiny_llama.tiny_config(), path)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_logprobs(model: AdaptedModel, groups: tuple[ScoredGroup, ...]) -> Tensor:
    rows = []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        for completion in scored.group.completions:
            ids = torch.tensor([prompt + completion.token_ids])
            logp = torch.log_softmax(model.module(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float(), -1)
            rows.append(logp.gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).sum())
    return torch.stack(rows).view(len(groups), -1)


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("divergence", [*FAMILY, "alpha"])
def test_gradient_and_loss_are_those_of_the_closed_form(path: Path, divergence: str, tempered: bool) -> None:
    model = moved(path)
    objective = replace(tiny_llama.step_request(1).objective, divergence=divergence, alpha=1.5 if divergence == "alpha" else None, tempered=tempered)
    request = tiny_llama.step_request(1, objective=objective)
    with torch.no_grad(), model.as_reference():
        reference = plain_logprobs(model, request.groups).double()
    reward = torch.tensor([scored.rewards for scored in request.groups], dtype=torch.float64)
    delta = plain_logprobs(model, request.groups).double() - reference - reward / 0.5
    member, b = get_divergence(divergence, objective.alpha), 0.5 if tempered else 1.0
    loss = member.loss(b * delta + member.log_z(b * delta.detach()).unsqueeze(-1)).mean() / b
    named = {name: parameter for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    expected = torch.autograd.grad(loss, list(named.values()))

    report = take_step(model, request, groups_per_micro_batch=4)
    assert report.loss == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in zip(named, expected, strict=True):
        torch.testing.assert_close(model.gradient[name], gradient, rtol=2e-3, atol=1e-4 * float(max(part.abs().max() for part in expected)))
    torch.testing.assert_close(torch.tensor(report.delta_GK, dtype=torch.float64), delta.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_make_the_same_step(path: Path, size: int) -> None:
    whole, parts = moved(path), moved(path)
    request = tiny_llama.step_request(1, divergence="hellinger")
    a = take_step(whole, request, groups_per_micro_batch=4)
    b = take_step(parts, request, groups_per_micro_batch=size)
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.metrics == pytest.approx(a.metrics, rel=1e-5)
    differences = [gradient - parts.gradient[name] for name, gradient in whole.gradient.items()]
    assert norm(differences) <= 1e-6 * norm(list(whole.gradient.values()))


def norm(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def test_metrics(path: Path) -> None:
    model = moved(path)
    request = tiny_llama.step_request(1)
    logp = plain_logprobs(model, request.groups).detach().double()
    engine = torch.tensor([[completion.logprob for completion in scored.group.completions] for scored in request.groups])
    report = take_step(model, request, groups_per_micro_batch=4)
    assert set(report.metrics) == {
        "optim/loss",
        "optim/grad_norm",
        "optim/learning_rate",
        "off_policy/logprob_diff_mean",
        "off_policy/logprob_diff_max",
        "perf/learn_tokens",
        *(f"divergence/{name}" for name in FAMILY),
    }
    assert report.metrics["optim/learning_rate"] == 1e-2
    assert report.metrics["optim/loss"] == report.loss == pytest.approx(report.metrics["divergence/reverse_kl"], rel=1e-6)
    assert report.metrics["off_policy/logprob_diff_max"] == pytest.approx((logp - engine).abs().max().item(), rel=1e-4)
    assert report.metrics["off_policy/logprob_diff_mean"] == pytest.approx((logp - engine).abs().mean().item(), rel=1e-4)
    assert report.metrics["perf/learn_tokens"] == sum(scored.group.token_count for scored in request.groups)
    torch.testing.assert_close(torch.tensor(report.logp_GK, dtype=torch.float64), logp, rtol=1e-5, atol=1e-5)


def test_the_alpha_member_in_use_is_reported(path: Path) -> None:
    objective = replace(tiny_llama.step_request(1).objective, divergence="alpha", alpha=1.5)
    report = take_step(moved(path), tiny_llama.step_request(1, objective=objective), groups_per_micro_batch=4)
    assert report.metrics["divergence/alpha"] == pytest.approx(report.loss, rel=1e-6)


def losses(path: Path, steps: int, divergence: str = "reverse_kl") -> list[StepReport]:
    model = AdaptedModel(tiny_llama.tiny_config(), path)
    return [take_step(model, tiny_llama.step_request(step, divergence=divergence), groups_per_micro_batch=4) for step in range(1, steps + 1)]


def test_the_seed_gives_the_same_losses_twice(path: Path) -> None:
    assert losses(path, 5) == losses(path, 5)


@pytest.mark.parametrize("divergence", FAMILY)
def test_every_member_descends_on_fixed_groups(path: Path, divergence: str) -> None:
    reports = losses(path, 25, divergence)
    assert reports[-1].loss < 0.7 * reports[0].loss


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_leaves_the_weights(path: Path, reward: float) -> None:
    model = moved(path)
    request = tiny_llama.step_request(3)
    broken = replace(request.groups[0], rewards=(reward, *request.groups[0].rewards[1:]))
    before = model.adapter_state()
    with pytest.raises(FtbError, match=r"step 3: .* not finite; the weights are those of step 2"):
        take_step(model, replace(request, groups=(broken, *request.groups[1:])), groups_per_micro_batch=4)
    after = model.adapter_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again: StepRequest = tiny_llama.step_request(3)
    assert take_step(model, again, groups_per_micro_batch=4).loss == take_step(moved(path), again, groups_per_micro_batch=4).loss


def test_policy_logprobs_in_any_batching(path: Path) -> None:
    model = moved(path)
    groups = [scored.group for scored in tiny_llama.step_request(1, seeds=(0, 1, 2, 3, 4)).groups]
    expected = plain_logprobs(model, tiny_llama.step_request(1, seeds=(0, 1, 2, 3, 4)).groups)
    for size in (2, 5):
        torch.testing.assert_close(torch.tensor(policy_logprobs(model, groups, groups_per_micro_batch=size)), expected.detach(), rtol=1e-5, atol=1e-5)

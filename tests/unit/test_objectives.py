import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.objectives import delta, divergence_estimates, ftb_loss
from ftb_llm.types import ObjectiveSpec

SPEC = ObjectiveSpec(kind="ftb", divergence="reverse_kl", alpha=None, beta=0.5, tempered=False)
SPECS = [replace(SPEC, divergence=name, tempered=tempered) for name in FAMILY for tempered in (False, True)]
SPECS += [replace(SPEC, divergence="alpha", alpha=0.75, tempered=tempered) for tempered in (False, True)]
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.divergence}{'-tempered' * spec.tempered}")


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logp, logp_ref = (-10 + 2 * torch.randn(6, 8, generator=generator, dtype=dtype) for _ in range(2))
    return logp.requires_grad_(), logp_ref, torch.rand(6, 8, generator=generator, dtype=dtype)


def closed_form(logp: Tensor, logp_ref: Tensor, reward: Tensor, spec: ObjectiveSpec) -> Tensor:
    member = get_divergence(spec.divergence, spec.alpha)
    b = spec.beta if spec.tempered else 1.0
    x = b * (logp - logp_ref - reward / spec.beta)
    return member.loss(x + member.log_z(x.detach()).unsqueeze(-1)).mean() / b


def test_delta_by_hand() -> None:
    got = delta(torch.tensor([-3.0, -1.0]), torch.tensor([-2.0, -4.0]), torch.tensor([1.0, 0.5]), 0.25)
    assert got.tolist() == [-5.0, 1.0]


def test_reverse_kl_by_hand() -> None:
    """Two completions with Delta 1 and 3: weights -1 and 1, loss (1/2 + 1/2) / 2."""
    logp = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss, metrics = ftb_loss(logp, torch.zeros(1, 2), torch.zeros(1, 2), SPEC, denominator=2)
    loss.backward()
    assert loss.item() == 0.5
    assert metrics == {"optim/loss": 0.5}
    assert logp.grad.tolist() == [[-0.5, 0.5]]


@specs
def test_value_and_gradient_are_those_of_the_closed_form(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = batch()
    loss, metrics = ftb_loss(logp, logp_ref, reward, spec, denominator=logp.numel())
    (gradient,) = torch.autograd.grad(loss, logp)
    expected = closed_form(logp, logp_ref, reward, spec)
    (expected_gradient,) = torch.autograd.grad(expected, logp)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics["optim/loss"] == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@specs
def test_micro_batches_sum_to_the_whole(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = batch(1)
    whole, _ = ftb_loss(logp, logp_ref, reward, spec, denominator=logp.numel())
    parts = [ftb_loss(logp[rows], logp_ref[rows], reward[rows], spec, denominator=logp.numel()) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(part.item() for part, _ in parts) == pytest.approx(whole.item(), rel=1e-12)
    assert sum(metrics["optim/loss"] for _, metrics in parts) == pytest.approx(whole.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(whole, logp, retain_graph=True)
    (summed,) = torch.autograd.grad(sum(part for part, _ in parts), logp)
    torch.testing.assert_close(summed, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_tempering_moves_alpha_towards_one(alpha: float) -> None:
    """(1/b) L_alpha(b Delta) = b L_{1 + b (alpha - 1)}(Delta)."""
    logp, logp_ref, reward = batch(2)
    tempered, _ = ftb_loss(logp, logp_ref, reward, replace(SPEC, divergence="alpha", alpha=alpha, tempered=True), denominator=48)
    moved, _ = ftb_loss(logp, logp_ref, reward, replace(SPEC, divergence="alpha", alpha=1 + SPEC.beta * (alpha - 1)), denominator=48)
    assert tempered.item() == pytest.approx(SPEC.beta * moved.item(), rel=1e-12)
    (a,) = torch.autograd.grad(tempered, logp)
    (b,) = torch.autograd.grad(moved, logp)
    torch.testing.assert_close(a, SPEC.beta * b, rtol=1e-10, atol=1e-13)


@specs
def test_a_masked_completion_changes_nothing(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = batch(3)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 5:] = False
    broken = torch.where(mask, logp.detach(), torch.nan).requires_grad_()
    loss, _ = ftb_loss(broken, logp_ref, reward, spec, mask, denominator=30)
    expected, _ = ftb_loss(logp[:, :5], logp_ref[:, :5], reward[:, :5], spec, denominator=30)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, broken)
    (expected_gradient,) = torch.autograd.grad(expected, logp)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@specs
@pytest.mark.parametrize("beta", [1e-3, 0.005])
def test_large_rewards_over_a_small_beta(spec: ObjectiveSpec, beta: float) -> None:
    logp, logp_ref, reward = batch(4, torch.float32)
    loss, _ = ftb_loss(logp, logp_ref, reward, replace(spec, beta=beta), denominator=48)
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(logp.grad.isfinite().all())
    best = reward.argmax(-1, keepdim=True)
    assert bool((logp.grad.gather(-1, best) < 0).all()), "descent must raise the best completion of each group"


def test_estimates_vanish_at_the_target_and_agree_near_it() -> None:
    shift = torch.arange(6, dtype=torch.float64).unsqueeze(-1).expand(6, 8)
    assert set(divergence_estimates(shift)) == {f"divergence/{name}" for name in FAMILY}
    assert max(map(abs, divergence_estimates(shift, 0.3).values())) < 1e-14
    noise = 1e-3 * batch(5)[1]
    near = divergence_estimates(shift + noise, 0.3)
    tv = near.pop("divergence/tv")
    assert list(near.values()) == pytest.approx([noise.var(-1, unbiased=False).mean().item() / 2] * 7, rel=1e-2)
    assert tv == pytest.approx((noise - noise.median(-1, keepdim=True).values).abs().mean().item(), rel=1e-9)


def test_estimates_are_finite_however_far() -> None:
    estimates = divergence_estimates(1e4 * batch(6)[1].float(), 3.0)
    assert all(math.isfinite(value) and value > 0 for value in estimates.values())

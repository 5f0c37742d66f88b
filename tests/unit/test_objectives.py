import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.objectives import argument, delta, ftb_loss
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


@specs
def test_a_constant_per_prompt_in_the_reward_changes_no_gradient(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = batch(7)
    (gradient,) = torch.autograd.grad(ftb_loss(logp, logp_ref, reward, spec, denominator=48)[0], logp)
    moved = reward + torch.linspace(-3, 3, 6, dtype=torch.float64).unsqueeze(-1)
    (same,) = torch.autograd.grad(ftb_loss(logp, logp_ref, moved, spec, denominator=48)[0], logp)
    torch.testing.assert_close(same, gradient, rtol=1e-9, atol=1e-13)


@specs
def test_the_order_of_completions_and_groups_changes_nothing(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = batch(8)
    loss, _ = ftb_loss(logp, logp_ref, reward, spec, denominator=48)
    (gradient,) = torch.autograd.grad(loss, logp)
    generator = torch.Generator().manual_seed(0)
    g, k = torch.randperm(6, generator=generator), torch.randperm(8, generator=generator)
    shuffled = [tensor.detach()[g][:, k] for tensor in (logp, logp_ref, reward)]
    loss_there, _ = ftb_loss(shuffled[0].requires_grad_(), *shuffled[1:], spec, denominator=48)
    (gradient_there,) = torch.autograd.grad(loss_there, shuffled[0])
    assert loss_there.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient_there, gradient[g][:, k], rtol=1e-9, atol=1e-14)


@specs
def test_ranks_sum_to_the_whole(spec: ObjectiveSpec) -> None:
    """Each rank holds whole groups and divides by the completions of all ranks."""
    logp, logp_ref, reward = batch(9)
    (gradient,) = torch.autograd.grad(ftb_loss(logp, logp_ref, reward, spec, denominator=48)[0], logp)
    for rank in range(3):
        own = slice(2 * rank, 2 * rank + 2)
        local = logp.detach()[own].requires_grad_()
        (part,) = torch.autograd.grad(ftb_loss(local, logp_ref[own], reward[own], spec, denominator=48)[0], local)
        torch.testing.assert_close(part, gradient[own], rtol=1e-12, atol=1e-15)


def test_kimis_squared_loss_is_the_tempered_reverse_kl() -> None:
    """((r - c) - tau log(pi / pi_ref))^2 over 2 tau, with c the mean of the residual over the group."""
    logp, logp_ref, reward = batch(10)
    tau = SPEC.beta
    residual = reward - tau * (logp - logp_ref)
    squared = (residual - residual.mean(-1, keepdim=True).detach()).square().mean() / (2 * tau)
    ours, _ = ftb_loss(logp, logp_ref, reward, replace(SPEC, tempered=True), denominator=48)
    assert ours.item() == pytest.approx(squared.item(), rel=1e-12)
    (expected,) = torch.autograd.grad(squared, logp)
    (gradient,) = torch.autograd.grad(ours, logp)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@specs
def test_a_learned_log_z_takes_the_place_of_the_normaliser(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = batch(11)
    member = get_divergence(spec.divergence, spec.alpha)
    x = argument(logp.detach(), logp_ref, reward, spec)
    own = member.log_z(x)
    same, _ = ftb_loss(logp, logp_ref, reward, spec, log_z_G=own, denominator=48)
    batchwise, _ = ftb_loss(logp, logp_ref, reward, spec, denominator=48)
    assert same.item() == pytest.approx(batchwise.item(), rel=1e-12)
    log_z = own + 0.3
    loss, _ = ftb_loss(logp, logp_ref, reward, spec, log_z_G=log_z, denominator=48)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, member.slope(x + log_z.unsqueeze(-1)) / 48, rtol=1e-10, atol=1e-14)


def test_a_learned_log_z_far_off_gives_a_finite_gradient_of_the_right_sign() -> None:
    logp = torch.zeros(1, 4, requires_grad=True)
    for name in FAMILY:
        for far in (-1e4, 1e4):
            loss, _ = ftb_loss(logp, logp.detach(), logp.detach(), replace(SPEC, divergence=name), log_z_G=torch.tensor([far]).double(), denominator=4)
            (gradient,) = torch.autograd.grad(loss, logp)
            assert bool(gradient.isfinite().all())
            assert bool(gradient.square().sum().isfinite())
            assert gradient.sign().unique().tolist() == [math.copysign(1.0, far)]


@specs
@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_groups(spec: ObjectiveSpec, size: int) -> None:
    """One completion says nothing about its prompt's distribution; two pull against each other."""
    logp = torch.tensor([[1.0, 3.0]], dtype=torch.float64)[:, :size].requires_grad_()
    loss, _ = ftb_loss(logp, torch.zeros_like(logp), torch.zeros_like(logp), spec, denominator=size)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.sum().abs().item() <= 1e-12
    assert gradient.sign().tolist() == ([[0.0]] if size == 1 else [[-1.0, 1.0]])


@specs
def test_equal_completions_and_masked_out_groups_teach_nothing(spec: ObjectiveSpec) -> None:
    logp, logp_ref, reward = (torch.full((2, 4), value, dtype=torch.float64) for value in (-5.0, -6.0, 1.0))
    logp.requires_grad_()
    mask = torch.tensor([[True] * 4, [False] * 4])
    loss, _ = ftb_loss(logp, logp_ref, reward, spec, mask, denominator=4)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert abs(loss.item()) <= 1e-12
    assert gradient.abs().max().item() <= 1e-12

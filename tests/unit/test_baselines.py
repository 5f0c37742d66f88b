"""The baselines on distributions that can be enumerated: a group that holds each outcome as often as the sampler draws it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ftb_llm.baselines import BASELINES, Samples
from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.objectives import ftb_loss
from ftb_llm.types import ObjectiveSpec

SPEC = ObjectiveSpec(kind="ppo_clip", divergence="reverse_kl", alpha=None, beta=0.5, tempered=False)
COUNTS = (1, 2, 3, 4, 5, 1)  # the sampler's probabilities, in sixteenths
BEHAVIOUR = (torch.tensor(COUNTS, dtype=torch.float64) / 16).log()
baselines = pytest.mark.parametrize("kind", BASELINES)


def outcomes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Policy logits, log-probs of the reference, rewards of six outcomes."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference, reward = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.log_softmax(reference, 0), reward


def enumerated(logp: Tensor, reference: Tensor, reward: Tensor, behaviour: Tensor, counts: tuple[int, ...]) -> Samples:
    """One group in which outcome i of one token stands counts[i] times."""
    rows = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    return Samples(
        logp_GKT=logp[rows].view(1, -1, 1),
        logp_ref_GKT=reference[rows].view(1, -1, 1),
        reward_GK=reward[rows].view(1, -1),
        behaviour_GK=behaviour[rows].view(1, -1),
        behaviour_GKT=behaviour[rows].view(1, -1, 1),
        token_mask_GKT=torch.ones(1, len(rows), 1, dtype=torch.bool),
        mask_GK=torch.ones(1, len(rows), dtype=torch.bool),
    )


def gradient(kind: str, samples: Samples, logits: Tensor, spec: ObjectiveSpec = SPEC) -> Tensor:
    loss, metrics = BASELINES[kind](samples, replace(spec, kind=kind), denominator=samples.reward_GK.numel())
    assert metrics["optim/loss"] == pytest.approx(loss.item())
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def penalised_reward_gradient(logits: Tensor, reference: Tensor, reward: Tensor) -> Tensor:
    """grad of -(E[r] - beta KL(policy || reference))."""
    logp = torch.log_softmax(logits, 0)
    objective = (logp.exp() * (reward - SPEC.beta * (logp - reference))).sum()
    return torch.autograd.grad(-objective, logits)[0]


@pytest.mark.parametrize("kind", ["ppo_clip", "reinforce"])
def test_on_the_policys_own_samples_the_gradient_is_that_of_the_penalised_reward(kind: str) -> None:
    """A policy whose probabilities are sixteenths samples itself exactly."""
    _, reference, reward = outcomes()
    logits = BEHAVIOUR.clone().requires_grad_()
    samples = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR, COUNTS)
    torch.testing.assert_close(gradient(kind, samples, logits), penalised_reward_gradient(logits, reference, reward), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [*FAMILY, "alpha"])
def test_importance_weights_give_the_divergence_gradient_on_stale_samples(name: str) -> None:
    """E_mu[(p / mu) f'(p / q) grad log p] = grad D_f, whoever sampled."""
    divergence = get_divergence(name, 0.75 if name == "alpha" else None)
    logits, reference, reward = outcomes(1)
    spec = replace(SPEC, divergence=name, alpha=0.75 if name == "alpha" else None)
    samples = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR, COUNTS)
    log_target = torch.log_softmax(reference + reward / SPEC.beta, 0)
    logp = torch.log_softmax(logits, 0)
    exact = (log_target.exp() * divergence.generator((logp - log_target).exp())).sum()
    torch.testing.assert_close(gradient("importance", samples, logits, spec), torch.autograd.grad(exact, logits)[0], rtol=1e-10, atol=1e-12)


def test_reinforce_on_its_own_samples_is_the_tempered_reverse_kl() -> None:
    _, reference, reward = outcomes()
    logits = BEHAVIOUR.clone().requires_grad_()
    samples = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR, COUNTS)
    spec = replace(SPEC, tempered=True)
    loss, _ = ftb_loss(samples.logp_GKT.sum(-1), samples.logp_ref_GKT.sum(-1), samples.reward_GK, spec, denominator=16)
    torch.testing.assert_close(gradient("reinforce", samples, logits), torch.autograd.grad(loss, logits)[0], rtol=1e-10, atol=1e-14)


def test_ppo_clip_by_hand() -> None:
    """Two completions of two tokens; advantages 1 and -1. Ratios: 1.5 (cut), 1.0; 0.5 (cut), 1.1."""
    logp = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([[[1.5, 1.0], [0.5, 1.1]]], dtype=torch.float64)
    behaviour = -ratios.log()
    samples = Samples(
        logp_GKT=logp,
        logp_ref_GKT=behaviour,  # so that no KL stands in the reward
        reward_GK=torch.tensor([[3.0, 1.0]], dtype=torch.float64),
        behaviour_GK=behaviour.sum(-1),
        behaviour_GKT=behaviour,
        token_mask_GKT=torch.ones(1, 2, 2, dtype=torch.bool),
        mask_GK=torch.ones(1, 2, dtype=torch.bool),
    )
    loss, metrics = BASELINES["ppo_clip"](samples, SPEC, denominator=2)
    assert loss.item() == pytest.approx(-(1.2 + 1.0 - 0.8 - 1.1) / 2)
    assert metrics["off_policy/clipped_share"] == 0.5
    (got,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(got, torch.tensor([[[0.0, -0.5], [0.0, 0.55]]], dtype=torch.float64))


def test_grpo_by_hand() -> None:
    """Advantages +-1 after division by the spread; token means; beta times e^d - d - 1 with d = log ref - log p."""
    logp = torch.tensor([[[-1.0, -2.0], [-1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    samples = Samples(
        logp_GKT=logp,
        logp_ref_GKT=torch.tensor([[[-1.5, -2.0], [-1.0, 0.0]]], dtype=torch.float64),
        reward_GK=torch.tensor([[8.0, 2.0]], dtype=torch.float64),
        behaviour_GK=logp.detach().sum(-1),
        behaviour_GKT=logp.detach(),
        token_mask_GKT=torch.tensor([[[True, True], [True, False]]]),
        mask_GK=torch.ones(1, 2, dtype=torch.bool),
    )
    loss, metrics = BASELINES["grpo"](samples, SPEC, denominator=2)
    advantage, k3 = 3 / 3.0001, math.exp(-0.5) + 0.5 - 1
    assert loss.item() == pytest.approx(-((2 * advantage - 0.5 * k3) / 2 - advantage) / 2)
    assert metrics["off_policy/clipped_share"] == 0
    (got,) = torch.autograd.grad(loss, logp)
    assert got.flatten().tolist() == pytest.approx([-(advantage - 0.5 * (1 - math.exp(-0.5))) / 4, -advantage / 4, advantage / 2, 0.0])


@pytest.mark.parametrize("far", [30.0, 1e4])
def test_grpo_is_pulled_back_however_far_the_policy_has_gone(far: float) -> None:
    """A token that the reference finds e^far times as likely: finite, and descent makes it likelier."""
    logp = torch.tensor([[[-far], [-1.0]]], requires_grad=True)
    known = {"behaviour_GK": logp.detach().double().sum(-1), "behaviour_GKT": logp.detach().double(), "mask_GK": torch.ones(1, 2, dtype=torch.bool)}
    samples = Samples(
        logp_GKT=logp,
        logp_ref_GKT=torch.tensor([[[0.0], [-1.0]]]),
        reward_GK=torch.zeros(1, 2).double(),
        token_mask_GKT=torch.ones(1, 2, 1, dtype=torch.bool),
        **known,
    )
    loss, _ = BASELINES["grpo"](samples, SPEC, denominator=2)
    (got,) = torch.autograd.grad(loss, logp)
    assert math.isfinite(loss.item())
    assert math.isfinite(got.square().sum().item())
    assert got[0, 0, 0].item() < -1e6


@baselines
def test_each_baseline_reads_the_behaviour_logprobs(kind: str) -> None:
    logits, reference, reward = outcomes(2)
    samples = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR, COUNTS)
    moved = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR + torch.linspace(-1, 1, 6).double(), COUNTS)
    assert not torch.allclose(gradient(kind, samples, logits), gradient(kind, moved, logits), atol=1e-3)


@baselines
def test_masked_completions_do_not_exist(kind: str) -> None:
    logits, reference, reward = outcomes(3)
    whole = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR, COUNTS)
    mask = torch.arange(16).view(1, -1) < 11
    masked = replace(whole, mask_GK=mask, reward_GK=torch.where(mask, whole.reward_GK, 1e6))
    fewer = Samples(**{name: getattr(whole, name)[:, :11] for name in whole.__slots__})
    loss, _ = BASELINES[kind](masked, SPEC, denominator=11)
    expected, _ = BASELINES[kind](fewer, SPEC, denominator=11)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    nothing, _ = BASELINES[kind](replace(whole, mask_GK=torch.zeros_like(mask)), SPEC, denominator=1)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max().item() == 0


@baselines
@pytest.mark.parametrize("far", [200.0, 1e4])
def test_hopelessly_stale_samples_give_finite_numbers(kind: str, far: float) -> None:
    logits, reference, reward = outcomes(4)
    samples = enumerated(torch.log_softmax(logits, 0), reference, reward, BEHAVIOUR + far * torch.tensor([1, -1, 0, 0, 1, -1.0]).double(), COUNTS)
    loss, metrics = BASELINES[kind](samples, SPEC, denominator=16)
    assert math.isfinite(loss.item())
    assert all(map(math.isfinite, metrics.values()))
    assert bool(torch.autograd.grad(loss, logits)[0].isfinite().all())

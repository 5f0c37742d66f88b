"""What the family is claimed to do, on distributions small enough to sum over.

The references are written here once more, straight from the table of formulas, and share nothing with the module: f as a
function of u, L and L' of Delta. A distribution with probabilities n_y / N is a group that repeats outcome y n_y times, so
a group stands for an infinite batch, exactly.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftb_llm.divergences import CustomDivergence, Divergence, get_divergence

Formula = Callable[[Tensor], Tensor]
LOG_2 = math.log(2)
WIDTH = 0.3


def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], by Golub and Welsch: from the eigenvectors of the Jacobi matrix."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / torch.sqrt(4 * k.square() - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0].square()


NODES, WEIGHTS = gauss_legendre(100)


def integral(function: Formula, end: Tensor) -> Tensor:
    """From 0 to `end`, elementwise; differentiable in `end`."""
    end = end.unsqueeze(-1)
    return (end * WEIGHTS * function(end * NODES)).sum(-1)


def dilogarithm(delta: Tensor) -> Tensor:
    """Li2(-e^delta), whose derivative is -log(1 + e^delta)."""
    return -(math.pi**2) / 12 - integral(torch.nn.functional.softplus, delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    member: Divergence
    f: Formula
    slope: Formula
    loss: Formula


def alpha(a: float, member: Divergence | None = None) -> Member:
    return Member(
        member=member or get_divergence("alpha", a),
        f=lambda u: (u**a - 1 - a * (u - 1)) / (a * (a - 1)),
        slope=lambda d: (torch.exp((a - 1) * d) - 1) / (a - 1),
        loss=lambda d: (torch.exp((a - 1) * d) - (a - 1) * d - 1) / (a - 1) ** 2,
    )


MEMBERS = {
    "reverse_kl": Member(member=get_divergence("reverse_kl"), f=lambda u: u * u.log() - u + 1, slope=lambda d: d, loss=lambda d: d**2 / 2),
    "forward_kl": Member(
        member=get_divergence("forward_kl"), f=lambda u: -u.log() + u - 1, slope=lambda d: 1 - torch.exp(-d), loss=lambda d: torch.exp(-d) + d - 1
    ),
    "pearson": Member(member=get_divergence("pearson"), f=lambda u: (u - 1) ** 2 / 2, slope=lambda d: torch.exp(d) - 1, loss=lambda d: torch.exp(d) - d - 1),
    "neyman": Member(
        member=get_divergence("neyman"),
        f=lambda u: (u - 1) ** 2 / (2 * u),
        slope=lambda d: (1 - torch.exp(-2 * d)) / 2,
        loss=lambda d: torch.exp(-2 * d) / 4 + d / 2 - 1 / 4,
    ),
    "hellinger": Member(
        member=get_divergence("hellinger"),
        f=lambda u: 2 * (torch.sqrt(u) - 1) ** 2,
        slope=lambda d: 2 * (1 - torch.exp(-d / 2)),
        loss=lambda d: 4 * torch.exp(-d / 2) + 2 * d - 4,
    ),
    "alpha=-0.5": alpha(-0.5),
    "alpha=0.75": alpha(0.75),
    "alpha=1.2": alpha(1.2),
    "alpha=3": alpha(3.0),
    "tv": Member(member=get_divergence("tv"), f=lambda u: (u - 1).abs(), slope=torch.sign, loss=torch.abs),
    "js": Member(
        member=get_divergence("js"),
        f=lambda u: 2 * (u * u.log() - (u + 1) * torch.log((u + 1) / 2)),
        slope=lambda d: 2 * (LOG_2 - torch.nn.functional.softplus(-d)),
        loss=lambda d: 2 * d * LOG_2 + d**2 + 2 * dilogarithm(d) + math.pi**2 / 6,
    ),
    "smoothed tv": Member(
        member=get_divergence("tv", width=WIDTH),
        f=lambda u: integral(lambda t: torch.tanh(t / WIDTH) * torch.exp(t), u.log()),
        slope=lambda d: torch.tanh(d / WIDTH),
        loss=lambda d: WIDTH * torch.log(torch.cosh(d / WIDTH)),
    ),
    "custom": Member(
        member=CustomDivergence(slope=lambda d: d / torch.sqrt(1 + d**2), loss=lambda d: d**2 / (1 + torch.sqrt(1 + d**2))),
        f=lambda u: integral(lambda t: t / torch.sqrt(1 + t**2) * torch.exp(t), u.log()),
        slope=lambda d: d / torch.sqrt(1 + d**2),
        loss=lambda d: torch.sqrt(1 + d**2) - 1,
    ),
    "custom f'": Member(
        member=CustomDivergence.from_derivative(lambda u: 1 - 4 / (1 + u) ** 2),
        f=lambda u: (u - 1) ** 2 / (u + 1),
        slope=lambda d: 1 - 4 / (1 + torch.exp(d)) ** 2,
        loss=lambda d: integral(lambda t: 1 - 4 / (1 + torch.exp(t)) ** 2, d),
    ),
}
ALPHAS = {"reverse_kl": 1.0, "forward_kl": 0.0, "pearson": 2.0, "neyman": -1.0, "hellinger": 0.5}
ALPHAS |= {name: float(name.removeprefix("alpha=")) for name in MEMBERS if name.startswith("alpha=")}
members = pytest.mark.parametrize("name", MEMBERS)
SIZES = torch.tensor([0.01, 0.05, 0.3, 1.0, 2.5, 6.0, 12.0], dtype=torch.float64)
DELTAS = torch.cat([-SIZES.flip(0), SIZES])


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, 0).item()


# The formulas.


@members
def test_loss_is_the_integral_of_the_slope(name: str) -> None:
    torch.testing.assert_close(MEMBERS[name].member.loss(DELTAS), integral(MEMBERS[name].slope, DELTAS), rtol=1e-12, atol=0)


@members
def test_slope_is_the_autograd_of_the_closed_form(name: str) -> None:
    leaf = DELTAS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(MEMBERS[name].loss(leaf).sum(), leaf)
    torch.testing.assert_close(MEMBERS[name].member.slope(DELTAS), expected, rtol=1e-12, atol=1e-14)


@members
def test_gradient_of_the_loss_is_the_slope_also_in_the_mean_of_a_group(name: str) -> None:
    leaf = DELTAS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MEMBERS[name].member.loss(leaf).mean(), leaf)
    torch.testing.assert_close(gradient, MEMBERS[name].slope(DELTAS) / len(DELTAS), rtol=1e-12, atol=1e-15)


@members
def test_generator_is_f_and_its_derivative_is_the_slope_at_log_u(name: str) -> None:
    u = torch.tensor([1e-3, 0.2, 0.9, 1.1, 3.0, 50.0], dtype=torch.float64, requires_grad=True)
    f = MEMBERS[name].f(u)
    (derivative,) = torch.autograd.grad(f.sum(), u)
    at_one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (constant,) = torch.autograd.grad(MEMBERS[name].f(at_one).sum(), at_one)
    torch.testing.assert_close(MEMBERS[name].member.generator(u.detach()), f.detach(), rtol=1e-12, atol=1e-15)
    if name != "tv":  # its f has no derivative at 1
        assert constant.item() == 0
    torch.testing.assert_close(MEMBERS[name].member.slope(u.detach().log()), derivative, rtol=1e-11, atol=1e-14)


# On policy.


def problem(seed: int, outcomes: int = 7) -> tuple[Tensor, Tensor]:
    """Logits of the policy, and the log of an unnormalised target."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outcomes, generator=generator, dtype=torch.float64), 2 + torch.randn(outcomes, generator=generator, dtype=torch.float64)


def divergence_gradient(f: Formula, theta: Tensor, reward: Tensor) -> Tensor:
    """grad_theta sum_y q(y) f(p(y) / q(y))."""
    leaf = theta.clone().requires_grad_()
    q = torch.softmax(reward, 0)
    (gradient,) = torch.autograd.grad((q * f(torch.softmax(leaf, 0) / q)).sum(), leaf)
    return gradient


def expected_gradient(weight: Tensor, theta: Tensor) -> Tensor:
    """sum_y p(y) w(y) grad log p(y), in logits."""
    p = torch.softmax(theta, 0)
    return p * weight - p * (p * weight).sum()


@members
def test_on_policy_gradient_with_the_true_log_z_is_that_of_the_divergence(name: str) -> None:
    for seed in range(20):
        theta, reward = problem(seed)
        delta = (torch.log_softmax(theta, 0) - reward + reward.logsumexp(0)).requires_grad_()
        (slope,) = torch.autograd.grad(MEMBERS[name].member.loss(delta).sum(), delta)
        truth = divergence_gradient(MEMBERS[name].f, theta, reward)
        torch.testing.assert_close(expected_gradient(slope, theta), truth, rtol=1e-10, atol=1e-10 * truth.abs().max().item())


def infinite_batch(seed: int, spread: float = 1.0, outcomes: int = 6, size: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A policy with probabilities n_y / N: its logits, the unnormalised log target, and the batch that has y n_y times."""
    generator = torch.Generator().manual_seed(seed)
    counts = 1 + torch.multinomial(torch.rand(outcomes, generator=generator) + 0.05, size - outcomes, True, generator=generator).bincount(minlength=outcomes)
    reward = spread * torch.randn(outcomes, generator=generator, dtype=torch.float64)
    return counts.double().log(), reward, torch.repeat_interleave(torch.arange(outcomes), counts)


def devgrad(member: Divergence, theta: Tensor, reward: Tensor, batch: Tensor) -> Tensor:
    """The DevGrad gradient of the infinite on-policy batch."""
    delta = torch.log_softmax(theta, 0) - reward
    weights = torch.zeros_like(theta)
    weights[batch] = member.weights(delta[batch])
    return expected_gradient(weights, theta)


@pytest.mark.parametrize("name", ALPHAS)
def test_devgrad_of_an_alpha_member_is_parallel_to_its_divergence(name: str) -> None:
    """With the factor 1 / sum p^a q^(1-a), which is 1 for the two KLs: their gradients match exactly."""
    for seed in range(20):
        theta, reward, batch = infinite_batch(seed)
        p, q = torch.softmax(theta, 0), torch.softmax(reward, 0)
        factor = 1 / (p ** ALPHAS[name] * q ** (1 - ALPHAS[name])).sum()
        truth = divergence_gradient(MEMBERS[name].f, theta, reward)
        torch.testing.assert_close(devgrad(MEMBERS[name].member, theta, reward, batch), factor * truth, rtol=1e-9, atol=1e-11 * truth.abs().max().item())


def test_devgrad_of_js_is_close_to_its_divergence_but_not_parallel() -> None:
    """Close where policy and target are of one scale; the further apart they are, the less."""

    def cosines(spread: float) -> list[float]:
        problems = [infinite_batch(seed, spread) for seed in range(200)]
        js = MEMBERS["js"]
        return [cosine(devgrad(js.member, theta, reward, batch), divergence_gradient(js.f, theta, reward)) for theta, reward, batch in problems]

    near, far = cosines(1.0), cosines(3.0)
    assert 0.9 < min(near) < 0.99
    assert 0 < min(far) < min(near)


def test_devgrad_of_tv_can_point_the_wrong_way() -> None:
    """One outcome has most of the policy, so the median puts its Delta to zero, and its small subgradient pays for the rest."""
    counts, tv = torch.tensor([3, 20, 3, 1]), MEMBERS["tv"]
    theta, reward = counts.double().log(), torch.tensor([2.0, 15.0, 1.0, 12.0], dtype=torch.float64).log()
    batch = torch.repeat_interleave(torch.arange(4), counts)
    weights = tv.member.weights((theta - reward)[batch])
    assert weights.unique().tolist() == [-1.0, -0.25, 1.0]
    assert cosine(devgrad(tv.member, theta, reward, batch), divergence_gradient(tv.f, theta, reward)) < -0.25


def pairs_gradient(member: Divergence, theta: Tensor, reward: Tensor, size: int) -> Tensor:
    """The expected DevGrad gradient of groups of `size`, over every group that there is."""
    p = torch.softmax(theta, 0)
    scores = torch.eye(len(p), dtype=torch.float64) - p
    group = torch.tensor(list(itertools.product(range(len(p)), repeat=size)))
    weights = member.weights((torch.log_softmax(theta, 0) - reward)[group])
    return (p[group].prod(-1, keepdim=True) * (weights.unsqueeze(-1) * scores[group]).mean(-2)).sum(0)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_groups_of_reverse_kl_shorten_the_gradient(size: int) -> None:
    """VarGrad: exactly (B - 1) / B of grad KL."""
    theta, reward = problem(0, outcomes=5)
    truth = divergence_gradient(MEMBERS["reverse_kl"].f, theta, reward)
    torch.testing.assert_close(pairs_gradient(MEMBERS["reverse_kl"].member, theta, reward, size), (size - 1) / size * truth, rtol=1e-11, atol=1e-13)


def test_small_groups_of_forward_kl_turn_the_gradient() -> None:
    """Self-normalised weights are biased: the expected gradient of small groups points elsewhere, less so as they grow."""
    theta, reward = problem(19, outcomes=4)
    forward_kl = MEMBERS["forward_kl"]
    truth = divergence_gradient(forward_kl.f, theta, reward)
    cosines = [cosine(pairs_gradient(forward_kl.member, theta, reward, size), truth) for size in (2, 4, 6)]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.5
    assert cosines[-1] < 0.8


# Off policy.

TARGET = torch.tensor([0.0, 2.0, -1.5, 1.0, -0.5, 3.0, -2.0, 0.5], dtype=torch.float64)  # unnormalised log q
BEHAVIOURS = {"uniform": (4,) * 8, "peaked away from the target": (2, 1, 20, 1, 2, 1, 36, 1), "an old policy": (9, 3, 4, 16, 1, 2, 3, 2)}


def trained(member: Divergence, counts: Sequence[int]) -> Tensor:
    """The policy to which the DevGrad loss of batches from one frozen behaviour policy leads, from uniform."""
    batch = torch.repeat_interleave(torch.arange(8), torch.tensor(counts))
    theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        delta = (torch.log_softmax(theta, 0) - TARGET)[batch]
        loss = member.loss(delta + member.log_z(delta).unsqueeze(-1)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(theta.detach(), 0)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "tv"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_whoever_sampled_the_minimiser_is_the_target(name: str, behaviour: str) -> None:
    """tv itself has this minimiser too, but signs don't shrink on the way to it; its smoothed form converges."""
    torch.testing.assert_close(trained(MEMBERS[name].member, BEHAVIOURS[behaviour]), torch.softmax(TARGET, 0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_tv_has_its_least_loss_at_the_target(behaviour: str) -> None:
    """The loss is convex and piecewise linear in the logits, so it is enough that it grows in every direction from the target."""
    tv, batch = MEMBERS["tv"].member, torch.repeat_interleave(torch.arange(8), torch.tensor(BEHAVIOURS[behaviour]))
    moved = 0.1 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = torch.log_softmax(TARGET + moved, -1)[:, batch] - TARGET[batch]
    assert tv.loss(delta + tv.log_z(delta).unsqueeze(-1)).mean(-1).min().item() > 1e-4
    assert tv.weights(torch.log_softmax(TARGET, 0)[batch] - TARGET[batch]).abs().max().item() <= 1


# The batch normaliser.


def bisected(slope: Formula, delta: Tensor, halvings: int = 200) -> Tensor:
    """The root of the mean slope in [-max, -min], by halving it until no float is left."""
    low, high = -delta.amax(-1, keepdim=True), -delta.amin(-1, keepdim=True)
    for _ in range(halvings):
        middle = (low + high) / 2
        positive = slope(delta + middle).mean(-1, keepdim=True) > 0
        low, high = torch.where(positive, low, middle), torch.where(positive, middle, high)
    return (low + high).squeeze(-1) / 2


@pytest.mark.parametrize("name", [name for name in MEMBERS if name != "tv"])
@pytest.mark.parametrize("size", [1, 2, 3, 16, 101])
def test_log_z_is_that_of_a_generic_solver(name: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    spread = torch.logspace(-3, 1, 40, dtype=torch.float64).unsqueeze(-1)
    if name == "smoothed tv":  # between values many widths apart its mean slope is flat to the last digit
        spread = 0.1 * spread
    delta = spread * torch.randn(40, size, generator=generator, dtype=torch.float64)
    slope = MEMBERS[name].slope if name != "js" else js_slope
    torch.testing.assert_close(MEMBERS[name].member.log_z(delta), bisected(slope, delta), rtol=1e-12, atol=1e-12)


def js_slope(delta: Tensor) -> Tensor:
    """That of the table, which doesn't lose its digits near 0 to the difference."""
    return 2 * torch.where(delta < 0, delta, 0.0) - 2 * torch.log1p(torch.expm1(-delta.abs()) / 2)


@pytest.mark.parametrize("size", [2, 3, 16, 64, 512])
def test_js_needs_no_more_steps_than_it_takes(size: int) -> None:
    """Groups made to slow Newton down: values at every scale on either side, outliers, ties, spreads of 1e4 and far beyond.

    The error is relative to c* itself, which is small where all that is large lies above it.
    """
    generator = torch.Generator().manual_seed(size)
    k, ones = torch.arange(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    scales = 2 ** (20 * k / size)
    outlier = torch.where(k == 0, 1.0, 0.0)
    groups = [scales, -scales, k * LOG_2, -k * LOG_2, (k + 1).log(), -(k + 1).log(), 1e4 * noise, 1e-6 * noise + 200, 3 * noise.round(), ones]
    groups += [sign * far * outlier for sign in (-1, 1) for far in (1.0, size * LOG_2 / 2, size * LOG_2, 1e4)]
    groups += [sign * 10 ** (300 * k / size) for sign in (-1, 1)]
    delta = torch.stack(groups)
    log_z, weights = MEMBERS["js"].member.normalise(delta)
    torch.testing.assert_close(log_z, bisected(js_slope, delta, halvings=1100), rtol=1e-12, atol=1e-12)
    assert bool((weights.sum(-1).abs() <= 1e-13 * weights.abs().sum(-1)).all())


@members
def test_devgrad_ignores_a_constant_and_the_order(name: str) -> None:
    """Powers of two, so that adding the constant rounds nothing."""
    delta = torch.randint(-(2**10), 2**10, (50, 16), generator=torch.Generator().manual_seed(0)).double() / 2**8
    member, order = MEMBERS[name].member, torch.randperm(16, generator=torch.Generator().manual_seed(1))
    log_z, weights = member.normalise(delta)
    tolerance = 1e-12 * weights.abs().max().item()
    torch.testing.assert_close(member.log_z(delta + 512), log_z - 512, rtol=1e-14, atol=0)
    torch.testing.assert_close(member.weights(delta + 512), weights, rtol=0, atol=tolerance)
    torch.testing.assert_close(member.log_z(delta[:, order]), log_z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(member.weights(delta[:, order]), weights[:, order], rtol=0, atol=tolerance)


# Extremes.


@members
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_groups_have_finite_gradients_of_the_right_sign(name: str, dtype: torch.dtype) -> None:
    """|Delta| = 1e4; rewards of 0 and 1 at r / beta = 200; one outlier either way; two completions."""
    member = MEMBERS[name].member
    for values in ([-1e4, 0.0, 1e4], [-10.0, -210.0, -12.0, -11.0, -208.0], [1e4, 0.1, 0.2, 0.3], [-1e4, 0.1, 0.2, 0.3], [-1e4, 1e4]):
        delta = torch.tensor(values, dtype=dtype, requires_grad=True)
        loss = member.loss(delta + member.log_z(delta)).mean()
        (gradient,) = torch.autograd.grad(loss, delta)
        weights = member.weights(delta)
        assert bool(loss.isfinite()) and loss.item() > 0
        assert bool(gradient.isfinite().all()) and bool(weights.isfinite().all())
        assert weights[delta.argmax()].item() > 0 > weights[delta.argmin()].item()


@members
def test_a_single_completion_and_equal_ones_have_nothing_to_say(name: str) -> None:
    member = MEMBERS[name].member
    for delta in (torch.tensor([[3.7], [-1e4], [0.0]], dtype=torch.float64), torch.tensor([[0.1] * 7, [-200.3] * 7, [1e4] * 7], dtype=torch.float64)):
        log_z, weights = member.normalise(delta)
        assert torch.equal(log_z, -delta[:, 0])
        assert bool((weights == 0).all())
        assert bool((member.loss(delta + log_z.unsqueeze(-1)) == 0).all())


@members
def test_two_completions_pull_equally(name: str) -> None:
    """Their weights are opposite, and as large as their distance asks."""
    delta = torch.tensor([[0.0, 1e-3], [0.0, 1.0], [-3.0, 5.0], [-1e4, 1e4]], dtype=torch.float64)
    weights = MEMBERS[name].member.weights(delta)
    torch.testing.assert_close(weights[:, 0], -weights[:, 1], rtol=1e-12, atol=0)
    assert bool((weights[:, 1] > 0).all())
    assert bool((weights[:, 1].diff() >= 0).all())


# Properties of any group.


@st.composite
def ragged_groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Groups on a grid of 2001 points with a step from 1e-9 to 8, so spreads from 1e-6 to 1e4; which completions count; a shift."""
    rows, size = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    step = 2.0 ** draw(st.integers(-30, 3))
    values = draw(st.lists(st.integers(-1000, 1000), min_size=rows * size, max_size=rows * size))
    known = draw(st.lists(st.booleans(), min_size=rows * size, max_size=rows * size))
    shift = draw(st.integers(-1000, 1000))
    return step * torch.tensor(values, dtype=torch.float64).view(rows, size), torch.tensor(known).view(rows, size), step * shift


@members
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(sample=ragged_groups(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_weights_of_any_group(name: str, sample: tuple[Tensor, Tensor, float], dtype: torch.dtype) -> None:
    delta, mask, shift = sample
    delta = delta.to(dtype)
    member = MEMBERS[name].member
    log_z, weights = member.normalise(delta, mask)
    assert log_z.dtype == weights.dtype == dtype
    assert bool(log_z.isfinite().all()) and bool(weights.isfinite().all())
    assert bool((weights[~mask] == 0).all())
    scale = weights.double().abs().amax(-1, keepdim=True)
    rounding = max(1e-10, torch.finfo(dtype).eps) * scale
    assert bool((weights.double().sum(-1, keepdim=True).abs() <= mask.sum(-1, keepdim=True) * rounding).all())
    check_signs_and_order(delta, mask, weights, rounding)
    order = torch.arange(delta.shape[-1]).flip(0)
    assert bool(((member.weights(delta[:, order], mask[:, order])[:, order] - weights).abs() <= 2 * rounding).all())
    if dtype == torch.float64:
        shifted_log_z, shifted = member.normalise(delta + shift, mask)
        assert bool(((shifted - weights).abs() <= rounding).all())
        torch.testing.assert_close(shifted_log_z, torch.where(mask.any(-1), log_z - shift, 0.0), rtol=1e-11, atol=1e-11 * delta.abs().max().item())


def check_signs_and_order(delta: Tensor, mask: Tensor, weights: Tensor, rounding: Tensor) -> None:
    """In each group, the weight grows with Delta, from below 0 to above, unless all are equal."""
    for row, known, weight, tolerance in zip(delta, mask, weights.double(), rounding, strict=True):
        ascending = weight[known][row[known].argsort()]
        if len(ascending) == 0 or bool(row[known].min() == row[known].max()):
            assert bool((ascending == 0).all())
        else:
            assert ascending[0].item() < 0 < ascending[-1].item()
            assert bool((ascending.diff() >= -tolerance).all())

"""What every member says of a step: against exact divergences, by hand, and at the extremes."""

import itertools
import math
import statistics
import time

import pytest
import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.shadow import shadow_metrics

QUANTITIES = ("estimate", "stderr", "loss", "weight_rms", "weight_max", "ess")
ALPHA = 0.75
MEMBERS = (*FAMILY, "alpha")


def exact_divergences(p: Tensor, q: Tensor) -> dict[str, float]:
    """D_f(p||q), each by its textbook formula."""
    middle = (p + q) / 2
    values = {
        "reverse_kl": (p * (p / q).log()).sum(),
        "forward_kl": (q * (q / p).log()).sum(),
        "pearson": ((p - q) ** 2 / q).sum() / 2,
        "neyman": ((p - q) ** 2 / p).sum() / 2,
        "hellinger": 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(),
        "tv": (p - q).abs().sum(),
        "js": 2 * (p * (p / middle).log()).sum() + 2 * (q * (q / middle).log()).sum(),
        "alpha": ((p**ALPHA * q ** (1 - ALPHA)).sum() - 1) / (ALPHA * (ALPHA - 1)),
    }
    return {name: value.item() for name, value in values.items()}


class Problem:
    """A policy and a target over 20 outcomes, and batches of Delta, which knows the target up to a constant per group."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        logits = 0.8 * torch.randn(2, 20, generator=self.random, dtype=torch.float64)
        self.policy, self.target = logits.softmax(-1)

    def delta(self, groups: int, size: int, sampler: Tensor | None = None) -> Tensor:
        sampler = self.policy if sampler is None else sampler
        outcome_GK = torch.multinomial(sampler, groups * size, replacement=True, generator=self.random).view(groups, size)
        return (self.policy / self.target).log()[outcome_GK] + 30 * torch.randn(groups, 1, generator=self.random, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_estimates_are_the_exact_divergences(seed: int) -> None:
    problem = Problem(seed)
    found = shadow_metrics(problem.delta(64, 4096), alpha=ALPHA)
    for name, exact in exact_divergences(problem.policy, problem.target).items():
        error = found[f"divergence/stderr/{name}"]
        assert abs(found[f"divergence/estimate/{name}"] - exact) < 4 * error < 0.1 * exact, name


@pytest.mark.parametrize(("groups", "size"), [(16, 64), (1, 512)], ids=["between groups", "within one group"])
def test_the_standard_error_is_how_far_estimates_spread(groups: int, size: int) -> None:
    problem = Problem()
    runs = [shadow_metrics(problem.delta(groups, size), alpha=ALPHA) for _ in range(200)]
    for name in MEMBERS:
        spread = statistics.stdev(run[f"divergence/estimate/{name}"] for run in runs)
        error = statistics.fmean(run[f"divergence/stderr/{name}"] for run in runs)
        assert 0.75 < error / spread < 1.25, name


def test_at_the_target_nothing_is_left() -> None:
    delta_GK = torch.tensor([[-3.1], [0.1], [200.7]], dtype=torch.float64).expand(3, 32)
    found = shadow_metrics(delta_GK, alpha=ALPHA)
    assert max(map(abs, found.values())) < 1e-12
    assert all(found[f"divergence/ess/{name}"] == 0 for name in MEMBERS)
    assert all(value == 0 for name, value in found.items() if name.startswith("divergence/cosine/"))


def test_on_stale_samples_estimates_are_positive_until_the_target_is_reached() -> None:
    problem = Problem()
    stale = torch.randn(20, generator=problem.random, dtype=torch.float64).softmax(-1)
    found = shadow_metrics(problem.delta(8, 32, sampler=stale), alpha=ALPHA)
    assert all(found[f"divergence/estimate/{name}"] > 0.01 for name in MEMBERS)


def test_reverse_kl_is_estimated_by_the_loss_of_forward_kl() -> None:
    """f(u) / u of the one is L of the other, and both put the group's log Z at logmeanexp(-Delta)."""
    found = shadow_metrics(Problem().delta(8, 32))
    assert found["divergence/estimate/reverse_kl"] == pytest.approx(found["divergence/loss/forward_kl"], rel=1e-12)


def test_losses_and_weights_are_those_of_each_member() -> None:
    delta_GK = Problem().delta(8, 32)
    mask_GK = torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) < 0.7
    found = shadow_metrics(delta_GK, mask_GK, alpha=ALPHA)
    weights = {}
    for name in MEMBERS:
        member = get_divergence(name, ALPHA if name == "alpha" else None)
        weights[name] = weight_N = member.weights(delta_GK, mask_GK)[mask_GK]
        loss_N = member.loss(delta_GK + member.log_z(delta_GK, mask_GK).unsqueeze(-1))[mask_GK]
        expected = {
            "loss": loss_N.mean(),
            "weight_rms": weight_N.square().mean().sqrt(),
            "weight_max": weight_N.abs().max(),
            "ess": weight_N.abs().sum() ** 2 / weight_N.square().sum(),
        }
        for quantity, value in expected.items():
            assert found[f"divergence/{quantity}/{name}"] == pytest.approx(value.item(), rel=1e-9), (quantity, name)
    for a, b in itertools.combinations(MEMBERS, 2):
        cosine = torch.cosine_similarity(weights[a], weights[b], dim=0).item()
        assert found[f"divergence/cosine/{a}:{b}"] == pytest.approx(cosine, rel=1e-9)


@pytest.mark.parametrize("near", [0.0, 1e-8, -1e-7, 1e-6, -1e-5])
def test_alpha_is_continuous_through_its_limits(near: float) -> None:
    delta_GK = Problem().delta(8, 32)
    found = shadow_metrics(delta_GK, alpha=1 + near)
    for quantity in QUANTITIES:
        assert found[f"divergence/{quantity}/alpha"] == pytest.approx(found[f"divergence/{quantity}/reverse_kl"], rel=1e-4), quantity
    found = shadow_metrics(delta_GK, alpha=near)
    for quantity in QUANTITIES:
        assert found[f"divergence/{quantity}/alpha"] == pytest.approx(found[f"divergence/{quantity}/forward_kl"], rel=1e-4), quantity


def test_cosine_and_effective_size_by_hand() -> None:
    """Weights of reverse KL are -2, -1, 3 around the mean 2, of tv -1, 0, 1 around the median."""
    found = shadow_metrics(torch.tensor([[0.0, 1.0, 5.0], [7.0, 7.0, 7.0]]))
    assert found["divergence/cosine/reverse_kl:tv"] == pytest.approx(5 / math.sqrt(14 * 2), rel=1e-12)
    assert found["divergence/ess/reverse_kl"] == pytest.approx(36 / 14, rel=1e-12)
    assert found["divergence/ess/tv"] == pytest.approx(2, rel=1e-12)
    assert found["divergence/weight_max/reverse_kl"] == pytest.approx(3, rel=1e-12)
    assert found["divergence/weight_rms/reverse_kl"] == pytest.approx(math.sqrt(14 / 6), rel=1e-12)
    assert found["divergence/loss/reverse_kl"] == pytest.approx(7 / 6, rel=1e-12)
    assert found["divergence/loss/tv"] == pytest.approx(5 / 6, rel=1e-12)


def test_an_estimate_by_hand() -> None:
    """r = e^-Delta is 1 and 3, so v is 1/2 and 3/2; the other group is at its target."""
    found = shadow_metrics(torch.tensor([[0.0, -math.log(3)], [4.0, 4.0]], dtype=torch.float64))
    one_group = {
        "reverse_kl": -(math.log(0.5) + math.log(1.5)) / 2,
        "forward_kl": (0.5 * math.log(0.5) + 1.5 * math.log(1.5)) / 2,
        "pearson": (0.25 / 0.5 + 0.25 / 1.5) / 4,
        "neyman": 0.25 / 2,
        "tv": 0.5,
    }
    for name, value in one_group.items():
        assert found[f"divergence/estimate/{name}"] == pytest.approx(value / 2, rel=1e-12), name
        assert found[f"divergence/stderr/{name}"] == pytest.approx(value / 2, rel=1e-12), name


def test_completions_that_do_not_count_change_nothing() -> None:
    delta_GK = Problem().delta(6, 16)
    padded_GK = torch.cat([delta_GK, torch.full((6, 3), math.nan, dtype=torch.float64)], -1)
    padded_GK = torch.cat([padded_GK, torch.full((1, 19), 1e4, dtype=torch.float64)])
    found = shadow_metrics(padded_GK, (padded_GK.isfinite() & (padded_GK < 1e4)), alpha=ALPHA)
    assert found == pytest.approx(shadow_metrics(delta_GK, alpha=ALPHA), rel=1e-9)


def test_one_group_that_counts_has_the_error_of_its_own_mean() -> None:
    delta_GK = Problem().delta(2, 16)
    mask_GK = torch.tensor([[True], [False]]).expand(2, 16)
    found = shadow_metrics(delta_GK, mask_GK, alpha=ALPHA)
    assert found == pytest.approx(shadow_metrics(delta_GK[:1], alpha=ALPHA), rel=1e-12)
    assert all(found[f"divergence/stderr/{name}"] > 0 for name in MEMBERS)


def test_the_metrics_have_their_names_also_when_nothing_counts() -> None:
    nothing = shadow_metrics(torch.full((4, 8), math.nan), torch.zeros(4, 8, dtype=torch.bool))
    names = [f"divergence/{quantity}/{name}" for quantity in QUANTITIES for name in FAMILY]
    names += [f"divergence/cosine/{a}:{b}" for a, b in itertools.combinations(FAMILY, 2)]
    assert nothing == dict.fromkeys(names, 0.0)
    with_alpha = shadow_metrics(torch.randn(4, 8), alpha=ALPHA)
    assert set(with_alpha) - set(names) == {f"divergence/{quantity}/alpha" for quantity in QUANTITIES} | {f"divergence/cosine/{name}:alpha" for name in FAMILY}


def extremes() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "spread 1e4": 1e4 * torch.randn(4, 32, generator=random, dtype=torch.float64),
        "both ends": torch.tensor([[-1e4, 1e4], [1e4, -1e4]], dtype=torch.float64),
        "one outlier": torch.cat([torch.zeros(3, 31, dtype=torch.float64), torch.full((3, 1), -1e4, dtype=torch.float64)], -1),
        "r / beta = 200": 200.0 * torch.randint(0, 2, (8, 16), generator=random),
        "all equal": torch.full((4, 8), 1e4),
        "one completion": torch.tensor([[3.0], [-1e4]]),
        "one completion in one group": torch.tensor([[1e4]]),
        "two completions in one group": torch.tensor([[-1e4, 1e4]]),
        "one large group": 1e4 * torch.randn(1, 64, generator=random),
        "float32 dust": 200 + 1e-6 * torch.randn(4, 8, generator=random),
    }


@pytest.mark.parametrize("alpha", [None, -3.0, 0.0, 1e-9, 1.0, 1 + 1e-9, 5.0])
@pytest.mark.parametrize("case", extremes())
def test_everything_is_finite_at_the_extremes(case: str, alpha: float | None) -> None:
    found = shadow_metrics(extremes()[case], alpha=alpha)
    assert all(math.isfinite(value) for value in found.values()), {name: value for name, value in found.items() if not math.isfinite(value)}
    for name, value in found.items():
        if name.startswith("divergence/cosine/"):
            assert -1 <= value <= 1, name
        else:
            assert value > -1e-9, name


def test_reverse_kl_is_not_cut_off_where_the_target_underflows() -> None:
    found = shadow_metrics(torch.tensor([[0.0, 1e4]], dtype=torch.float64), alpha=1.0)
    assert found["divergence/estimate/reverse_kl"] == found["divergence/estimate/alpha"] == pytest.approx(5000 - math.log(2), rel=1e-12)


def test_the_policys_gradient_is_left_alone() -> None:
    delta_GK = torch.randn(4, 8, requires_grad=True)
    shadow_metrics(delta_GK)
    assert delta_GK.grad is None


def test_it_takes_less_than_five_milliseconds() -> None:
    delta_GK = Problem().delta(8, 32)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        shadow_metrics(delta_GK)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005  # of the fastest: the others may have shared their core

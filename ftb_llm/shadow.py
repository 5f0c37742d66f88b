"""What every member of the family says about one step, whichever of them trains it.

All of it comes from one matrix, Delta. Shapes: `M` members, `G` groups of the step, `K` completions per group.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, AlphaDivergence, Divergence

_QUANTITIES = ("estimate", "stderr", "loss", "weight_rms", "weight_max", "ess")
_LARGEST = 1e140  # what is larger is reported as this: its square, summed over a step, is still a number


@torch.inference_mode()
def shadow_metrics(delta_GK: Tensor, mask_GK: Tensor | None = None, *, alpha: float | None = None) -> dict[str, float]:
    """Every member's loss, weights and estimated divergence on these samples: metrics under `divergence/`.

    For each member m of the family, and for `alpha` where given:

    - `loss/m`: the mean of L(Delta + c*) over the completions, what an untempered step with that member would report.
    - `weight_rms/m`, `weight_max/m`, of the weights w = L'(Delta + c*), and `ess/m = (sum |w|)^2 / sum w^2`: how many of the
      step's completions carry the gradient.
    - `cosine/a:b`: cosine of two members' weights over the whole step, in the family's order, alpha last.
    - `estimate/m` and `stderr/m`: an estimate of D_m(policy || target), averaged over the groups, and its standard error.

    The estimate of a group is the mean of f(u) / u with u = p / q = e^(Delta + log Z) and log Z = logmeanexp(-Delta), since
    D_f = E_q f(u) = E_p f(u) / u. On samples of the policy itself it tends to D_m as K grows; being self-normalised it is
    biased low by O(1 / K), and it can't see a mode of the target that no sample has hit. On stale samples it says how far
    Delta is from constant on those samples: at least 0, and 0 exactly when the policy is proportional to the target on
    them, but not D_m of the present policy. Scales are the family's: tv is sum |p - q|, twice the total variation distance,
    and js four times the usual Jensen-Shannon divergence. The error is that of a mean over independent groups; of a single
    group, that of its own mean to first order, and 0 for a single completion, which has nothing to be compared with.

    Every value is finite. Groups without a completion that counts are left out; with none left, every value is 0.
    """
    calls = _calls(alpha)
    place = {name: index for index, name in enumerate(name for call in calls for name in call.names)}
    names = sorted(place, key=[*FAMILY, "alpha"].index)
    samples = _Samples.of(delta_GK, mask_GK)
    if samples is None:
        quantities_QM, cosine_MM = [[0.0] * len(names)] * len(_QUANTITIES), [[0.0] * len(names)] * len(names)
    else:
        quantities_QM, cosine_MM = _measure(calls, samples)
    metrics = {f"divergence/{quantity}/{name}": row[place[name]] for quantity, row in zip(_QUANTITIES, quantities_QM, strict=True) for name in names}
    return metrics | {f"divergence/cosine/{a}:{b}": cosine_MM[place[a]][place[b]] for a, b in itertools.combinations(names, 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Members that are evaluated in one call. This one's generator is its own dual, f(u) = u f(1 / u), as in tv and js."""

    names: tuple[str, ...]
    member: Divergence

    def loss(self, x_1GK: Tensor, slope_MGK: Tensor) -> Tensor:
        """L(x), where the slope at x is known already."""
        return self.member.loss(x_1GK)

    def share(self, x_1GK: Tensor) -> Tensor:
        """f(u) / u at u = e^x."""
        return self.member.generator(1 + torch.expm1(-x_1GK))


@dataclass(frozen=True, slots=True, kw_only=True)
class _AlphaCall(_Call):
    """Several alphas. There, L_a = (L'_a - L'_1) / (a - 1) and f_a(u) / u = (L'_a - L'_0) / a: their slopes say it all.

    The first is 0 / 0 at a = 1, the second at a = 0; so near to it that digits are lost, the limit is the better number.
    """

    alpha_M11: Tensor

    def loss(self, x_MGK: Tensor, slope_MGK: Tensor) -> Tensor:
        s_M11 = self.alpha_M11 - 1
        limit_M11 = s_M11.abs() < 1e-6
        return torch.where(limit_M11, x_MGK.square() / 2, (slope_MGK - x_MGK) / s_M11.where(~limit_M11, 1.0))

    def share(self, x_1GK: Tensor) -> Tensor:
        limit_M11 = self.alpha_M11.abs() < 1e-6
        slope_1GK = -torch.expm1(-x_1GK)  # of forward KL
        limit_1GK = slope_1GK - (1 - slope_1GK) * x_1GK
        return torch.where(limit_M11, limit_1GK, (self.member.slope(x_1GK) - slope_1GK) / self.alpha_M11.where(~limit_M11, 1.0))


@lru_cache(maxsize=1)
def _calls(alpha: float | None) -> tuple[_Call, ...]:
    """The members of the alpha family together, the others one by one."""
    members = {name: make() for name, make in FAMILY.items()}
    alphas = {name: member.alpha for name, member in members.items() if isinstance(member, AlphaDivergence)}
    if alpha is not None:
        alphas["alpha"] = alpha
    alpha_M11 = torch.tensor(list(alphas.values()), dtype=torch.float64).view(-1, 1, 1)
    together = _AlphaCall(names=tuple(alphas), member=AlphaDivergence(alpha_M11), alpha_M11=alpha_M11)
    return (together, *(_Call(names=(name,), member=member) for name, member in members.items() if name not in alphas))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Samples:
    """The completions that count, on the CPU in float64; `known_1GK` is None where all of them do."""

    delta_1GK: Tensor
    known_1GK: Tensor | None
    count_G: Tensor

    @classmethod
    def of(cls, delta_GK: Tensor, mask_GK: Tensor | None) -> "_Samples | None":
        """None where nothing counts."""
        delta_GK = delta_GK.cpu().double()
        mask_GK = torch.ones_like(delta_GK, dtype=torch.bool) if mask_GK is None else mask_GK.cpu()
        if bool(mask_GK.all()):
            known_1GK = None
        else:
            kept_G = mask_GK.any(-1)
            delta_GK, mask_GK = delta_GK[kept_G], mask_GK[kept_G]
            delta_GK, known_1GK = torch.where(mask_GK, delta_GK, 0.0), mask_GK.unsqueeze(0)
        if delta_GK.numel() == 0:
            return None
        return cls(delta_1GK=delta_GK.unsqueeze(0), known_1GK=known_1GK, count_G=mask_GK.sum(-1).double())

    def only(self, values_MGK: Tensor) -> Tensor:
        """Zero where a completion doesn't count; there, every member's loss and share is zero too."""
        return values_MGK if self.known_1GK is None else torch.where(self.known_1GK, values_MGK, 0.0)


def _measure(calls: Sequence[_Call], samples: _Samples) -> tuple[list[list[float]], list[list[float]]]:
    """The quantities per member, and the cosines between members, both in the order of the calls."""
    solved = [call.member.normalise(samples.delta_1GK, samples.known_1GK) for call in calls]
    shifted = [samples.only(samples.delta_1GK + log_z_MG.unsqueeze(-1)) for log_z_MG, _ in solved]
    weights = [weight_MGK for _, weight_MGK in solved]
    losses = [call.loss(x_MGK, weight_MGK) for call, x_MGK, weight_MGK in zip(calls, shifted, weights, strict=True)]
    log_u_1GK = shifted[0][calls[0].names.index("forward_kl"), None]  # forward KL's c* is the log Z of the estimates
    weight_MN = torch.cat(weights).flatten(1)
    # A weight within rounding of zero is zero: a group at the target has no gradient, not one of rounding errors.
    rounding = 16 * torch.finfo(torch.float64).eps * samples.delta_1GK.abs().max()
    weight_MN = torch.where(weight_MN.abs() > rounding, weight_MN, 0.0)
    size_MN = weight_MN.abs()
    columns = [*_estimates(calls, samples, log_u_1GK), torch.cat(losses).sum((-2, -1)), size_MN.sum(-1), size_MN.amax(-1)]
    # Row by row: a matrix product wakes all of the machine's threads, and waits for the one whose core is taken.
    dots = [(weight_MN * weight_N).sum(-1) for weight_N in weight_MN]
    estimate, stderr, loss, total, largest, *gram_MM = torch.stack([*columns, *dots]).tolist()
    count = samples.count_G.sum().item()
    square = [gram_MM[index][index] for index in range(len(total))]
    quantities_QM = [
        estimate,
        stderr,
        [max(0.0, value / count) for value in loss],
        [math.sqrt(value / count) for value in square],
        largest,
        [value**2 / below if below else 0.0 for value, below in zip(total, square, strict=True)],
    ]
    return quantities_QM, [[_cosine(dot, square[a], square[b]) for b, dot in enumerate(row)] for a, row in enumerate(gram_MM)]


def _cosine(dot: float, square_a: float, square_b: float) -> float:
    return max(-1.0, min(1.0, dot / math.sqrt(square_a * square_b))) if square_a and square_b else 0.0


def _estimates(calls: Sequence[_Call], samples: _Samples, x_1GK: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over groups of f(u) / u with u = e^x, which estimates the divergence, and its standard error."""
    share_MGK = torch.cat([call.share(x_1GK) for call in calls]).clamp(0, _LARGEST)
    estimate_MG = share_MGK.sum(-1) / samples.count_G
    groups = estimate_MG.shape[-1]
    if groups > 1:
        return estimate_MG.mean(-1), estimate_MG.std(-1) / math.sqrt(groups)
    # f(u) / u = g(v) with v = 1 / u = r / mean r: to first order, r_i moves the mean by g(v_i) - mean g - (v_i - 1) mean v g'(v).
    pull_MGK = share_MGK - torch.cat([call.member.slope(x_1GK) for call in calls]).clamp(-_LARGEST, _LARGEST)  # v g'(v) = f(u) / u - f'(u)
    pull_MG = samples.only(pull_MGK).sum(-1) / samples.count_G
    moved_MGK = samples.only(share_MGK - estimate_MG.unsqueeze(-1) - torch.expm1(-x_1GK) * pull_MG.unsqueeze(-1))
    freedom = samples.count_G * (samples.count_G - 1).clamp(min=1)
    return estimate_MG.squeeze(-1), (moved_MGK.square().sum(-1) / freedom).sqrt().squeeze(-1)

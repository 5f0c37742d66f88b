"""The f-divergence family, as functions of one scalar per completion.

`delta = log p_theta - log p*`, up to the constant log Z. Each member is the loss `L(delta) = integral_0^delta f'(e^t) dt`
with f scaled so that f(1) = f'(1) = 0 and f''(1) = 1, hence `L'(delta) = f'(e^delta)`. The batch normaliser of a group is
`c* = argmin_c mean_i L(delta_i + c)`; adding it makes the group's weights `L'(delta_i + c*)` sum to zero.

Everything is elementwise, or over the last dimension, which holds one prompt's group. All arithmetic is in float64: it
is one number per completion, and at |delta| = 1e4 float32 leaves no digits. Results come back in the dtype they came in.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A loss or slope whose true value is larger than this is reported as this: finite, of the right sign, and summable.
CEILING = torch.finfo(torch.float64).max / 2**20


class Divergence(ABC):
    """One member. The underscored methods are what a member defines; they see float64 tensors only."""

    @abstractmethod
    def generator(self, u: Tensor) -> Tensor:
        """f(u) for u = p / q >= 0, so that D_f(p||q) = E_q[f(p/q)]."""

    @abstractmethod
    def _loss(self, delta: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, delta: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_z(self, delta: Tensor, mask: Tensor) -> Tensor: ...

    def _weights(self, delta: Tensor, mask: Tensor) -> Tensor:
        return self._slope(delta + self._log_z(delta, mask).unsqueeze(-1))

    def loss(self, delta: Tensor) -> Tensor:
        """L(delta) >= 0, unreduced. Its gradient is `slope(delta)`, also where the value has reached the ceiling."""
        return _Loss.apply(delta, self)

    def slope(self, delta: Tensor) -> Tensor:
        """L'(delta)."""
        return _narrow(self._slope(delta.double()), delta.dtype)

    def log_z(self, delta: Tensor, mask: Tensor | None = None) -> Tensor:
        """c* of each group: one value per row. `mask` marks the completions that count."""
        known = _checked(mask, delta)
        return _narrow(self._log_z(torch.where(known, delta.double(), 0.0), known), delta.dtype)

    def weights(self, delta: Tensor, mask: Tensor | None = None) -> Tensor:
        """L'(delta_i + c*): the factor of each completion's log-prob gradient. A group's weights sum to zero."""
        known = _checked(mask, delta)
        return _narrow(self._weights(torch.where(known, delta.double(), 0.0), known) * known, delta.dtype)


class AlphaDivergence(Divergence):
    """f(u) = (u^a - 1 - a (u - 1)) / (a (a - 1)), with its limits at a = 0 and a = 1.

    Written through phi1(x) = (e^x - 1) / x and phi2(x) = (e^x - 1 - x) / x^2, which have no singular points: the whole
    family, limits included, is one set of formulas in s = a - 1.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._s = alpha - 1.0

    def generator(self, u: Tensor) -> Tensor:
        t = u.double().log()
        a = self.alpha
        value = t * (torch.exp(torch.maximum(t, a * t)) * _phi1(-(self._s * t).abs()) - _phi1(a * t))
        at_zero = 1.0 / a if a > 0 else math.inf
        return _narrow(torch.where(u == 0, torch.full_like(value, at_zero), value), u.dtype)

    def _loss(self, delta: Tensor) -> Tensor:
        return (delta.square() * _phi2(self._s * delta)).clamp(0, CEILING)

    def _slope(self, delta: Tensor) -> Tensor:
        return (delta * _phi1(self._s * delta)).clamp(-CEILING, CEILING)

    def _log_z(self, delta: Tensor, mask: Tensor) -> Tensor:
        """-logmeanexp(s delta) / s, which loses all its digits as s -> 0 unless the mean is taken out first."""
        count = mask.sum(-1)
        mean = (delta * mask).sum(-1) / count
        if self._s == 0:
            return -mean
        d = torch.where(mask, delta - mean.unsqueeze(-1), 0.0)
        # Where s d is small: mean e^{sd} = 1 + s^2 mean(d^2 phi2(sd)), because mean d = 0.
        small = (self._s * d).abs().amax(-1) <= 1
        near_d = torch.where(small.unsqueeze(-1), d, 0.0)
        excess = (near_d.square() * _phi2(self._s * near_d)).sum(-1) / count
        near = torch.log1p(self._s**2 * excess) / self._s
        far = (torch.logsumexp((self._s * d).masked_fill(~mask, -math.inf), -1) - count.double().log()) / self._s
        return -mean - torch.where(small, near, far)


class JensenShannon(Divergence):
    """f(u) = 2 [u log u - (u + 1) log((u + 1) / 2)]: four times the usual Jensen-Shannon divergence.

    On policy samples, the loss at c* follows the divergence's gradient closely (cosine 0.97 and up), not exactly.
    """

    _ITERATIONS = 100  # ten are enough at 64 completions; bisection alone would need about sixty

    def generator(self, u: Tensor) -> Tensor:
        v = u.double()
        return _narrow(2 * (torch.special.xlogy(v, v) - (v + 1) * torch.log1p((v - 1) / 2)), u.dtype)

    def _loss(self, delta: Tensor) -> Tensor:
        size = delta.abs()
        dilog = 2 * _dilog_of_minus_exp_minus(size) + math.pi**2 / 6
        exact = 2 * math.log(2) * delta + torch.where(delta > 0, -dilog, delta.square() + dilog)
        d2 = delta.square()
        series = d2 / 2 - delta * d2 * (1 / 12 - d2 * (1 / 480 - d2 * (1 / 10080 - d2 * (17 / 2903040))))
        return torch.where(size < 0.1, series, exact).clamp(min=0)

    def _slope(self, delta: Tensor) -> Tensor:
        return 2 * (delta.clamp(max=0) - torch.log1p(torch.expm1(-delta.abs()) / 2))

    def _log_z(self, delta: Tensor, mask: Tensor) -> Tensor:
        """Root of mean L'(delta + c) by Newton inside a shrinking bracket; L' is concave, so from the left it never overshoots."""
        count = mask.sum(-1)
        low = -delta.masked_fill(~mask, -math.inf).amax(-1)
        high = -delta.masked_fill(~mask, math.inf).amin(-1)
        c = torch.minimum(torch.maximum(-(delta * mask).sum(-1) / count, low), high)
        for _ in range(self._ITERATIONS):
            x = delta + c.unsqueeze(-1)
            value = (self._slope(x) * mask).sum(-1)
            low, high = torch.where(value <= 0, c, low), torch.where(value >= 0, c, high)
            newton = c - value / (2 * torch.sigmoid(-x) * mask).sum(-1)
            inside = (newton >= low) & (newton <= high)
            new = torch.where(inside, newton, (low + high) / 2)
            moved = (new - c).abs()
            c = new
            if bool((moved <= 4e-16 * (1 + c.abs())).all()):
                break
        return c


class TotalVariation(Divergence):
    """f(u) = |u - 1|: twice the total variation distance.

    The loss at c* has the right minimiser, but on the way there its gradient may point away from the divergence's.
    """

    def generator(self, u: Tensor) -> Tensor:
        return (u - 1).abs()

    def _loss(self, delta: Tensor) -> Tensor:
        return delta.abs()

    def _slope(self, delta: Tensor) -> Tensor:
        return delta.sign()

    def _log_z(self, delta: Tensor, mask: Tensor) -> Tensor:
        """Minus the median; of an even group, the mean of the two middle values."""
        ordered = delta.masked_fill(~mask, math.inf).sort(-1).values
        count = mask.sum(-1, keepdim=True)
        low, high = ordered.gather(-1, (count - 1) // 2), ordered.gather(-1, count // 2)
        return -(low + (high - low) / 2).squeeze(-1)

    def _weights(self, delta: Tensor, mask: Tensor) -> Tensor:
        """Values tied at the median share the subgradient that makes the group's sum zero."""
        signs = torch.sign(delta + self._log_z(delta, mask).unsqueeze(-1))
        tied = (signs == 0) & mask
        share = -(signs * mask).sum(-1, keepdim=True) / tied.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(tied, share, signs)


FAMILY: dict[str, Callable[[], Divergence]] = {
    "reverse_kl": lambda: AlphaDivergence(1.0),
    "forward_kl": lambda: AlphaDivergence(0.0),
    "pearson": lambda: AlphaDivergence(2.0),
    "neyman": lambda: AlphaDivergence(-1.0),
    "hellinger": lambda: AlphaDivergence(0.5),
    "tv": TotalVariation,
    "js": JensenShannon,
}


def get_divergence(name: str, alpha: float | None = None) -> Divergence:
    """The member called `name`; `alpha` goes with the name alpha, and only with it."""
    if name == "alpha":
        if alpha is None or not math.isfinite(alpha):
            raise ValueError(f"divergence alpha needs a finite alpha, for example 0.5; got {alpha}")
        return AlphaDivergence(float(alpha))
    if name not in FAMILY:
        raise ValueError(f"divergence {name!r} is unknown; it should be one of {', '.join([*FAMILY, 'alpha'])}")
    if alpha is not None:
        raise ValueError(f"alpha {alpha} only goes with divergence alpha, not with {name}")
    return FAMILY[name]()


class _Loss(torch.autograd.Function):
    """L with its exact derivative attached: differentiating the formula would give inf * 0 where the value overflows."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, divergence: Divergence) -> Tensor:
        ctx.save_for_backward(delta)
        ctx.divergence = divergence
        return _narrow(divergence._loss(delta.double()), delta.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (delta,) = ctx.saved_tensors
        return grads[0] * ctx.divergence.slope(delta), None


def _checked(mask: Tensor | None, delta: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(delta, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != delta.shape:
        raise ValueError(f"mask must be bool of shape {tuple(delta.shape)}, not {mask.dtype} of shape {tuple(mask.shape)}")
    if not bool(mask.any(-1).all()):
        raise ValueError("mask leaves a group without any completion")
    return mask


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Back to the caller's dtype; finite values too large for it become its largest."""
    if dtype == value.dtype:
        return value
    limit = torch.finfo(dtype).max
    return torch.where(value.isfinite(), value.clamp(-limit, limit), value).to(dtype)


def _phi1(x: Tensor) -> Tensor:
    """(e^x - 1) / x, and 1 at x = 0."""
    return torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))


_PHI2 = tuple(1 / math.factorial(k + 2) for k in range(16))


def _phi2(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / x^2, and 1/2 at x = 0; by its series where the formula cancels."""
    small = x.abs() < 0.5
    near = torch.where(small, x, 0.0)
    series = torch.zeros_like(x)
    for coefficient in reversed(_PHI2):
        series = series * near + coefficient
    far = torch.where(small, 1.0, x)
    return torch.where(small, series, (torch.expm1(far) - far) / far.square())


# Bernoulli numbers over factorials: Li2(z) = u - u^2/4 + sum_n B_2n u^(2n+1) / (2n+1)!, with u = -log(1 - z).
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)


def _dilog_of_minus_exp_minus(x: Tensor) -> Tensor:
    """Li2(-e^-x) for x >= 0. Here |u| <= log 2, so nine terms reach the last digit."""
    u = -torch.log1p(torch.exp(-x))
    u2 = u.square()
    tail = torch.zeros_like(x)
    for n in range(len(_BERNOULLI), 0, -1):
        tail = tail * u2 + _BERNOULLI[n - 1] / math.factorial(2 * n + 1)
    return u + u2 * (-0.25 + u * tail)

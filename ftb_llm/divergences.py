"""The f-divergence family, as functions of one scalar per completion.

`delta = log p_theta - log p*`, up to the constant log Z. Each member is the loss `L(delta) = integral_0^delta f'(e^t) dt`
with f scaled so that f(1) = f'(1) = 0 and f''(1) = 1, hence `L'(delta) = f'(e^delta)`. The batch normaliser of a group is
`c* = argmin_c mean_i L(delta_i + c)`; adding it makes the group's weights `L'(delta_i + c*)` sum to zero.

Everything is elementwise, or over the last dimension, which holds one prompt's group. All arithmetic is in float64: it
is one number per completion, and at |delta| = 1e4 float32 leaves no digits. Results come back in the dtype they came in.
Solvers take a fixed number of steps and no branch looks at a value, so nothing waits for a GPU.

A member of one's own is its L' or its f'; c*, loss and generator are then found numerically:

    pseudo_huber = CustomDivergence(slope=lambda delta: delta / torch.sqrt(1 + delta**2))
    le_cam = CustomDivergence.from_derivative(lambda u: 1 - 4 / (1 + u) ** 2)  # f = (u - 1)^2 / (u + 1)
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ftb_llm.numerics import Function, Group, bisect, dilog_of_minus_exp_minus, integral, phi1, phi2

# A loss or slope whose true value is larger than this is reported as this: finite, of the right sign, and summable.
CEILING = torch.finfo(torch.float64).max / 2**20
LOG_2 = math.log(2)


class Divergence(ABC):
    """One member. The underscored methods are what a member defines; they see float64 tensors only."""

    @abstractmethod
    def generator(self, u: Tensor) -> Tensor:
        """f(u) for u = p / q >= 0, so that D_f(p||q) = E_q[f(p/q)]."""

    @abstractmethod
    def _loss(self, delta: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, delta: Tensor) -> Tensor: ...

    def _normalise(self, delta: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """c*, with the group's dimension kept, and the weights. By default c* is found by bisection; it needs L' alone."""
        c, x = bisect(self._slope, delta, -(group.top(delta) + group.bottom(delta)) / 2, group)
        return c, self._slope(x)

    def loss(self, delta: Tensor) -> Tensor:
        """L(delta) >= 0, unreduced. Its gradient is `slope(delta)`, also where the value has reached the ceiling."""
        return _Loss.apply(delta, self)

    def slope(self, delta: Tensor) -> Tensor:
        """L'(delta)."""
        return _narrow(self._slope(delta.double()), delta.dtype)

    def log_z(self, delta: Tensor, mask: Tensor | None = None) -> Tensor:
        """c* of each group: one value per row. `mask` marks the completions that count."""
        return self.normalise(delta, mask)[0]

    def weights(self, delta: Tensor, mask: Tensor | None = None) -> Tensor:
        """L'(delta_i + c*): the factor of each completion's log-prob gradient. A group's weights sum to zero."""
        return self.normalise(delta, mask)[1]

    @torch.no_grad()
    def normalise(self, delta: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`log_z` and `weights` from one solve, without gradient. A group in which nothing counts has log Z 0 and weights 0."""
        x = delta.double()
        if mask is None:
            c, weights = self._normalise(x, Group())
        else:
            _check(mask, delta)
            # A group of nothing is a group of zeros, whose normaliser and weights are zero: no formula needs a special case.
            c, weights = self._normalise(torch.where(mask, x, 0.0), Group(mask | ~mask.any(-1, keepdim=True)))
            weights = torch.where(mask, weights, 0.0)
        return _narrow(c.squeeze(-1), delta.dtype), _narrow(weights, delta.dtype)


class AlphaDivergence(Divergence):
    """f(u) = (u^a - 1 - a (u - 1)) / (a (a - 1)), with its limits at a = 0 and a = 1.

    In s = a - 1 the slope is (e^{s delta} - 1) / s, and s = 0 is the only singular point left. `alpha` may be a tensor, on
    delta's device: it broadcasts against delta, so that alphas of shape [M, 1, 1] make a family of M out of [G, K].
    """

    def __init__(self, alpha: float | Tensor) -> None:
        self.alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
        self._s = self.alpha - 1.0

    def generator(self, u: Tensor) -> Tensor:
        a, t = self.alpha, u.double().log()
        value = t * (torch.exp(torch.maximum(t, a * t)) * phi1(-(self._s * t).abs()) - phi1(a * t))
        value = torch.where(a * t > 700, CEILING, value.clamp(0, CEILING))
        at_zero = (a * torch.ones_like(value)).clamp(min=0).reciprocal()
        return torch.where(u == 0, at_zero.to(u.dtype), _narrow(value, u.dtype))

    def _loss(self, delta: Tensor) -> Tensor:
        return (delta.square() * phi2(self._s * delta)).clamp(0, CEILING)

    def _slope(self, delta: Tensor) -> Tensor:
        return self._over_s(torch.expm1(self._s * delta), delta).clamp(-CEILING, CEILING)

    def _normalise(self, delta: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """-logmeanexp(s delta) / s, seen from the end of the group where s delta is largest.

        There no exponential is above 1 and their mean, 1 + s mean, isn't below 1 / K. Written in slopes, it also holds at s = 0.
        """
        end = self._steep_end(delta, group)
        slopes = self._slope(delta - end)
        mean = group.mean(slopes)
        return -(end + self._over_s(torch.log1p(self._s * mean), mean)), (slopes - mean) / (1 + self._s * mean)

    def _steep_end(self, delta: Tensor, group: Group) -> Tensor:
        """Where s delta is largest."""
        if isinstance(self._s, Tensor):
            return torch.where(self._s > 0, group.top(delta), group.bottom(delta))
        return group.top(delta) if self._s > 0 else group.bottom(delta)

    def _over_s(self, value: Tensor, limit: Tensor) -> Tensor:
        """value / s; where s = 0, its limit."""
        if isinstance(self._s, Tensor):
            flat = self._s == 0
            return torch.where(flat, limit, value / torch.where(flat, 1.0, self._s))
        return value / self._s if self._s else limit


class JensenShannon(Divergence):
    """f(u) = 2 [u log u - (u + 1) log((u + 1) / 2)]: four times the usual Jensen-Shannon divergence.

    On policy samples, the gradient of the loss at c* is close to the divergence's where policy and target are of one scale
    (cosine above 0.9), and not parallel to it; the further apart they are, the less.
    """

    def generator(self, u: Tensor) -> Tensor:
        v = u.double()
        return _narrow(2 * (torch.special.xlogy(v, v) - (v + 1) * torch.log1p((v - 1) / 2)), u.dtype)

    def _loss(self, delta: Tensor) -> Tensor:
        size = delta.abs()
        dilog = 2 * dilog_of_minus_exp_minus(size) + math.pi**2 / 6
        exact = 2 * LOG_2 * delta + torch.where(delta > 0, -dilog, delta.square() + dilog)
        d2 = delta.square()
        series = d2 / 2 - delta * d2 * (1 / 12 - d2 * (1 / 480 - d2 * (1 / 10080 - d2 * (17 / 2903040))))
        return torch.where(size < 0.1, series, exact).clamp(min=0)

    def _slope(self, delta: Tensor) -> Tensor:
        return 2 * (delta.clamp(max=0) - torch.log1p(torch.expm1(-delta.abs()) / 2))

    def _normalise(self, delta: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Root of the mean slope by Newton, from the left, where a concave increasing function is never overshot.

        The start is the root for the bound L'(x) / 2 <= log 2 + min(x, 0), which lies left of the true one by at most
        max(1, log K). A step of at least 1/2 covers that much of the way, and t < 1/2 is followed by at most
        (t - 1) e^t + 1, five times until nothing is left: the number of steps below is enough for every group. The
        shift is carried in x, where what is near the root keeps its digits whatever the size of c.
        """
        size = delta.shape[-1]
        lowest = torch.arange(1, size + 1, dtype=torch.float64, device=delta.device)  # how many lie where the bound slopes
        c = (-(group.count(delta) * LOG_2 + group.ordered(delta).cumsum(-1)) / lowest).amax(-1, keepdim=True)
        x = delta + c
        left, right = -group.top(x), -group.bottom(x)  # how far left and right the root may be
        for _ in range(6 + 2 * math.ceil(max(1.0, math.log(size)))):
            newton = -group.sum(self._slope(x)) / (2 * group.sum(torch.sigmoid(-x)))
            step = newton.clamp(left, right)
            c, x, left, right = c + step, x + step, left - step, right - step
            if delta.device.type == "cpu" and bool((step.abs() < 1e-9).all()):
                break  # where a look costs nothing: the next step would be the square of this one
        return c.clamp(-group.top(delta), -group.bottom(delta)), self._slope(x)


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

    def _normalise(self, delta: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Minus the median; values tied at the median share the subgradient that makes the group's sum zero."""
        c = -group.median(delta)
        signs = (delta + c).sign()
        tied = 1 - signs.abs()
        return c, signs - tied * group.sum(signs) / group.sum(tied).clamp(min=1)


class SmoothedTotalVariation(Divergence):
    """L' = tanh(delta / width): a strictly convex member that tends to tv as width -> 0. Its curvature at 0 is 1 / width.

    What is lost in the limit: c* is no longer unique (in an even group every point between the two middle values will do),
    the weights no longer say how far off a completion is, and near the target the steps don't shrink, so that only a
    falling learning rate brings them to rest.
    """

    def __init__(self, width: float) -> None:
        self.width = width

    def generator(self, u: Tensor) -> Tensor:
        return _generator_of(self._slope, u)

    def _loss(self, delta: Tensor) -> Tensor:
        """width log cosh(delta / width)."""
        x = delta.abs() / self.width
        near = torch.log1p(2 * torch.sinh(x.clamp(max=1) / 2).square())
        return self.width * torch.where(x < 1, near, x + torch.log1p(torch.exp(-2 * x)) - LOG_2)

    def _slope(self, delta: Tensor) -> Tensor:
        return torch.tanh(delta / self.width)

    def _normalise(self, delta: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        c, x = bisect(self._slope, delta, -group.median(delta), group)
        return c, self._slope(x)


class CustomDivergence(Divergence):
    """A member given by its slope L' as a function of delta: increasing, zero at zero, float64 tensors in and out.

    Loss and generator are the quadrature of the slope where they aren't given; c* comes from bisection. The slope must be
    continuous for the weights to sum to zero, and should be 1 at 0, so that learning rates compare with the family's.
    """

    def __init__(self, *, slope: Function, loss: Function | None = None, generator: Function | None = None) -> None:
        self._given_slope, self._given_loss, self._given_generator = slope, loss, generator
        _check_slope(slope)
        for name, given, at in (("loss", loss, (-3.0, -0.5, 0.5, 3.0)), ("generator", generator, (0.05, 0.6, 1.6, 20.0))):
            if given is not None:
                point = torch.tensor(at, dtype=torch.float64)
                expected = integral(self._slope, point) if name == "loss" else _generator_of(self._slope, point)
                _check_given(name, point, given(point), expected)

    @classmethod
    def from_derivative(cls, f_prime: Function, *, loss: Function | None = None, generator: Function | None = None) -> "CustomDivergence":
        """The member whose generator has the derivative `f_prime`, up to a constant: L'(delta) = f'(e^delta) - f'(1).

        u = e^delta stops at e^345 and e^-345, where its square is still a number; beyond, the loss goes on linearly.
        """
        return cls(slope=lambda delta: f_prime(delta.clamp(-345, 345).exp()) - f_prime(delta.new_ones(())), loss=loss, generator=generator)

    def generator(self, u: Tensor) -> Tensor:
        """f(u) with f(1) = f'(1) = 0. By quadrature, an infinite f(0) is the value at the smallest float instead."""
        if self._given_generator is not None:
            return _narrow(self._given_generator(u.double()), u.dtype)
        return _generator_of(self._slope, u)

    def _loss(self, delta: Tensor) -> Tensor:
        value = integral(self._slope, delta) if self._given_loss is None else self._given_loss(delta)
        return value.clamp(0, CEILING)

    def _slope(self, delta: Tensor) -> Tensor:
        return self._given_slope(delta).clamp(-CEILING, CEILING)


FAMILY: dict[str, Callable[[], Divergence]] = {
    "reverse_kl": lambda: AlphaDivergence(1.0),
    "forward_kl": lambda: AlphaDivergence(0.0),
    "pearson": lambda: AlphaDivergence(2.0),
    "neyman": lambda: AlphaDivergence(-1.0),
    "hellinger": lambda: AlphaDivergence(0.5),
    "tv": TotalVariation,
    "js": JensenShannon,
}


def get_divergence(name: str, alpha: float | None = None, *, width: float | None = None) -> Divergence:
    """The member called `name`; `alpha` goes with the name alpha, and only with it; `width` smooths tv, and only tv."""
    if name not in (*FAMILY, "alpha"):
        raise ValueError(f"divergence {name!r} is unknown; it should be one of {', '.join([*FAMILY, 'alpha'])}")
    if name == "alpha" and (alpha is None or not math.isfinite(alpha)):
        raise ValueError(f"divergence alpha needs a finite alpha, for example 0.5; got {alpha}")
    if name != "alpha" and alpha is not None:
        raise ValueError(f"alpha {alpha} only goes with divergence alpha, not with {name}")
    if name != "tv" and width is not None:
        raise ValueError(f"width {width} only goes with divergence tv, not with {name}")
    if width is not None and not 0 < width < math.inf:
        raise ValueError(f"divergence tv needs a finite width above 0, for example 0.1, or none; got {width}")
    if alpha is not None:
        return AlphaDivergence(float(alpha))
    return FAMILY[name]() if width is None else SmoothedTotalVariation(float(width))


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
        return (grads[0] * ctx.divergence.slope(delta)).sum_to_size(delta.shape), None


def _check(mask: Tensor, delta: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != delta.shape:
        raise ValueError(f"mask must be bool of shape {tuple(delta.shape)}, not {mask.dtype} of shape {tuple(mask.shape)}")


def _check_slope(slope: Function) -> None:
    """Refuse what can't be the derivative of a convex loss with its minimum at 0, as far as a few points show it."""
    sizes = torch.logspace(-2, 4, 49, dtype=torch.float64)
    points = torch.cat([-sizes.flip(0), torch.zeros(1, dtype=torch.float64), sizes])
    values = slope(points)
    if values.dtype != torch.float64 or values.shape != points.shape:
        raise ValueError(f"custom slope must return float64 of its argument's shape {tuple(points.shape)}, not {values.dtype} of shape {tuple(values.shape)}")
    pairs = list(zip(points.tolist(), values.tolist(), strict=True))
    for point, value in pairs:
        if math.isnan(value):
            raise ValueError(f"custom slope is nan at delta = {point:g}; it must be a number at every float")
        if abs(value) > 1e-12 if point == 0 else value * point <= 0:
            raise ValueError(f"custom slope is {value:g} at delta = {point:g}; it must be negative below 0, zero at 0 and positive above")
    for (left, low), (right, high) in itertools.pairwise(pairs):
        if high < low:
            raise ValueError(f"custom slope falls from {low:g} at delta = {left:g} to {high:g} at {right:g}; it must increase, or f isn't convex")


def _check_given(name: str, points: Tensor, given: Tensor, expected: Tensor) -> None:
    if given.dtype != torch.float64 or given.shape != points.shape:
        raise ValueError(f"custom {name} must return float64 of its argument's shape {tuple(points.shape)}, not {given.dtype} of shape {tuple(given.shape)}")
    for point, got, right in zip(points.tolist(), given.tolist(), expected.tolist(), strict=True):
        if not math.isclose(got, right, rel_tol=1e-6):
            raise ValueError(f"custom {name} is {got:g} at {point:g}, where its slope makes it {right:g}; correct it, or leave it out")


def _generator_of(slope: Function, u: Tensor) -> Tensor:
    """f(u) = integral_1^u f', in t = log u: the integral of L'(t) e^t."""
    t = u.double().clamp(min=torch.finfo(torch.float64).tiny).log()
    return _narrow(integral(lambda t: slope(t) * t.exp(), t).clamp(0, CEILING), u.dtype)


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Back to the caller's dtype; values too large for it become its largest."""
    if dtype == value.dtype:
        return value
    limit = torch.finfo(dtype).max
    return value.clamp(-limit, limit).to(dtype)

"""The numerical pieces of the divergence family: reductions over a group, a root, an integral, special functions.

Everything is in float64, in a fixed number of steps, and without a branch on a value.
"""

import itertools
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class Group:
    """Reductions over the last dimension, of the completions that count, with that dimension kept."""

    def __init__(self, mask: Tensor | None = None) -> None:
        """`mask` marks what counts, at least one per row; without it, everything does."""
        self.mask = mask
        if mask is not None:
            self._other = ~mask
            self._ones = mask.double()
            self._count = mask.sum(-1, keepdim=True)

    def sum(self, x: Tensor) -> Tensor:
        return (x if self.mask is None else x * self._ones).sum(-1, keepdim=True)

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.count(x)

    def count(self, x: Tensor) -> Tensor | int:
        return x.shape[-1] if self.mask is None else self._count

    def top(self, x: Tensor) -> Tensor:
        return self._filled(x, -math.inf).amax(-1, keepdim=True)

    def bottom(self, x: Tensor) -> Tensor:
        return self._filled(x, math.inf).amin(-1, keepdim=True)

    def ordered(self, x: Tensor) -> Tensor:
        """Ascending; what doesn't count comes last, as infinity."""
        return self._filled(x, math.inf).sort(-1).values

    def median(self, x: Tensor) -> Tensor:
        """Of an even number, the mean of the two middle values."""
        ordered, size = self.ordered(x), x.shape[-1]
        if self.mask is None:
            low, high = ordered[..., (size - 1) // 2, None], ordered[..., size // 2, None]
        else:
            low, high = ordered.gather(-1, (self._count - 1) // 2), ordered.gather(-1, self._count // 2)
        return low + (high - low) / 2

    def _filled(self, x: Tensor, value: float) -> Tensor:
        return x if self.mask is None else x.masked_fill(self._other, value)


def bisect(slope: Function, delta: Tensor, start: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """c where the group's mean slope is zero, and delta + c, from a `start` in [-max, -min], which holds every member's c*.

    80 halvings of the bracket leave less than a rounding error of any x near the root.
    """
    c, x = start, delta + start
    low, high = -group.top(x), -group.bottom(x)  # how far left and right the root may be
    for _ in range(80):
        mean = group.mean(slope(x))
        low, high = torch.where(mean > 0, low, 0.0), torch.where(mean < 0, high, 0.0)
        step = (low + high) / 2
        c, x, low, high = c + step, x + step, low - step, high - step
    return c, x


@cache
def _rule() -> tuple[tuple[float, float], ...]:
    """Nodes and weights of Gauss-Legendre on [0, 1], in panels that shrink by halves towards both ends.

    Whatever the scale on which a slope bends, at 0 or at the far end, some panel has it.
    """
    cuts = [0.0, *(2.0**-k for k in range(24, 0, -1)), *(1 - 2.0**-k for k in range(2, 13)), 1.0]
    panels = [(left, (right - left) / 2) for left, right in itertools.pairwise(cuts)]
    points = [(float(node), float(weight)) for node, weight in zip(*np.polynomial.legendre.leggauss(12), strict=True)]
    return tuple((left + half * (1 + node), half * weight) for left, half in panels for node, weight in points)


def integral(function: Function, end: Tensor) -> Tensor:
    """Integral of `function` from 0 to `end`, elementwise."""
    total = torch.zeros_like(end)
    for node, weight in _rule():
        total += weight * function(node * end)
    return end * total


def phi1(x: Tensor) -> Tensor:
    """(e^x - 1) / x, and 1 at x = 0."""
    return torch.where(x == 0, 1.0, torch.expm1(x) / torch.where(x == 0, 1.0, x))


_PHI2 = tuple(1 / math.factorial(k + 2) for k in range(16))


def phi2(x: Tensor) -> Tensor:
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


def dilog_of_minus_exp_minus(x: Tensor) -> Tensor:
    """Li2(-e^-x) for x >= 0. Here |u| <= log 2, so nine terms reach the last digit."""
    u = -torch.log1p(torch.exp(-x))
    u2 = u.square()
    tail = torch.zeros_like(x)
    for n in range(len(_BERNOULLI), 0, -1):
        tail = tail * u2 + _BERNOULLI[n - 1] / math.factorial(2 * n + 1)
    return u + u2 * (-0.25 + u * tail)

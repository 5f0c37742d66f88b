"""What attention's kernels are called with: stretches of the row, laid side by side as rectangles that hold little padding.

Shapes: `X` stretches of up to `Y` places each, `N` places in the row, `H` heads, `E` a head's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Look = tuple[range, range]  # a stretch of the row, and what it looks at: itself, which it sees up to each place, or another, all of which it sees


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Stretches of the row, the shorter ones filled up."""

    place_XY: Tensor  # padded on the right, where no causal query sees it, with any place
    place_R: Tensor  # without the padding
    real_R: Tensor | None  # which of the X Y those are; None where all are

    @property
    def padding(self) -> int:
        return self.place_XY.numel() - len(self.place_R)

    def take(self, row: Tensor) -> Tensor:
        """`N H ...` as the kernels want it, `X H Y ...`."""
        return self._shaped(row.index_select(0, self.place_XY.flatten()))

    def take_filled(self, row: Tensor, *, padding: float) -> Tensor:
        """The same, with a value of one's own where there is padding."""
        if self.real_R is None:
            return self.take(row)
        filled = row.new_full((self.place_XY.numel(), *row.shape[1:]), padding)
        return self._shaped(filled.index_copy_(0, self.real_R, row.index_select(0, self.place_R)))

    def put(self, row: Tensor, part: Tensor) -> None:
        """Write back what is no padding."""
        row.index_copy_(0, self.place_R, self._real(part))

    def add(self, row: Tensor, part: Tensor) -> None:
        """The same on top of what is there."""
        row.index_add_(0, self.place_R, self._real(part))

    def _shaped(self, part: Tensor) -> Tensor:
        return part.unflatten(0, self.place_XY.shape).transpose(1, 2)

    def _real(self, part: Tensor) -> Tensor:
        part = part.transpose(1, 2).flatten(0, 1)
        return part if self.real_R is None else part.index_select(0, self.real_R)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a kernel."""

    queries: Rectangle
    keys: Rectangle  # the same object where every stretch looks at itself

    @property
    def causal(self) -> bool:
        return self.keys is self.queries


def calls(stacks: Sequence[Sequence[Look]], *, spare: int, device: torch.device | str) -> tuple[Call, ...]:
    """Stacks, each of which one call could compute, in as many calls as it takes to have no more than `spare` places of padding."""
    return tuple(_call(stack, device) for stack in _cut(stacks, spare))


def _cut(stacks: Sequence[Sequence[Look]], spare: int) -> list[list[Look]]:
    """Stacks, the longest look on top, each time cut in two where that saves the most padding."""
    cut = [sorted(stack, key=lambda look: -len(look[0])) for stack in stacks if stack]
    while sum(map(_padding, cut)) > spare:
        _, at, place = max((*_best_cut(stack), place) for place, stack in enumerate(cut))
        cut[place : place + 1] = [cut[place][:at], cut[place][at:]]
    return cut


def _padding(stack: Sequence[Look]) -> int:
    return sum(len(stack[0][0]) - len(queries) for queries, _ in stack)


def _best_cut(stack: Sequence[Look]) -> tuple[int, int]:
    """Places that a cut saves, and where to cut: what lies below is only as wide as its own longest look."""
    longest = len(stack[0][0])
    return max(((longest - len(queries)) * (len(stack) - at), at) for at, (queries, _) in enumerate(stack))


def _call(stack: Sequence[Look], device: torch.device | str) -> Call:
    asking, seen = zip(*stack, strict=True)
    queries = _rectangle(asking, device)
    keys = queries if seen == asking else _rectangle(seen, device)
    assert keys is queries or not keys.padding, "padding would be seen"
    return Call(queries=queries, keys=keys)


def _rectangle(stretches: Sequence[range], device: torch.device | str) -> Rectangle:
    start_X = torch.tensor([stretch.start for stretch in stretches])
    length_X = torch.tensor([len(stretch) for stretch in stretches])
    step_Y = torch.arange(int(length_X.max()))
    real_XY = step_Y < length_X.unsqueeze(-1)
    place_XY = start_X.unsqueeze(-1) + step_Y * real_XY
    real_R = None if bool(real_XY.all()) else real_XY.flatten().nonzero().squeeze(-1).to(device)
    return Rectangle(place_XY=place_XY.to(device), place_R=place_XY[real_XY].to(device), real_R=real_R)

"""Groups laid end to end in one row of tokens, without padding, each prompt once however many completions it has.

    prompt of g | completion 1 of g | ... | completion K of g | prompt of the next group | ...

A completion's last token is predicted but never read, so it is no part of the row. Shapes: `N` tokens in the row, `M` predicted
tokens, `S` places that predict (the end of a prompt predicts the first token of all its completions), `G` prompts, `K`
completions each, `B = G K`, `P` prompt tokens, `T` completion tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.rectangles import Call, Look, calls

Ids = Sequence[int]
SPARE = 0.05  # of the row's tokens, how many places of padding attention may compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts with the same number of completions each, row `g * K + k` of the completions being the k-th of prompt g."""

    ids_N: Tensor
    positions_N: Tensor
    prompts: tuple[range, ...]  # where each stands in the row
    own: tuple[range, ...]  # where each completion's read tokens stand
    calls: tuple[Call, ...]  # of attention; each token's first is the causal one over its own prompt or completion
    place_S: Tensor  # in the row, of each place that predicts
    source_M: Tensor  # which of those places predicts the token
    target_M: Tensor  # the token
    slot_M: Tensor  # where it stands in B x T
    group_size: int
    width: int  # T, of the longest completion
    count: int  # B

    @property
    def padding(self) -> int:
        """Places that attention computes for nothing."""
        return sum(call.queries.padding for call in self.calls)

    @property
    def token_mask_GKT(self) -> Tensor:
        mask = torch.zeros(self.count * self.width, dtype=torch.bool, device=self.slot_M.device)
        mask[self.slot_M] = True
        return mask.view(-1, self.group_size, self.width)

    def spread(self, value_M: Tensor) -> Tensor:
        """Values of the predicted tokens as G x K x T, zero beyond a completion's end."""
        empty = value_M.new_zeros(self.count * self.width)
        return empty.index_put((self.slot_M,), value_M).view(-1, self.group_size, self.width)


def pack(prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]], device: torch.device | str = "cpu") -> Batch:
    """Lay prompts and their completions into one row."""
    sizes = {len(group) for group in completions}
    if len(sizes) != 1 or len(prompts) != len(completions):
        raise ValueError(f"every prompt needs the same number of completions, got {[len(group) for group in completions]} for {len(prompts)} prompts")
    if not all(prompts) or not all(row for group in completions for row in group):
        raise ValueError("a prompt or completion without tokens has no log-prob")
    row = _Row()
    for prompt, group in zip(prompts, completions, strict=True):
        row.append(prompt, group)
    width = max(len(one) for group in completions for one in group)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    return Batch(
        ids_N=tensor(row.ids),
        positions_N=tensor(row.positions),
        prompts=tuple(row.prompts),
        own=tuple(row.own),
        calls=calls(_stacks(row), spare=int(SPARE * len(row.ids)), device=device),
        place_S=tensor(row.places),
        source_M=tensor(row.sources),
        target_M=tensor(row.targets),
        slot_M=tensor([index * width + token for index, count in enumerate(row.counts) for token in range(count)]),
        group_size=sizes.pop(),
        width=width,
        count=len(row.counts),
    )


class _Row:
    """The row as it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.places: list[int] = []
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.counts: list[int] = []  # predicted tokens of each completion
        self.prompts: list[range] = []  # places
        self.own: list[range] = []  # places of each completion's read tokens

    def append(self, prompt: Ids, group: Sequence[Ids]) -> None:
        self.prompts.append(self._add(prompt, first_position=0))
        end_of_prompt = len(self.places)
        self.places.append(len(self.ids) - 1)
        for completion in group:
            own = self._add(completion[:-1], first_position=len(prompt))
            self.own.append(own)
            self.sources += [end_of_prompt, *range(len(self.places), len(self.places) + len(own))]
            self.places += own
            self.targets += completion
            self.counts.append(len(completion))

    def _add(self, ids: Ids, *, first_position: int) -> range:
        start = len(self.ids)
        self.ids += ids
        self.positions += range(first_position, first_position + len(ids))
        return range(start, len(self.ids))


def _stacks(row: _Row) -> list[list[Look]]:
    """Who looks at whom: all prompts at themselves, all completions at themselves, all completions of a group together at its prompt.

    The last are stacked by the prompt's length. Every place of a prompt is seen there, so it cannot be padded.
    A single completion shares its prompt with nobody: it goes on where the prompt ends, and both look at themselves as one.
    """
    size = len(row.own) // len(row.prompts)
    if size == 1:
        wholes = [range(prompt.start, own.stop) for prompt, own in zip(row.prompts, row.own, strict=True)]
        return [[(whole, whole) for whole in wholes]]
    far: dict[int, list[Look]] = defaultdict(list)
    for prompt, last in zip(row.prompts, row.own[size - 1 :: size], strict=True):
        if prompt.stop < last.stop:
            far[len(prompt)].append((range(prompt.stop, last.stop), prompt))
    return [[(prompt, prompt) for prompt in row.prompts], [(own, own) for own in row.own if own], *far.values()]

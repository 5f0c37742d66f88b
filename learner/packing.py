"""Groups laid end to end in one row of tokens, without padding, each prompt once however many completions it has.

    prompt of g | completion 1 of g | ... | completion K of g | prompt of the next group | ...

A completion's last token is predicted but never read, so it is no part of the row. Shapes: `N` tokens in the row, `M` predicted
tokens, `S` places that predict (the end of a prompt predicts the first token of all its completions), `G` prompts, `K`
completions each, `B = G K`, `P` prompt tokens, `T` completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Ids = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Groups that stand side by side and whose prompts are equally long: their attention is one call each, without masks."""

    prompt_GP: Tensor  # places in the row
    own_BT: Tensor  # places of the completions' read tokens, padded on the right with any place
    read_B: Tensor  # how many of them are real


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts with the same number of completions each, row `g * K + k` of the completions being the k-th of prompt g."""

    ids_N: Tensor
    positions_N: Tensor
    runs: tuple[Run, ...]
    place_S: Tensor  # in the row, of each place that predicts
    source_M: Tensor  # which of those places predicts the token
    target_M: Tensor  # the token
    slot_M: Tensor  # where it stands in B x T
    group_size: int
    width: int  # T, of the longest completion
    count: int  # B

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
    lengths = [len(prompt) for prompt in prompts]
    runs = [_run(row, [place for place, _ in members], sizes.copy().pop()) for _, members in groupby(enumerate(lengths), key=lambda pair: pair[1])]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    return Batch(
        ids_N=tensor(row.ids),
        positions_N=tensor(row.positions),
        runs=tuple(Run(prompt_GP=run.prompt_GP.to(device), own_BT=run.own_BT.to(device), read_B=run.read_B.to(device)) for run in runs),
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


def _run(row: _Row, groups: list[int], size: int) -> Run:
    own = row.own[groups[0] * size : (groups[-1] + 1) * size]
    places = [torch.arange(part.start, part.stop) for part in own]
    return Run(
        prompt_GP=torch.stack([torch.arange(row.prompts[g].start, row.prompts[g].stop) for g in groups]),
        own_BT=pad_sequence(places, batch_first=True),
        read_B=torch.tensor([len(part) for part in own]),
    )

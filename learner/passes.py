"""The passes of one micro-batch: reference, policy, and backward from what an objective says of the log-probs.

The objective needs whole groups, but of the model only log-probs: its gradient with respect to those is all that the
backward pass is told. So a group that is larger than the budget is scored in parts, and its gradient taken in parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ftb_llm.types import Group, ScoredGroup
from learner.batching import parts_of
from learner.model import AdaptedModel
from learner.packing import Batch, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Groups that are computed together."""

    scored: Sequence[ScoredGroup]
    reference_known: bool  # it came with the groups
    budget: int  # tokens at a time; a single group may have more
    least_passes: int  # parts to go through, the last one again and again for nothing, where other ranks have that many

    @property
    def groups(self) -> list[Group]:
        return [one.group for one in self.scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an objective says of log-probs."""

    slope_GKT: Tensor  # the gradient of the loss with respect to them
    metrics: dict[str, float]
    log_z_G: Tensor  # the learned one that it took, or empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the passes leave behind, besides the gradient."""

    logp_GKT: Tensor
    logp_ref_GKT: Tensor
    verdict: Verdict
    row_tokens: int
    computed_places: int  # by a pass: the same, and padding


Objective = Callable[[Batch, Tensor, Tensor], Verdict]  # the batch, the policy's log-probs and the reference's


def backward(model: AdaptedModel, micro_batch: MicroBatch, objective: Objective) -> Outcome:
    """Add the gradient of a micro-batch to what is there."""
    groups = micro_batch.groups
    batch = pack_groups(groups, model)
    ranges = parts_of(groups, budget=micro_batch.budget)
    parts = [batch] if len(ranges) == 1 else [pack_groups(_some(groups, part), model) for part in ranges]
    idle = [parts[-1]] * (micro_batch.least_passes - len(parts))
    at_once = len(parts) + len(idle) == 1

    def part_logprobs(part: Batch) -> Tensor:
        return functional.pad(model.scorer.token_logprobs(part), (0, batch.width - part.width))

    def logprobs() -> Tensor:
        return torch.cat([part_logprobs(part) for part in [*parts, *idle]][: len(parts)], 1)

    if micro_batch.reference_known:
        rows = [row for one in micro_batch.scored for row in one.reference or ()]
        logp_ref_GKT = token_rows(rows, like_GKT=torch.empty(batch.token_mask_GKT.shape, device=model.device))
    else:
        with torch.no_grad(), model.as_reference():
            logp_ref_GKT = logprobs()
    with torch.set_grad_enabled(at_once):
        logp_GKT = logprobs()
    verdict = objective(batch, logp_GKT.detach(), logp_ref_GKT)
    if at_once:
        logp_GKT.backward(verdict.slope_GKT)
    else:
        for part, slope_GKT in zip(parts, verdict.slope_GKT.split([part.group_size for part in parts], 1), strict=True):
            part_logprobs(part).backward(slope_GKT)
        for part in idle:
            (0.0 * part_logprobs(part)).sum().backward()
    return Outcome(
        logp_GKT=logp_GKT.detach(),
        logp_ref_GKT=logp_ref_GKT,
        verdict=verdict,
        row_tokens=sum(len(part.ids_N) for part in parts),
        computed_places=sum(map(model.scorer.computed_places, parts)),
    )


def no_objective(batch: Batch, logp_GKT: Tensor, logp_ref_GKT: Tensor) -> Verdict:
    """Of a rank that computes for the others' sake."""
    return Verdict(slope_GKT=torch.zeros_like(logp_GKT), metrics={}, log_z_G=torch.empty(0))


def pack_groups(groups: Sequence[Group], model: AdaptedModel) -> Batch:
    prompts = [group.prompt.token_ids for group in groups]
    return pack(prompts, [[completion.token_ids for completion in group.completions] for group in groups], model.device)


def token_rows(rows: Sequence[Sequence[float]], *, like_GKT: Tensor) -> Tensor:
    """One number per token, row by row, padded with zeros to a tensor like this one."""
    padded_BT = torch.zeros(len(rows), like_GKT.shape[-1], dtype=like_GKT.dtype)
    for place, row in enumerate(rows):
        padded_BT[place, : len(row)] = torch.tensor(row, dtype=like_GKT.dtype)
    return padded_BT.view(like_GKT.shape).to(like_GKT.device)


def _some(groups: Sequence[Group], part: range) -> list[Group]:
    """The groups with some of their completions."""
    return [replace(group, completions=group.completions[part.start : part.stop]) for group in groups]

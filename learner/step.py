"""One optimizer step: whole groups, in micro-batches whose gradients add up to that of one large batch.

Shapes: `G` groups of the step, `K` completions per group.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ftb_llm.baselines import BASELINES, Samples
from ftb_llm.errors import FtbError
from ftb_llm.objectives import argument, delta, ftb_loss, masked, member
from ftb_llm.shadow import shadow_metrics
from ftb_llm.types import FinishReason, Group, ObjectiveSpec, StepReport, StepRequest
from learner.batching import parts_of, plan, rounds, token_cost
from learner.model import AdaptedModel
from learner.packing import Batch, pack


def take_step(model: AdaptedModel, request: StepRequest, *, micro_batch_tokens: int) -> StepReport:
    """Reference pass, policy pass, loss and gradient per micro-batch; then one update."""
    spec = request.objective
    groups = [scored.group for scored in request.groups]
    reward_GK = torch.tensor([scored.rewards for scored in request.groups], dtype=torch.float64)
    mask_GK = counted(groups, spec)
    model.log_z.use(spec.beta, spec.tempered)
    own = [part for part in _turns(model, groups, reward_GK, mask_GK, spec, budget=micro_batch_tokens) if part is not None]
    parts = [part for share in model.ranks.gather(own) for part in share]
    logp_GK, logp_ref_GK = (_in_order([getattr(part, name) for part in parts], parts) for name in ("logp_GK", "logp_ref_GK"))
    delta_GK = delta(logp_GK, logp_ref_GK, reward_GK, spec.beta)
    if not bool(delta_GK.isfinite().all()):
        model.optimizer.zero_grad()
        raise FtbError(f"step {request.step}: a completion's log-prob or reward is not finite; the weights are those of step {request.step - 1}")
    model.ranks.sum_gradients(model.module.parameters())
    grad_norm = model.update(step=request.step, learning_rate=request.learning_rate, max_grad_norm=request.max_grad_norm)
    metrics = _summed([part.metrics for part in parts])
    if spec.log_z == "learned":
        x_GK = argument(logp_GK, logp_ref_GK, reward_GK, spec)
        metrics |= _learn_log_z(model, groups, x_GK, mask_GK, _in_order([part.log_z_G for part in parts], parts), spec)
    began = time.perf_counter()
    metrics |= shadow_metrics(delta_GK, mask_GK, alpha=spec.alpha)
    metrics["time/divergence_seconds"] = time.perf_counter() - began
    return StepReport(
        step=request.step,
        loss=metrics["optim/loss"],
        metrics={
            **metrics,
            "optim/grad_norm": grad_norm,
            "optim/learning_rate": request.learning_rate,
            "optim/masked_completions": float(mask_GK.numel() - int(mask_GK.sum())),
            **_mismatch(groups, logp_GK),
            "perf/learn_tokens": float(sum(group.token_count for group in groups)),
            "perf/packed_tokens": float(sum(token_cost(group) for group in groups)),
            "perf/micro_batches": float(len(parts)),
        },
        delta_GK=tuple(map(tuple, delta_GK.tolist())),
        logp_GK=tuple(map(tuple, logp_GK.tolist())),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one micro-batch leaves behind, besides its gradient; on the CPU, for all ranks to know."""

    places: list[int]  # of its groups in the step
    logp_GK: Tensor
    logp_ref_GK: Tensor
    log_z_G: Tensor  # what the learned table said; empty where the normaliser is the batch's
    metrics: dict[str, float]


Objective = Callable[[Batch, Tensor, Tensor], tuple[Tensor, dict[str, float], Tensor]]


def _turns(model: AdaptedModel, groups: Sequence[Group], reward_GK: Tensor, mask_GK: Tensor, spec: ObjectiveSpec, *, budget: int) -> Iterator[_Part | None]:
    """This rank's share of the step, micro-batch by micro-batch.

    Where the base model is sharded, every pass of one rank needs all the others: they take as many, with some group and a
    gradient of zero where they have nothing left to compute.
    """
    denominator = max(1, int(mask_GK.sum()))
    for shares in rounds(groups, budget=budget, ranks=model.ranks.count):
        places = shares[model.ranks.rank]
        passes = max(len(parts_of([groups[place] for place in share], budget=budget)) for share in shares if share) if model.sharded else None
        if places:
            mine = [groups[place] for place in places]
            rewards, mask = reward_GK[places].to(model.device), mask_GK[places].to(model.device)
            yield _backward(model, mine, partial(_objective, model, mine, rewards, mask, spec, denominator), places=places, budget=budget, passes=passes)
        elif model.sharded:
            _backward(model, [min(groups, key=token_cost)], _nothing, places=[], budget=budget, passes=passes)


def _backward(model: AdaptedModel, groups: Sequence[Group], objective: Objective, *, places: list[int], budget: int, passes: int | None) -> _Part:
    """The gradient of one micro-batch, added to what is there.

    The objective needs whole groups, but of the model only log-probs: its gradient with respect to those is all that the
    backward pass is told. So a group that is larger than the budget is scored in parts, and its gradient taken in parts:
    in `passes` of them, where that is given, the last one again and again for nothing.
    """
    batch = pack_groups(groups, model)
    parts = parts_of(groups, budget=budget)
    idle = [parts[-1]] * ((passes or 0) - len(parts))
    at_once = len(parts) + len(idle) == 1

    def scores() -> Tensor:
        return torch.cat([_part_logprobs(model, groups, batch, part) for part in [*parts, *idle]][: len(parts)], 1)

    with torch.no_grad(), model.as_reference():
        logp_ref_GKT = scores()
    with torch.set_grad_enabled(at_once):
        logp_GKT = scores()
    slope_GKT, metrics, log_z_G = objective(batch, logp_GKT.detach(), logp_ref_GKT)
    if at_once:
        logp_GKT.backward(slope_GKT)
    else:
        for part in parts:
            _part_logprobs(model, groups, batch, part).backward(slope_GKT[:, part.start : part.stop])
        for part in idle:
            (0.0 * _part_logprobs(model, groups, batch, part)).sum().backward()
    return _Part(
        places=places,
        logp_GK=logp_GKT.detach().sum(-1, dtype=torch.float64).cpu(),
        logp_ref_GK=logp_ref_GKT.sum(-1, dtype=torch.float64).cpu(),
        log_z_G=log_z_G.cpu(),
        metrics=metrics,
    )


def _nothing(batch: Batch, logp_GKT: Tensor, logp_ref_GKT: Tensor) -> tuple[Tensor, dict[str, float], Tensor]:
    """The objective of a rank that computes for the others' sake."""
    return torch.zeros_like(logp_GKT), {}, torch.empty(0)


def _part_logprobs(model: AdaptedModel, groups: Sequence[Group], batch: Batch, part: range) -> Tensor:
    """Token log-probs of some completions of every group, as wide as those of all."""
    if len(part) < batch.group_size:
        own = pack_groups([replace(group, completions=group.completions[part.start : part.stop]) for group in groups], model)
        logp_GKT = model.scorer.token_logprobs(own)
        return functional.pad(logp_GKT, (0, batch.width - own.width))
    return model.scorer.token_logprobs(batch)


def _objective(
    model: AdaptedModel,
    groups: Sequence[Group],
    reward_GK: Tensor,
    mask_GK: Tensor,
    spec: ObjectiveSpec,
    denominator: int,
    batch: Batch,
    logp_GKT: Tensor,
    logp_ref_GKT: Tensor,
) -> tuple[Tensor, dict[str, float], Tensor]:
    """The loss's gradient with respect to each token's log-prob, its metrics, and the learned log Z that it took."""
    logp_GKT = logp_GKT.requires_grad_()
    log_z_G: Tensor | None = None
    if spec.kind == "ftb":
        logp_GK, logp_ref_GK = logp_GKT.sum(-1, dtype=torch.float64), logp_ref_GKT.sum(-1, dtype=torch.float64)
        if spec.log_z == "learned":
            with torch.no_grad():
                batch_log_z_G = member(spec).log_z(argument(logp_GK, logp_ref_GK, reward_GK, spec), mask_GK)
            log_z_G = model.log_z.lookup([group.prompt.index for group in groups], batch_log_z_G)
        scalar, metrics = ftb_loss(logp_GK, logp_ref_GK, reward_GK, spec, mask_GK, log_z_G=log_z_G, denominator=denominator)
    else:
        samples = _samples(groups, batch, logp_GKT, logp_ref_GKT, reward_GK, mask_GK)
        scalar, metrics = BASELINES[spec.kind](samples, spec, denominator=denominator)
    return torch.autograd.grad(scalar, logp_GKT)[0], metrics, torch.empty(0) if log_z_G is None else log_z_G


def _in_order(values: Sequence[Tensor], parts: Sequence[_Part]) -> Tensor:
    """What the micro-batches say of their groups, in the order of the step's groups."""
    places = [place for part in parts for place in part.places]
    return torch.cat(list(values))[torch.tensor(places).argsort()]


def counted(groups: Sequence[Group], spec: ObjectiveSpec) -> Tensor:
    """Which completions count: all, or with `objective.truncated: mask` only those that ended by themselves."""
    ended = [[completion.finish_reason is FinishReason.STOP for completion in group.completions] for group in groups]
    return torch.tensor(ended) if spec.truncated == "mask" else torch.ones(len(ended), len(ended[0]), dtype=torch.bool)


def _samples(groups: Sequence[Group], batch: Batch, logp_GKT: Tensor, logp_ref_GKT: Tensor, reward_GK: Tensor, mask_GK: Tensor) -> Samples:
    """What the baselines read: the completions with what the sampler thought of them."""
    behaviour_GK = torch.tensor([[completion.logprob for completion in group.completions] for group in groups], dtype=torch.float64)
    return Samples(
        logp_GKT=logp_GKT,
        logp_ref_GKT=logp_ref_GKT,
        reward_GK=reward_GK,
        behaviour_GK=behaviour_GK.to(logp_GKT.device),
        behaviour_GKT=_behaviour_tokens(groups, logp_GKT),
        token_mask_GKT=batch.token_mask_GKT,
        mask_GK=mask_GK,
    )


def _behaviour_tokens(groups: Sequence[Group], logp_GKT: Tensor) -> Tensor | None:
    """What the sampler thought of each token, padded like the learner's own; None where it was not asked."""
    rows = [completion.token_logprobs for group in groups for completion in group.completions]
    if any(row is None for row in rows):
        return None
    padded_BT = torch.zeros(len(rows), logp_GKT.shape[-1], dtype=torch.float64)
    for place, row in enumerate(rows):
        assert row is not None
        padded_BT[place, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return padded_BT.view(logp_GKT.shape).to(logp_GKT.device)


def _learn_log_z(model: AdaptedModel, groups: Sequence[Group], x_GK: Tensor, mask_GK: Tensor, log_z_G: Tensor, spec: ObjectiveSpec) -> dict[str, float]:
    """Move the learned values of the prompts of which something counts."""
    slope_GK = masked(member(spec).slope(x_GK + log_z_G.unsqueeze(-1)), mask_GK)
    slope_G = slope_GK.sum(-1) / mask_GK.sum(-1).clamp(min=1)
    known_G = mask_GK.any(-1)
    prompts = [group.prompt.index for group, known in zip(groups, known_G.tolist(), strict=True) if known]
    model.log_z.update(prompts, log_z_G[known_G], slope_G[known_G], spec.log_z_rate)
    return {"optim/log_z_mean": log_z_G.mean().item()}


def _summed(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of micro-batches have the step's denominator in them already."""
    return {name: sum(part[name] for part in metrics) for name in metrics[0]}


def policy_logprobs(model: AdaptedModel, groups: Sequence[Group], *, micro_batch_tokens: int) -> list[list[float]]:
    """Summed log-probs of the groups' completions under the present adapter, without gradients."""
    values: dict[int, list[float]] = {}
    with torch.no_grad():
        for places in plan(groups, budget=micro_batch_tokens)[0]:
            logp_GK = model.scorer.completion_logprobs(pack_groups([groups[place] for place in places], model))
            values |= dict(zip(places, logp_GK.tolist(), strict=True))
    return [values[place] for place in range(len(groups))]


def pack_groups(groups: Sequence[Group], model: AdaptedModel) -> Batch:
    prompts = [group.prompt.token_ids for group in groups]
    return pack(prompts, [[completion.token_ids for completion in group.completions] for group in groups], model.device)


def _mismatch(groups: Sequence[Group], logp_GK: Tensor) -> dict[str, float]:
    """Learner against the engine that sampled: the policy's age and the two programs' rounding together."""
    engine_GK = torch.tensor([[completion.logprob for completion in group.completions] for group in groups], dtype=torch.float64)
    difference_GK = (logp_GK.cpu() - engine_GK).abs()
    return {"off_policy/logprob_diff_mean": difference_GK.mean().item(), "off_policy/logprob_diff_max": difference_GK.max().item()}

"""One optimizer step: whole groups, in micro-batches whose gradients add up to that of one large batch.

Shapes: `G` groups of the step, `K` completions per group.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ftb_llm.baselines import BASELINES, Samples
from ftb_llm.errors import FtbError
from ftb_llm.objectives import argument, delta, ftb_loss, masked, member
from ftb_llm.shadow import shadow_metrics
from ftb_llm.types import FinishReason, Group, ObjectiveSpec, ScoredGroup, StepReport, StepRequest
from learner.batching import parts_of, plan, rounds, token_cost
from learner.model import AdaptedModel
from learner.packing import Batch
from learner.passes import MicroBatch, Outcome, Verdict, backward, no_objective, pack_groups, token_rows


def take_step(model: AdaptedModel, request: StepRequest, *, micro_batch_tokens: int) -> StepReport:
    """Reference pass, policy pass, loss and gradient per micro-batch; then one update."""
    spec = request.objective
    groups = [scored.group for scored in request.groups]
    reward_GK = torch.tensor([scored.rewards for scored in request.groups], dtype=torch.float64)
    mask_GK = counted(groups, spec)
    model.log_z.use(spec.beta, spec.tempered)
    own = list(_own_share(model, request.groups, reward_GK, mask_GK, spec, budget=micro_batch_tokens))
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
            "perf/padding_share": 1 - sum(part.row_tokens for part in parts) / sum(part.computed_places for part in parts),
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
    row_tokens: int
    computed_places: int


def _own_share(model: AdaptedModel, scored: Sequence[ScoredGroup], reward_GK: Tensor, mask_GK: Tensor, spec: ObjectiveSpec, *, budget: int) -> Iterator[_Part]:
    """This rank's share of the step, micro-batch by micro-batch.

    Where the base model is sharded, every pass of one rank needs all the others: they take as many, with some group and a
    gradient of zero where they have nothing left to compute.
    """
    groups = [one.group for one in scored]
    denominator = max(1, int(mask_GK.sum()))
    known = all(one.reference is not None for one in scored)  # of all or none: the ranks must agree on what they compute
    for shares in rounds(groups, budget=budget, ranks=model.ranks.count):
        passes = max(len(parts_of([groups[place] for place in share], budget=budget)) for share in shares if share) if model.sharded else 1
        places = shares[model.ranks.rank]
        if places:
            own = MicroBatch(scored=[scored[place] for place in places], reference_known=known, budget=budget, least_passes=passes)
            rewards, mask = reward_GK[places].to(model.device), mask_GK[places].to(model.device)
            yield _part(backward(model, own, partial(_objective, model, own.groups, rewards, mask, spec, denominator)), places)
        elif model.sharded:
            smallest = min(scored, key=lambda one: token_cost(one.group))
            backward(model, MicroBatch(scored=[smallest], reference_known=known, budget=budget, least_passes=passes), no_objective)


def _part(outcome: Outcome, places: list[int]) -> _Part:
    return _Part(
        places=places,
        logp_GK=outcome.logp_GKT.sum(-1, dtype=torch.float64).cpu(),
        logp_ref_GK=outcome.logp_ref_GKT.sum(-1, dtype=torch.float64).cpu(),
        log_z_G=outcome.verdict.log_z_G.cpu(),
        metrics=outcome.verdict.metrics,
        row_tokens=outcome.row_tokens,
        computed_places=outcome.computed_places,
    )


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
) -> Verdict:
    """What the step's objective makes of a micro-batch's log-probs."""
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
    slope_GKT = torch.autograd.grad(scalar, logp_GKT)[0]
    return Verdict(slope_GKT=slope_GKT, metrics=metrics, log_z_G=torch.empty(0) if log_z_G is None else log_z_G)


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
    """What the sampler thought of each token; None where it was not asked."""
    rows = [completion.token_logprobs for group in groups for completion in group.completions]
    known = [row for row in rows if row is not None]
    return token_rows(known, like_GKT=logp_GKT.double()) if len(known) == len(rows) else None


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


def _mismatch(groups: Sequence[Group], logp_GK: Tensor) -> dict[str, float]:
    """Learner against the engine that sampled: the policy's age and the two programs' rounding together."""
    engine_GK = torch.tensor([[completion.logprob for completion in group.completions] for group in groups], dtype=torch.float64)
    difference_GK = (logp_GK.cpu() - engine_GK).abs()
    return {"off_policy/logprob_diff_mean": difference_GK.mean().item(), "off_policy/logprob_diff_max": difference_GK.max().item()}

"""One optimizer step: whole groups, in micro-batches whose gradients add up to that of one large batch.

Shapes: `G` groups of the step, `K` completions per group.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ftb_llm.errors import FtbError
from ftb_llm.objectives import delta, divergence_estimates, ftb_loss
from ftb_llm.types import Group, StepReport, StepRequest
from learner.logprobs import Batch, completion_logprobs, pack
from learner.model import AdaptedModel


def take_step(model: AdaptedModel, request: StepRequest, *, groups_per_micro_batch: int) -> StepReport:
    """Reference pass, policy pass, loss and gradient per micro-batch; then one update."""
    groups = [scored.group for scored in request.groups]
    reward_GK = torch.tensor([scored.rewards for scored in request.groups], dtype=torch.float64, device=model.device)
    parts: list[tuple[Tensor, Tensor]] = []
    loss = 0.0
    for start in range(0, len(groups), groups_per_micro_batch):
        rows = slice(start, start + groups_per_micro_batch)
        batch = pack_groups(groups[rows], model)
        logp_ref_GK = reference_logprobs(model, batch)
        logp_GK = completion_logprobs(model.module, batch)
        scalar, metrics = ftb_loss(logp_GK, logp_ref_GK, reward_GK[rows], request.objective, denominator=reward_GK.numel())
        model.backward(scalar)
        loss += metrics["optim/loss"]
        parts.append((logp_GK.detach().double(), logp_ref_GK.double()))
    logp_GK, logp_ref_GK = (torch.cat(column) for column in zip(*parts, strict=True))
    delta_GK = delta(logp_GK, logp_ref_GK, reward_GK, request.objective.beta)
    if not bool(delta_GK.isfinite().all()):
        model.optimizer.zero_grad()
        raise FtbError(f"step {request.step}: a completion's log-prob or reward is not finite; the weights are those of step {request.step - 1}")
    grad_norm = model.update(step=request.step, learning_rate=request.learning_rate, max_grad_norm=request.max_grad_norm)
    return StepReport(
        step=request.step,
        loss=loss,
        metrics={
            "optim/loss": loss,
            "optim/grad_norm": grad_norm,
            "optim/learning_rate": request.learning_rate,
            **divergence_estimates(delta_GK, request.objective.alpha),
            **_mismatch(groups, logp_GK),
            "perf/learn_tokens": float(sum(group.token_count for group in groups)),
        },
        delta_GK=tuple(map(tuple, delta_GK.tolist())),
        logp_GK=tuple(map(tuple, logp_GK.tolist())),
    )


def policy_logprobs(model: AdaptedModel, groups: Sequence[Group], *, groups_per_micro_batch: int) -> list[list[float]]:
    """Summed log-probs of the groups' completions under the present adapter, without gradients."""
    values: list[list[float]] = []
    with torch.no_grad():
        for part in _batched(groups, groups_per_micro_batch):
            values += completion_logprobs(model.module, pack_groups(part, model)).tolist()
    return values


def reference_logprobs(model: AdaptedModel, batch: Batch) -> Tensor:
    with torch.no_grad(), model.as_reference():
        return completion_logprobs(model.module, batch)


def pack_groups(groups: Sequence[Group], model: AdaptedModel) -> Batch:
    prompts = [group.prompt.token_ids for group in groups]
    return pack(prompts, [[completion.token_ids for completion in group.completions] for group in groups], model.device)


def _mismatch(groups: Sequence[Group], logp_GK: Tensor) -> dict[str, float]:
    """Learner against the engine that sampled: the policy's age and the two programs' rounding together."""
    engine_GK = torch.tensor([[completion.logprob for completion in group.completions] for group in groups], dtype=torch.float64)
    difference_GK = (logp_GK.cpu() - engine_GK).abs()
    return {"off_policy/logprob_diff_mean": difference_GK.mean().item(), "off_policy/logprob_diff_max": difference_GK.max().item()}


def _batched(groups: Iterable[Group], size: int) -> Iterator[list[Group]]:
    iterator = iter(groups)
    while part := list(itertools.islice(iterator, size)):
        yield part

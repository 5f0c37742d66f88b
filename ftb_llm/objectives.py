"""f-Trajectory Balance on groups of completions. Shapes: `G` groups (one prompt each), `K` completions per group.

The target of a prompt is `pi_ref e^{r/beta} / Z`. Nothing here knows who sampled the completions or with which policy: the
loss is a function of learner log-prob, reference log-prob and reward only, which is why stale samples don't bias it.

All log-probs are sums over a completion's tokens, the end token included, never means: the target is a distribution over
whole completions. What is cut at `sampling.max_tokens` has the sum of the tokens that it has.
"""

import torch
from torch import Tensor

from ftb_llm.custom import load_custom
from ftb_llm.divergences import Divergence, get_divergence
from ftb_llm.types import ObjectiveSpec

WEIGHT_LIMIT = 1e8  # a larger weight is cut to this, right-signed: the square of a float32 gradient must not overflow


def delta(logp: Tensor, logp_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log p_theta - log p*, without log Z: `logp - logp_ref - reward / beta`. All log-probs are sums over tokens."""
    return logp - logp_ref - reward / beta


def argument(logp: Tensor, logp_ref: Tensor, reward: Tensor, spec: ObjectiveSpec) -> Tensor:
    """What L is applied to, in float64: Delta, or tempered `beta Delta` without ever dividing the reward by a small beta."""
    logp, logp_ref, reward = logp.double(), logp_ref.double(), reward.double()
    if spec.tempered:
        return spec.beta * (logp - logp_ref) - reward
    return delta(logp, logp_ref, reward, spec.beta)


def member(spec: ObjectiveSpec) -> Divergence:
    """The divergence that `spec` names."""
    if spec.divergence == "custom":
        assert spec.custom is not None, "the config asks for objective.custom"
        return load_custom(spec.custom)
    return get_divergence(spec.divergence, spec.alpha, width=spec.width)


def ftb_loss(
    logp_GK: Tensor,
    logp_ref_GK: Tensor,
    reward_GK: Tensor,
    spec: ObjectiveSpec,
    mask_GK: Tensor | None = None,
    *,
    log_z_G: Tensor | None = None,
    denominator: int,
) -> tuple[Tensor, dict[str, float]]:
    """The loss `sum L(Delta + log Z) / denominator`; tempered, L becomes `(1 / beta) L(beta Delta)`.

    The value is that of the loss; the gradient comes from the surrogate `sum stopgrad(w) logp / denominator`, which equals
    the loss's own and can't overflow where the value does.

    Args:
        mask_GK: completions that count; the others are in neither loss nor normaliser.
        log_z_G: log Z of each group's prompt, learned elsewhere. By default the batch normaliser of the group itself
            (DevGrad): c* of all its completions, detached, which makes the weights of a group sum to zero.
        denominator: completions in the whole step, over all micro-batches and ranks, so that their sums are its loss.

    Returns:
        The scalar, and metrics that sum over micro-batches to the whole step's.
    """
    divergence = member(spec)
    with torch.no_grad():
        x_GK = argument(logp_GK, logp_ref_GK, reward_GK, spec)
        if log_z_G is None:
            log_z_G, weight_GK = divergence.normalise(x_GK, mask_GK)
        else:
            weight_GK = divergence.slope(x_GK + log_z_G.unsqueeze(-1))
        loss_GK = divergence.loss(x_GK + log_z_G.unsqueeze(-1)) / (spec.beta if spec.tempered else 1.0)
        value = masked(loss_GK, mask_GK).sum() / denominator
    return weighted_surrogate(weight_GK, logp_GK, mask_GK, value=value, denominator=denominator), {"optim/loss": value.item()}


def weighted_surrogate(weight_GK: Tensor, logp_GK: Tensor, mask_GK: Tensor | None, *, value: Tensor, denominator: int) -> Tensor:
    """A scalar that is worth `value` and has the gradient `sum weight dlogp / denominator`."""
    weight_GK = masked(weight_GK, mask_GK).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT).to(logp_GK.dtype)
    surrogate = (weight_GK * masked(logp_GK, mask_GK)).sum() / denominator
    return surrogate - surrogate.detach() + value.to(surrogate.dtype)


def masked(value: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where the mask is false, whatever stands there."""
    return value if mask is None else torch.where(mask, value, 0.0)

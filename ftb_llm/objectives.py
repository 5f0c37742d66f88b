"""f-Trajectory Balance on groups of completions. Shapes: `G` groups (one prompt each), `K` completions per group.

The target of a prompt is `pi_ref e^{r/beta} / Z`. Nothing here knows who sampled the completions or with which policy: the
loss is a function of learner log-prob, reference log-prob and reward only, which is why stale samples don't bias it.
"""

import torch
from torch import Tensor

from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.types import ObjectiveSpec


def delta(logp: Tensor, logp_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log p_theta - log p*, without log Z: `logp - logp_ref - reward / beta`. All log-probs are sums over tokens."""
    return logp - logp_ref - reward / beta


def ftb_loss(
    logp_GK: Tensor, logp_ref_GK: Tensor, reward_GK: Tensor, spec: ObjectiveSpec, mask_GK: Tensor | None = None, *, denominator: int
) -> tuple[Tensor, dict[str, float]]:
    """The DevGrad loss `sum L(Delta + stopgrad(c*)) / denominator`, with c* from all K completions of each prompt.

    Tempered, L becomes `(1 / beta) L(beta Delta)`. The value is that of the loss; the gradient comes from the surrogate
    `sum stopgrad(w) logp / denominator`, which equals the loss's own and can't overflow where the value does.

    Args:
        denominator: completions in the whole step, over all micro-batches and ranks, so that their sums are its loss.

    Returns:
        The scalar, and metrics that sum over micro-batches to the whole step's.
    """
    divergence = get_divergence(spec.divergence, spec.alpha)
    with torch.no_grad():
        x_GK = _argument(logp_GK.double(), logp_ref_GK.double(), reward_GK.double(), spec)
        weight_GK = divergence.weights(x_GK, mask_GK)
        shifted_GK = x_GK + divergence.log_z(x_GK, mask_GK).unsqueeze(-1)
        loss_GK = divergence.loss(shifted_GK) / (spec.beta if spec.tempered else 1.0)
        value = (loss_GK if mask_GK is None else torch.where(mask_GK, loss_GK, 0.0)).sum() / denominator
    logp_GK = logp_GK if mask_GK is None else torch.where(mask_GK, logp_GK, 0.0)
    surrogate = (weight_GK.to(logp_GK.dtype) * logp_GK).sum() / denominator
    scalar = surrogate - surrogate.detach() + value.to(surrogate.dtype)
    return scalar, {"optim/loss": value.item()}


def divergence_estimates(delta_GK: Tensor, alpha: float | None = None) -> dict[str, float]:
    """How far each group is from its target, in the measure of every member: `divergence/<name>`, and alpha's where given.

    Each is the member's own loss at its own c*, averaged over the completions: `mean L(Delta + c*)`. It is what an untempered
    step with that member would report on these samples; zero exactly when the policy is proportional to the target on
    them. On samples of the policy itself it agrees with D_f to second order near the target, and all smooth members agree
    with half the variance of Delta; far away, or on stale samples, it is a loss and not an estimate of D_f.
    """
    members = {name: get_divergence(name) for name in FAMILY}
    if alpha is not None:
        members["alpha"] = get_divergence("alpha", alpha)
    x_GK = delta_GK.detach().double()
    return {f"divergence/{name}": member.loss(x_GK + member.log_z(x_GK).unsqueeze(-1)).mean().item() for name, member in members.items()}


def _argument(logp_GK: Tensor, logp_ref_GK: Tensor, reward_GK: Tensor, spec: ObjectiveSpec) -> Tensor:
    """What L is applied to: Delta, or beta Delta without ever dividing the reward by a small beta."""
    if spec.tempered:
        return spec.beta * (logp_GK - logp_ref_GK) - reward_GK
    return delta(logp_GK, logp_ref_GK, reward_GK, spec.beta)

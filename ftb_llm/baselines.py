"""What stale samples are usually trained with, for comparison in the same learner: PPO-clip, GRPO, REINFORCE, importance weights.

Unlike f-TB, each of these reads the behaviour log-probs: what the policy that sampled a completion thought of it. They
need `sampling.temperature` and `sampling.top_p` at 1, where the engine's log-probs are those it sampled from.
Shapes: `G` groups, `K` completions per group, `T` tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftb_llm.objectives import argument, masked, member, weighted_surrogate
from ftb_llm.types import ObjectiveSpec

_LONGEST_LOG_RATIO = 80.0  # e^80 is still a float32; nothing is learned from a larger ratio that this one doesn't teach
_LONGEST_PENALTY = 18.0  # from here on GRPO's KL estimate grows linearly, so that its gradient stays a float32 that can be squared


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Groups of completions with all that was known of them when they were sampled. Log-probs are zero beyond a completion's end."""

    logp_GKT: Tensor
    logp_ref_GKT: Tensor
    reward_GK: Tensor
    behaviour_GK: Tensor  # summed log-prob under the policy that sampled
    behaviour_GKT: Tensor | None  # the same per token; the clipping baselines need it
    token_mask_GKT: Tensor
    mask_GK: Tensor  # completions that count


Loss = tuple[Tensor, dict[str, float]]


def ppo_clip(samples: Samples, spec: ObjectiveSpec, *, denominator: int) -> Loss:
    """PPO's clipped objective per token, the KL to the reference inside the reward as it was at sampling.

    The advantage is `r - beta (log mu - log pi_ref)` minus the group's mean, not divided by its spread, and the sum over
    tokens is not divided by the length: on the policy's own samples this is the exact gradient of E[r] - beta KL, whose
    optimum is the same target as f-TB's. Clipping is the only thing in it that knows of staleness.
    """
    kl_GK = samples.behaviour_GK - samples.logp_ref_GKT.detach().double().sum(-1)
    advantage_GK = _centred(samples.reward_GK - spec.beta * kl_GK, samples.mask_GK)
    gain_GKT, clipped_GKT = _clipped_gain(samples, advantage_GK, spec.clip_range)
    loss = -masked(gain_GKT.sum(-1), samples.mask_GK).sum() / denominator
    return loss, _clip_metrics(loss, clipped_GKT, samples, denominator)


def grpo(samples: Samples, spec: ObjectiveSpec, *, denominator: int) -> Loss:
    """GRPO as published: advantages divided by the group's spread, token means per completion, beta times the k3 estimate of the KL.

    Dividing by the spread and by the length changes the optimum: it is not the target even on the policy's own samples.
    """
    advantage_GK = _centred(samples.reward_GK, samples.mask_GK)
    spread_G1 = ((advantage_GK.square() * samples.mask_GK).sum(-1, keepdim=True) / samples.mask_GK.sum(-1, keepdim=True).clamp(min=1)).sqrt()
    gain_GKT, clipped_GKT = _clipped_gain(samples, advantage_GK / (spread_G1 + 1e-4), spec.clip_range)
    log_ratio_GKT = samples.logp_ref_GKT - samples.logp_GKT
    bent_GKT = log_ratio_GKT.clamp(max=_LONGEST_PENALTY)
    k3_GKT = masked(bent_GKT.expm1() - bent_GKT + (log_ratio_GKT - bent_GKT) * bent_GKT.expm1(), samples.token_mask_GKT)  # e^x - x - 1
    lengths_GK = samples.token_mask_GKT.sum(-1).clamp(min=1)
    loss = -masked((gain_GKT - spec.beta * k3_GKT).sum(-1) / lengths_GK, samples.mask_GK).sum() / denominator
    return loss, _clip_metrics(loss, clipped_GKT, samples, denominator)


def reinforce(samples: Samples, spec: ObjectiveSpec, *, denominator: int) -> Loss:
    """REINFORCE with the KL in the reward as it was at sampling, the group's mean as baseline, no correction for staleness.

    On the policy's own samples it is the tempered reverse KL member to the letter; on stale ones its weights no longer
    depend on the policy, so nothing stops it at the target.
    """
    with torch.no_grad():
        kl_GK = samples.behaviour_GK - samples.logp_ref_GKT.double().sum(-1)
        weight_GK = -_centred(samples.reward_GK - spec.beta * kl_GK, samples.mask_GK)
        value = masked(weight_GK * samples.logp_GKT.double().sum(-1), samples.mask_GK).sum() / denominator
    return weighted_surrogate(weight_GK, samples.logp_GKT.sum(-1), samples.mask_GK, value=value, denominator=denominator), {"optim/loss": value.item()}


def importance(samples: Samples, spec: ObjectiveSpec, *, denominator: int) -> Loss:
    """The gradient of D_f itself on stale samples: `E_mu[(p / mu) f'(p / p*) grad log p]`, with ratios of whole completions.

    log Z is estimated from the same samples, and the weighted mean is taken off as a baseline: right as K grows, however
    stale the samples, and shorter than the truth in small groups. Its variance is what e to the spread of `log p - log mu`
    makes of it; a ratio is cut only where floats end, at e^80.
    """
    divergence = member(spec)
    with torch.no_grad():
        logp_GK = samples.logp_GKT.double().sum(-1)
        log_ratio_GK = (logp_GK - samples.behaviour_GK).clamp(-_LONGEST_LOG_RATIO, _LONGEST_LOG_RATIO)
        ratio_GK = masked(log_ratio_GK.exp(), samples.mask_GK)
        x_GK = argument(logp_GK, samples.logp_ref_GKT.double().sum(-1), samples.reward_GK, spec)
        log_terms_GK = (log_ratio_GK - x_GK).masked_fill(~samples.mask_GK, -torch.inf)
        log_z_G1 = torch.logsumexp(log_terms_GK, -1, keepdim=True) - samples.mask_GK.sum(-1, keepdim=True).clamp(min=1).double().log()
        slope_GK = masked(divergence.slope(x_GK + log_z_G1.nan_to_num(neginf=0.0)), samples.mask_GK)
        total_G1 = ratio_GK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        baseline_G1 = (ratio_GK / total_G1 * slope_GK).sum(-1, keepdim=True)
        weight_GK = masked(ratio_GK * (slope_GK - baseline_G1), samples.mask_GK)
        value = (weight_GK * masked(logp_GK, samples.mask_GK)).sum() / denominator
        effective = (ratio_GK.sum(-1).square() / ratio_GK.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)).sum()
    loss = weighted_surrogate(weight_GK, samples.logp_GKT.sum(-1), samples.mask_GK, value=value, denominator=denominator)
    return loss, {"optim/loss": value.item(), "off_policy/ratio_ess_share": effective.item() / denominator}


BASELINES: dict[str, Callable[..., Loss]] = {"ppo_clip": ppo_clip, "grpo": grpo, "reinforce": reinforce, "importance": importance}


def _clipped_gain(samples: Samples, advantage_GK: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """min(ratio A, clip(ratio) A) per token, and where the clip took the gradient away."""
    assert samples.behaviour_GKT is not None, "token log-probs are asked of the engine for these kinds"
    log_ratio_GKT = (samples.logp_GKT - samples.behaviour_GKT.to(samples.logp_GKT.dtype)).clamp(-_LONGEST_LOG_RATIO, _LONGEST_LOG_RATIO)
    ratio_GKT = log_ratio_GKT.exp()
    advantage_GK1 = advantage_GK.to(ratio_GKT.dtype).unsqueeze(-1)
    free_GKT, cut_GKT = ratio_GKT * advantage_GK1, ratio_GKT.clamp(1 - clip_range, 1 + clip_range) * advantage_GK1
    gain_GKT = masked(torch.minimum(free_GKT, cut_GKT), samples.token_mask_GKT)
    return gain_GKT, (cut_GKT < free_GKT) & samples.token_mask_GKT


def _centred(value_GK: Tensor, mask_GK: Tensor) -> Tensor:
    """Minus the mean of the completions that count; zero for the others."""
    mean_G1 = masked(value_GK, mask_GK).sum(-1, keepdim=True) / mask_GK.sum(-1, keepdim=True).clamp(min=1)
    return masked(value_GK - mean_G1, mask_GK)


def _clip_metrics(loss: Tensor, clipped_GKT: Tensor, samples: Samples, denominator: int) -> dict[str, float]:
    """The clipped share is that of the completion's tokens, averaged over completions, so that micro-batches add up."""
    share_GK = clipped_GKT.sum(-1) / samples.token_mask_GKT.sum(-1).clamp(min=1)
    return {"optim/loss": loss.item(), "off_policy/clipped_share": masked(share_GK, samples.mask_GK).sum().item() / denominator}

"""Settings evaluated at one step: what the learner is sent, so that every rank takes the same step."""

import math

from ftb_llm.config.schema import Config, Objective, Ramp
from ftb_llm.types import ObjectiveSpec


def resolve_objective(objective: Objective, step: int, since: int = 1) -> ObjectiveSpec:
    """The objective of step `step`: which member is in force by then, and how far a ramp of its alpha has come.

    Args:
        since: the step from which on the member that no schedule sets has been in force, as `ConfigLedger.member_since` knows
            it; its ramp begins there. 1 where the config never changes.
    """
    scheduled = objective.divergence.scheduled(step)
    member, first = (objective.divergence, since) if scheduled is None else (scheduled, scheduled.step)
    return ObjectiveSpec(
        kind=objective.kind,
        divergence=member.name,
        alpha=member.alpha.at(step, first) if isinstance(member.alpha, Ramp) else member.alpha,
        width=member.width,
        custom=objective.custom if member.name == "custom" else None,
        beta=objective.beta,
        tempered=objective.tempered,
        log_z=objective.log_z,
        log_z_rate=objective.log_z_rate,
        clip_range=objective.clip_range,
        truncated=objective.truncated,
    )


def resolve_canary_tolerance(config: Config) -> float:
    """Two programs agree on a sum of 32 log-probs to about 1e-4 in float32; in bfloat16 each term is only good to a few percent."""
    given = config.actors.canary_tolerance
    if given is not None:
        return given
    return 1e-3 if config.model.dtype == "float32" else 1.0


def resolve_learning_rate(config: Config, step: int) -> float:
    """The learning rate of step `step` (the first is 1): linear warm-up, then decay that reaches zero one step after run.max_steps.

    A pure function of the settings and the step: live changes take effect at once, and a checkpoint needs no scheduler.
    """
    learner = config.learner
    if step <= learner.warmup_steps:
        return learner.learning_rate * step / (learner.warmup_steps + 1)
    span = config.run.max_steps - learner.warmup_steps
    progress = min(1.0, (step - 1 - learner.warmup_steps) / span) if span > 0 else 0.0
    match learner.decay:
        case "constant":
            return learner.learning_rate
        case "linear":
            return learner.learning_rate * (1 - progress)
        case "cosine":
            return learner.learning_rate * (1 + math.cos(math.pi * progress)) / 2

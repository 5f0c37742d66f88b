"""One row of `metrics.jsonl`: facts of the groups that a step consumed, beside what the learner reports."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ftb_llm.buffer import staleness
from ftb_llm.types import ObjectiveSpec, ScoredGroup, StepReport


def group_metrics(groups: Sequence[ScoredGroup], step: int) -> dict[str, Any]:
    """Rewards and ages of the groups that `step` trains on."""
    rewards = [reward for scored in groups for reward in scored.rewards]
    ages = [staleness(scored, step) for scored in groups]
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/max": max(rewards),
        "off_policy/staleness_mean": statistics.fmean(ages),
        "off_policy/staleness_min": min(ages),
        "off_policy/staleness_max": max(ages),
        "staleness_counts": {str(age): count for age, count in sorted(Counter(ages).items())},
    }


def step_row(
    *,
    now: float,
    config_version: int,
    policy_version: int,
    objective: ObjectiveSpec,
    groups: Sequence[ScoredGroup],
    report: StepReport,
    timings: dict[str, float],
) -> dict[str, Any]:
    """The whole row, in the order in which a person reads it."""
    return {
        "step": report.step,
        "time": now,
        "config_version": config_version,
        "policy_version": policy_version,
        "objective": asdict(objective),
        **group_metrics(groups, report.step),
        "optim/loss": report.loss,
        **report.metrics,
        **timings,
    }

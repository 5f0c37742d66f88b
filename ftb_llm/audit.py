"""Checks made while nothing else runs: that a push costs no speed, and that engine and learner agree on fresh samples."""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ftb_llm.errors import FtbError
from ftb_llm.ports import GeneratorPort, LearnerPort
from ftb_llm.types import Group, GroupRequest


async def speed_around(ports: Sequence[GeneratorPort], push: Callable[[], Awaitable[None]]) -> dict[str, Any]:
    """Tokens per second on the same workload before and after a push to every generator, and their ratio."""
    before = await _speed(ports)
    await push()
    after = await _speed(ports)
    return {"speed_before_push": before, "speed_after_push": after, "speed_after_push_ratio": after / before}


async def logprob_differences(ports: Sequence[GeneratorPort], learner: LearnerPort, requests: Sequence[GroupRequest]) -> dict[str, Any]:
    """Largest and mean difference of summed log-probs between engine and learner, on completions sampled just now.

    Call it when every generator holds the learner's present adapter: the same tokens, the same version.
    """
    if not ports:
        raise FtbError("no generator serves")
    groups: list[Group] = []
    for port in ports:
        groups.extend(await asyncio.gather(*(port.generate(request) for request in requests)))
    learner_values = await learner.logprobs(groups)
    found = [
        (abs(completion.logprob - value), len(completion.token_ids))
        for group, values in zip(groups, learner_values, strict=True)
        for completion, value in zip(group.completions, values, strict=True)
    ]
    differences = [difference for difference, _ in found]
    return {
        "logprob_max_abs_diff": max(differences),
        "logprob_max_abs_diff_per_token": max(difference / max(1, tokens) for difference, tokens in found),
        "logprob_mean_abs_diff": statistics.fmean(differences),
        "logprob_compared": len(differences),
    }


async def speed_of(ports: Sequence[GeneratorPort]) -> dict[str, Any]:
    """Tokens per second once more, after the last push of a run."""
    return {"speed_after_last_push": await _speed(ports)}


async def _speed(ports: Sequence[GeneratorPort]) -> float:
    """One generator after the other, so that they don't take each other's cores."""
    return sum([await port.measure_speed() for port in ports])

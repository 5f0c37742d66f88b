"""The canary: one fixed sequence that tells whether an adapter really arrived in an engine."""

import math


def judge(engine: float, learner: float, base: float, tolerance: float) -> str | None:
    """None when the engine speaks as the learner does, else the problem in one line.

    `engine` is the engine's summed log-prob of the canary after the push, `learner` the learner's under the new adapter and
    `base` the learner's without any adapter. The engine must equal the learner, and must not equal the base where the two
    can be told apart: a push that never arrives looks just like a healthy engine otherwise.
    """
    if not math.isfinite(engine):
        return f"engine's log-prob of the canary is {engine}"
    if abs(learner - base) > 2 * tolerance and abs(engine - base) <= tolerance:
        return f"adapter was not delivered: engine still answers as the base model ({engine:.6f}, learner {learner:.6f}, base {base:.6f})"
    if not abs(engine - learner) <= tolerance:
        return f"engine's log-prob of the canary is {engine:.6f}, the learner's is {learner:.6f}: they differ by more than {tolerance:g}"
    return None

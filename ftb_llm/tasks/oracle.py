"""The exact verdict on a policy, for tasks whose completions can all be enumerated.

The target is `pi_ref e^{r/beta} / Z`. Whatever text is not among the enumerated completions is malformed and becomes one
further outcome, *the rest*, with the malformed reward, so that the probabilities of a prompt sum to one. That is exact for
every expected reward and for Z, since all malformed text earns the same reward. For the divergences it is a lower bound,
since merging outcomes can only shrink an f-divergence; that of exact_tv is off by at most the rest's own small share.

Divergences are `D_f(p||q) = E_q f(p/q)` with p the policy and q the target, each f scaled so that f''(1) = 1:
hellinger is `2 sum (sqrt p - sqrt q)^2`, js is four times the usual Jensen-Shannon divergence. `exact_tv` alone has its
everyday scale: half the L1 distance, in [0, 1].
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ftb_llm.types import EvalReport

Array = NDArray[np.float64]

REST_FLOOR = 1e-6  # float32 log-probabilities can't tell a smaller rest from rounding
LOG_SMALLEST = -300.0  # every log-probability is at least this, so divergences may be huge but are finite
FOUND_SHARE = 0.5  # a mode is found when the policy gives it at least this share of the target's mass on it


class Task(Protocol):
    """A task that can be enumerated. Every completion of a prompt is listed once, in the order of its picture."""

    @property
    def name(self) -> str: ...

    @property
    def malformed_reward(self) -> float: ...

    @property
    def grid_shape(self) -> tuple[int, int] | None: ...

    def prompts(self) -> list[str]: ...

    def completions(self, prompt: str) -> list[str]: ...

    def rewards(self, prompt: str) -> list[float]: ...

    def base_weights(self, prompt: str) -> list[float]:
        """How often the base model writes each completion, up to a common factor."""
        ...

    def modes(self, prompt: str) -> list[list[int]]:
        """Indices into `completions(prompt)`, one list per mode."""
        ...


class Oracle:
    """Knows the target of every prompt of one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._rewards = {prompt: np.array([*task.rewards(prompt), task.malformed_reward], dtype=np.float64) for prompt in task.prompts()}
        self._modes = {prompt: task.modes(prompt) for prompt in task.prompts()}

    def log_target(self, prompt: str, reference_logp: Array, beta: float) -> Array:
        """log of `pi_ref e^{r/beta} / Z` over the enumerated completions, then the rest."""
        return _normalised(self._with_rest(prompt, reference_logp) + self._rewards[prompt] / beta)

    def report(self, *, step: int, beta: float, reference: Mapping[str, Array], policy: Mapping[str, Array]) -> EvalReport:
        """Judge a policy.

        Args:
            step: the learner step the policy belongs to.
            beta: temperature of the target.
            reference: prompt -> summed log-probs (end token included) of `task.completions(prompt)` under the reference.
            policy: the same under the policy.
        """
        rows: list[dict[str, float]] = []
        policies: dict[str, list[float]] = {}
        targets: dict[str, list[float]] = {}
        found = 0
        for prompt in self.task.prompts():
            log_p = self._with_rest(prompt, policy[prompt])
            log_q = self.log_target(prompt, reference[prompt], beta)
            p, q = np.exp(log_p), np.exp(log_q)
            rewards = self._rewards[prompt]
            rows.append({f"eval/exact_{name}": distance(log_p, log_q) for name, distance in DISTANCES.items()})
            rows[-1] |= {"eval/reward": float(p @ rewards), "eval/target_reward": float(q @ rewards)}
            found += sum(bool(p[mode].sum() >= FOUND_SHARE * q[mode].sum()) for mode in self._modes[prompt])
            policies[prompt], targets[prompt] = p.tolist(), q.tolist()
        total = sum(map(len, self._modes.values()))
        metrics = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        metrics |= {"eval/modes_found": float(found), "eval/modes_total": float(total)}
        return EvalReport(step=step, metrics=metrics, modes_found=found, modes_total=total, policy=policies, target=targets, grid_shape=self.task.grid_shape)

    def _with_rest(self, prompt: str, logp: Array) -> Array:
        """Append the rest's log-probability, and undo the rounding by which the whole misses one."""
        logp = np.asarray(logp, dtype=np.float64)
        expected = self._rewards[prompt].size - 1
        if logp.shape != (expected,):
            raise ValueError(f"prompt {prompt!r} has {expected} completions, got log-probs of shape {logp.shape}")
        if np.isnan(logp).any() or np.isposinf(logp).any():
            raise ValueError(f"prompt {prompt!r} has a completion whose log-prob is NaN or infinite")
        total = float(np.exp(logp).sum())
        if total > 1 + 1e-3:
            raise ValueError(f"the completions of prompt {prompt!r} have probability {total} together; it can't exceed 1")
        return _normalised(np.append(logp, np.log(max(1.0 - total, REST_FLOOR))))


def exact_tv(log_p: Array, log_q: Array) -> float:
    """Total variation distance in [0, 1]: half the L1 distance."""
    return float(0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum())


def exact_reverse_kl(log_p: Array, log_q: Array) -> float:
    """KL(p||q), summed over terms p log(p/q) - p + q, none of which is negative."""
    return float((np.exp(log_p) * (log_p - log_q) - np.exp(log_p) + np.exp(log_q)).sum())


def exact_forward_kl(log_p: Array, log_q: Array) -> float:
    """KL(q||p)."""
    return exact_reverse_kl(log_q, log_p)


def exact_pearson(log_p: Array, log_q: Array) -> float:
    """Half of sum (p - q)^2 / q."""
    return float(0.5 * ((np.exp(log_p) - np.exp(log_q)) ** 2 / np.exp(log_q)).sum())


def exact_neyman(log_p: Array, log_q: Array) -> float:
    """Half of sum (p - q)^2 / p."""
    return exact_pearson(log_q, log_p)


def exact_hellinger(log_p: Array, log_q: Array) -> float:
    """Twice sum (sqrt p - sqrt q)^2."""
    return float(2 * ((np.exp(log_p / 2) - np.exp(log_q / 2)) ** 2).sum())


def exact_js(log_p: Array, log_q: Array) -> float:
    """2 KL(p||m) + 2 KL(q||m) with m = (p + q) / 2."""
    log_middle = np.logaddexp(log_p, log_q) - np.log(2)
    return 2 * exact_reverse_kl(log_p, log_middle) + 2 * exact_reverse_kl(log_q, log_middle)


DISTANCES: dict[str, Callable[[Array, Array], float]] = {
    "tv": exact_tv,
    "forward_kl": exact_forward_kl,
    "reverse_kl": exact_reverse_kl,
    "pearson": exact_pearson,
    "neyman": exact_neyman,
    "hellinger": exact_hellinger,
    "js": exact_js,
}


def _normalised(log_weights: Array) -> Array:
    """Make probabilities of log-weights, none smaller than `LOG_SMALLEST`."""
    shifted = log_weights - log_weights.max()
    normalised: Array = np.maximum(shifted - np.log(np.exp(shifted).sum()), LOG_SMALLEST)
    return normalised

"""What one trial is, and what comes out of it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftb_llm.config import Config
from ftb_llm.config.load import build_config, merge, parse_override
from ftb_llm.config.schema import DIVERGENCES, Objective
from ftb_llm.errors import ConfigError, InvalidConfig

MEMBERS = tuple("alpha:0.75" if name == "alpha" else name for name in DIVERGENCES)
BASELINES = ("ppo_clip", "grpo", "reinforce", "importance")
# What KEY=VALUE words may not set, and what to use instead: the bench varies it itself.
SET_BY_OBJECTIVE = dict.fromkeys(("objective.kind", "objective.divergence", "objective.tempered", "objective.log_z"), "the names of the objectives")
SET_IN_TRIALS = SET_BY_OBJECTIVE | {"run.seed": "--seeds", "model.path": "--tasks", "data.path": "--tasks", "staleness.max_steps": "--lags"}
SET_IN_RUNS = SET_BY_OBJECTIVE | {"run.name": "--out", "run.dir": "--out"}
FORMS: dict[str, dict[str, Any]] = {"tempered": {"tempered": True}, "learned": {"log_z": "learned"}}

# As the shipped configs of the two tasks say, judged less often; everything else is the default.
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "hypergrid": {
        "model": {"path": "builtin:hypergrid"},
        "data": {"path": "builtin:hypergrid"},
        "rewards": {"functions": [{"function": "ftb_llm.tasks.hypergrid:reward"}]},
        "objective": {"beta": 0.5},
        "sampling": {"max_tokens": 4},
        "actors": {"max_model_len": 64},
        "run": {"max_steps": 400},
        "eval": {"every_steps": 40},
    },
    "sums": {
        "model": {"path": "builtin:sums"},
        "data": {"path": "builtin:sums"},
        "rewards": {"functions": [{"function": "ftb_llm.tasks.sums:reward"}]},
        "objective": {"beta": 0.2},
        "sampling": {"max_tokens": 8},
        "actors": {"max_model_len": 64},
        "run": {"max_steps": 300},
        "eval": {"every_steps": 40},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One short training: a task, an objective by its name, how many steps old the samples are, and a seed."""

    task: str
    objective: str  # `hellinger`, `alpha:0.75`, `grpo`, `importance:forward_kl`, `hellinger+tempered`, `reverse_kl+learned`
    lag: int = 0
    seed: int = 0
    settings: tuple[str, ...] = ()  # KEY=VALUE words, laid over the task's own settings

    def tree(self) -> dict[str, Any]:
        """The settings that are not defaults."""
        tree = merge(TASK_SETTINGS[self.task], {"objective": objective_settings(self.objective), "run": {"seed": self.seed}})
        for word in self.settings:
            tree = merge(tree, parse_override(word))
        return tree

    def config(self) -> Config:
        return build_config(self.tree())

    def key(self) -> str:
        """Equal for two specs exactly when they ask for the same trial."""
        return fingerprint([self.task, self.objective, self.lag, self.tree()])


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The exact verdict after some steps; `completions` counts those trained on."""

    step: int
    completions: int
    exact_tv: float
    exact_jsd: float  # the usual Jensen-Shannon divergence, in nats: at most log 2
    reward: float
    modes_found: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A finished trial. `curve` ends with the final policy, or with the last one that could be judged when `error` says why it broke off."""

    spec: TrialSpec
    curve: tuple[CurvePoint, ...]
    modes_total: int
    target_reward: float
    coverage: float  # distinct correct answers in the samples of one prompt, averaged over prompts
    coverage_target: float  # the same for samples of the exact target
    pass_at_k: dict[str, float]  # k -> probability that one of k samples is correct
    seconds: float
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """One flat row of JSON."""
        config, last = self.spec.config(), self.curve[-1]
        return {
            "task": self.spec.task,
            **objective_columns(config.objective),
            "lag": self.spec.lag,
            "seed": config.run.seed,
            "steps": config.run.max_steps,
            "exact_tv": last.exact_tv,
            "exact_jsd": last.exact_jsd,
            "reward": last.reward,
            "modes_found": last.modes_found,
            "coverage": self.coverage,
            "name": self.spec.objective,
            "modes_total": self.modes_total,
            "target_reward": self.target_reward,
            "coverage_target": self.coverage_target,
            "pass_at_k": self.pass_at_k,
            "learning_rate": config.learner.learning_rate,
            "seconds": self.seconds,
            "error": self.error,
            "curve": [asdict(point) for point in self.curve],
            "key": self.spec.key(),
        }


def objective_columns(objective: Objective) -> dict[str, Any]:
    """What was minimised, in the columns that every row begins with; the divergence is None where it plays no part."""
    divergence = objective.divergence if objective.kind in ("ftb", "importance") else None
    return {"objective": objective.kind, "divergence": divergence and divergence.name, "alpha": divergence and divergence.alpha}


def fingerprint(value: Any) -> str:
    """A short hash of a tree of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def objective_settings(name: str) -> dict[str, Any]:
    """The `objective` section that a name stands for."""
    head, *forms = name.split("+")
    first, *rest = head.split(":")
    kind, member = (first, rest or ["reverse_kl"]) if first in BASELINES else ("ftb", [first, *rest])
    settings: dict[str, Any] = {"kind": kind, "divergence": _member(name, member)}
    if kind not in ("ftb", "importance") and rest:
        raise _wrong(name, f"{kind} goes with no divergence")
    for form in forms:
        if form not in FORMS:
            raise _wrong(name, f"{form!r} is no form; the forms are {', '.join('+' + known for known in FORMS)}")
        if kind != "ftb":
            raise _wrong(name, f"{kind} goes with no +{form}; only a divergence does")
        settings |= FORMS[form]
    return settings


def check_words(words: Iterable[str], set_by: Mapping[str, str]) -> None:
    """KEY=VALUE words must leave alone what the bench itself varies."""
    for word in words:
        for key in _leaves(parse_override(word)):
            for own, option in set_by.items():
                if f"{key}.".startswith(f"{own}."):
                    raise InvalidConfig([ConfigError(key, f"can't be set here; it is set by {option}")])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _member(name: str, words: Sequence[str]) -> dict[str, Any]:
    first, *rest = words
    if first not in (*DIVERGENCES, "custom"):
        raise _wrong(name, f"{first!r} is no objective; the objectives are {', '.join((*MEMBERS, *BASELINES))}")
    if not rest:
        return {"name": first}
    try:
        (value,) = map(float, rest)
    except ValueError:
        raise _wrong(name, f"{':'.join(rest)!r} is no number") from None
    if first not in ("alpha", "tv"):
        raise _wrong(name, f"{first} takes no number; write alpha:0.75 or tv:0.1")
    return {"name": first, ("alpha" if first == "alpha" else "width"): value}


def _wrong(name: str, message: str) -> InvalidConfig:
    return InvalidConfig([ConfigError("--objectives", f"{name}: {message}")])

"""The things that travel, in the order in which they do.

    Prompt -> GroupRequest -> Completion[K] -> Group -> ScoredGroup -> StepRequest -> StepReport
                                                                         AdapterRef -> PushReport

A **group** (one prompt, K completions) is the unit of everything: generated, scored, queued, leased, trained, dropped.
A **version** is the learner step after which an adapter was published: version 12 holds the weights after step 12, and
version 0 is the reference model itself. Age is never stored; it is the learner's step minus the version, when consumed.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the end-of-sequence token was sampled; it is the last of `token_ids`
    LENGTH = "length"  # cut at `sampling.max_tokens`


class GroupState(StrEnum):
    """Where a group is. Every generated group is in exactly one of these."""

    BUFFERED = "buffered"
    LEASED = "leased"
    TRAINED = "trained"
    DROPPED_STALE = "dropped_stale"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the dataset, tokenized as the engine and the learner both see it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    messages: list[dict[str, Any]] | None = None  # the conversation, when the dataset's prompt is one
    columns: dict[str, Any] = field(default_factory=dict)  # the dataset's other columns, handed to the rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How to sample one group."""

    group_size: int
    temperature: float
    top_p: float
    max_tokens: int
    token_logprobs: bool = False  # also return each token's log-prob; only the token-level baselines read them


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """One prompt for a generator to complete K times."""

    group_id: str
    prompt: Prompt
    sampling: SamplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer. `logprob` is the engine's log-probability summed over `token_ids`, the end token included."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprob: float
    min_version: int
    max_version: int
    token_logprobs: tuple[float, ...] | None = None  # the engine's, one per token, where they were asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """K completions of one prompt, from one generator."""

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...]
    generator: str
    generate_seconds: float

    @property
    def min_version(self) -> int:
        return min((completion.min_version for completion in self.completions), default=0)

    @property
    def max_version(self) -> int:
        return max((completion.max_version for completion in self.completions), default=0)

    @property
    def token_count(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with one reward per completion: what the buffer holds and the learner trains on."""

    group: Group
    rewards: tuple[float, ...]
    reference: tuple[tuple[float, ...], ...] | None = None  # each token's log-prob under the reference, where an actor of its own computed it

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> "ScoredGroup":
        return msgspec.msgpack.decode(data, type=ScoredGroup)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSpec:
    """The objective of one step, resolved: schedules are already evaluated at that step."""

    kind: str  # ftb | ppo_clip | grpo | reinforce | importance
    divergence: str  # a name of the family, or custom
    alpha: float | None
    beta: float
    tempered: bool
    width: float | None = None  # tv smoothed over that width
    custom: str | None = None  # import path of the custom member
    log_z: str = "batch"  # batch | learned
    log_z_rate: float = 0.3
    clip_range: float = 0.2
    truncated: str = "keep"  # completions cut at max_tokens: keep | mask | reject

    @property
    def text(self) -> str:
        """What trains, in a few words: `hellinger`, `alpha 0.75, tempered`, `tv of width 0.1`, `grpo`, `importance of hellinger`."""
        member = self.divergence if self.custom is None else f"{self.divergence} {self.custom}"
        if self.alpha is not None:
            member += f" {self.alpha:g}"
        if self.width is not None:
            member += f" of width {self.width:g}"
        return objective_text(self.kind, member, tempered=self.tempered, log_z=self.log_z)


def objective_text(kind: str, members: str, *, tempered: bool, log_z: str) -> str:
    """The text of an objective whose member, or members, have the text `members`."""
    if kind not in ("ftb", "importance"):
        return kind  # these know no divergence
    text = members if kind == "ftb" else f"{kind} of {members}"
    return f"{text}{', tempered' if tempered else ''}{', learned log Z' if log_z == 'learned' else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """One optimizer step: which groups, under which config version."""

    step: int  # the number of the step to take; the first is 1
    config_version: int
    objective: ObjectiveSpec
    learning_rate: float
    max_grad_norm: float
    groups: tuple[ScoredGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step did. The matrices are one row per group, one column per completion."""

    step: int
    loss: float
    metrics: dict[str, float]  # slash names: `optim/grad_norm`, `divergence/...`
    delta_GK: tuple[tuple[float, ...], ...]  # logp - logp_ref - reward / beta, without log Z
    logp_GK: tuple[tuple[float, ...], ...]  # learner's summed log-probs before the update


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryValue:
    """A fixed sequence with its summed log-prob under the new adapter and under the bare base model."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    adapted: float
    base: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """A published adapter. The payload (safetensors bytes) travels beside it through the object store."""

    version: int
    path: str  # PEFT folder
    sha256: str  # of the safetensors file
    byte_count: int
    scale: float  # merged weight = base + scale * B A
    canary: CanaryValue


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """One delivery of one adapter to one generator."""

    generator: str
    version: int
    byte_count: int
    pause_ms: float  # from the engine's pause to its resume
    total_ms: float  # from the call to the canary's verdict
    canary_engine: float
    canary_learner: float
    canary_base: float
    ok: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The exact oracle's verdict on one policy, averaged over prompts. Empty of NaN by construction."""

    step: int
    metrics: dict[str, float]  # `eval/exact_tv`, `eval/exact_forward_kl`, `eval/reward`, `eval/target_reward`, ...
    modes_found: int
    modes_total: int
    policy: dict[str, list[float]]  # prompt text -> probability of each enumerated completion, then of all the rest
    target: dict[str, list[float]]
    grid_shape: tuple[int, ...] | None  # how to lay the enumerated completions out as a picture, where that makes sense

"""Every setting: its type, default, range, meaning, and whether it may change while the run is alive.

`Live(...)` marks a setting that `PATCH /v1/config` and `ftb-llm set` may change; it takes effect at a step boundary.
`Fixed(...)` marks one that is settled when the run starts. Nothing heavy is imported here.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

DIVERGENCES = ("reverse_kl", "forward_kl", "pearson", "neyman", "hellinger", "tv", "js", "alpha")
OBJECTIVES = ("ftb", "ppo_clip", "grpo", "reinforce", "importance")
TOKEN_LEVEL = ("ppo_clip", "grpo")  # objectives that compare token by token, and so need each token's behaviour log-prob
ALTERNATIVES = ("<number>", "<ramp>")  # the tags of a setting that is one thing or another: parts of an error's place, but no keys


def Live(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting that may change while the run is alive."""
    return Field(default=default, description=meaning, json_schema_extra={"live": True}, **limits)


def Fixed(default: Any, meaning: str, **limits: Any) -> Any:
    """A setting that is settled when the run starts."""
    return Field(default=default, description=meaning, json_schema_extra={"live": False}, **limits)


def _import_path(value: str) -> str:
    module, colon, function = value.partition(":")
    if not colon or not module or not function:
        raise ValueError("must be written package.module:function, for example ftb_llm.tasks.hypergrid:reward")
    return value


def _member_path(value: str) -> str:
    module, colon, member = value.partition(":")
    if not colon or not module or not member:
        raise ValueError("must be written package.module:object, for example my_divergences:member")
    return value


class Section(BaseModel):
    """Base of every section: unknown keys fail, values are immutable, numbers are not parsed from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)


class Run(Section):
    """The run itself."""

    name: str | None = Fixed(
        None, "Name of the run and of its folder; by default the task and the time.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100
    )
    dir: str = Fixed("runs", "Folder that holds the run folders.", min_length=1)
    seed: int = Fixed(0, "Seed of prompt order, sampling and initial weights.", ge=0, lt=2**31)
    max_steps: int = Live(400, "Optimizer steps after which the run ends.", ge=1, lt=2**31)


class Lora(Section):
    """The adapter that is trained."""

    rank: int = Fixed(16, "Rank of the adapter.", ge=1, le=1024)
    alpha: float = Fixed(32.0, "Scaling numerator: the merged weight is base + alpha / rank * B A.", gt=0)
    rslora: bool = Fixed(False, "Scale by alpha / sqrt(rank) instead of alpha / rank.")
    targets: str | list[str] = Fixed("all-linear", "Module names to adapt, or all-linear for every linear layer but the head; a list may hold both.")


class Model(Section):
    """The reference model, which is also the one that is adapted."""

    path: str = Fixed("builtin:hypergrid", "Local folder in Hugging Face format, Hub name, or builtin:hypergrid / builtin:sums.", min_length=1)
    dtype: Literal["float32", "bfloat16"] = Fixed("float32", "Precision of the base weights in learner and engine.")
    lora: Lora = Field(default_factory=Lora, description=Lora.__doc__)


class Data(Section):
    """The prompts: TRL's prompt-only format."""

    path: str = Fixed("builtin:hypergrid", "Local .jsonl or .parquet file, Hub dataset name, or builtin:hypergrid / builtin:sums.", min_length=1)
    split: str = Fixed("train", "Split to read when the dataset has several.", min_length=1)
    shuffle: bool = Fixed(True, "Visit the prompts in a new random order each epoch.")


class Reward(Section):
    """One reward function."""

    function: Annotated[str, AfterValidator(_import_path)] = Fixed(..., "Import path package.module:function, called as TRL calls it.")
    weight: float = Fixed(1.0, "Factor of this reward in the sum.")


class Rewards(Section):
    """What is rewarded."""

    functions: list[Reward] = Fixed([Reward(function="ftb_llm.tasks.hypergrid:reward")], "Reward functions; their weighted sum is r(x, y).", min_length=1)
    timeout_seconds: float = Fixed(30.0, "A group whose rewards take longer is rejected.", gt=0)
    workers: int = Fixed(1, "Processes that compute rewards side by side.", ge=1, le=256)


class Ramp(Section):
    """An alpha that changes by the same amount at every step, and then stays."""

    start: float = Live(..., "Alpha at the ramp's first step.", alias="from", ge=-10, le=10)
    to: float = Live(..., "Alpha at the ramp's end, which then stays.", ge=-10, le=10)
    over: int = Live(..., "Steps from the first value to the last.", ge=1, lt=2**31)

    def at(self, step: int, first: int) -> float:
        """Alpha at `step` of a ramp whose first step is `first`."""
        share = (step - first) / self.over
        return self.to if share >= 1 else self.start + (self.to - self.start) * share

    def __str__(self) -> str:
        return f"{self.start:g} to {self.to:g} over {self.over} steps"


def _number_or_ramp(value: Any) -> str:
    """Which of the two a value is meant to be, so that a wrong one is measured against that alone."""
    return "<ramp>" if isinstance(value, Mapping | Ramp) else "<number>"


Alpha = Annotated[Annotated[float, Tag("<number>"), Field(ge=-10, le=10)] | Annotated[Ramp, Tag("<ramp>")], Discriminator(_number_or_ramp)]


MemberName = Literal["reverse_kl", "forward_kl", "pearson", "neyman", "hellinger", "tv", "js", "alpha", "custom"]


class Member(Section):
    """One member of the f-divergence family."""

    name: MemberName = Live(
        "reverse_kl", "Which divergence; custom is the one that objective.custom names. A live change to another one drops the old one's alpha and width."
    )
    alpha: Alpha | None = Live(None, "Order of the alpha-divergence, or a ramp {from, to, over}; only with name alpha, and then required.")
    width: float | None = Live(None, "Only with name tv: smooths its loss over that width, so that it is strictly convex; null is the exact one.", gt=0, le=10)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.name == "alpha" and self.alpha is None:
            raise ValueError("name alpha needs alpha, for example 0.5")
        if self.name != "alpha" and self.alpha is not None:
            raise ValueError(f"alpha {self.alpha} only goes with name alpha, not with {self.name}; set name to alpha, or alpha to null")
        if self.name != "tv" and self.width is not None:
            raise ValueError(f"width {self.width} only goes with name tv, not with {self.name}; set name to tv, or width to null")
        return self

    @property
    def text(self) -> str:
        """The member in a few words: `hellinger`, `alpha 0.75 to 1.2 over 300 steps`, `tv of width 0.1`."""
        if self.alpha is not None:
            return f"alpha {self.alpha}"
        return self.name if self.width is None else f"{self.name} of width {self.width:g}"


class ScheduledMember(Member):
    """The member that takes over at a step."""

    name: MemberName = Live(..., "Which divergence.")
    step: int = Live(..., "The first step under this member; a ramp of its alpha begins there.", ge=1, lt=2**31)


class Divergence(Member):
    """The member of the f-divergence family whose loss is minimised."""

    schedule: list[ScheduledMember] = Live(
        [],
        "Members that take over later, in the order of their steps: of those whose step has come, the last one is in force.",
    )

    @field_validator("schedule")
    @classmethod
    def _steps_increase(cls, schedule: list[ScheduledMember]) -> list[ScheduledMember]:
        for before, after in pairwise(schedule):
            if after.step <= before.step:
                raise ValueError(f"step {after.step} stands after step {before.step}; the steps must increase")
        return schedule

    @property
    def first(self) -> Member:
        """The member that the schedule replaces."""
        return Member(name=self.name, alpha=self.alpha, width=self.width)

    def scheduled(self, step: int) -> ScheduledMember | None:
        """The member that the schedule puts into force at `step`; None as long as the first one is."""
        return next((entry for entry in reversed(self.schedule) if entry.step <= step), None)


class Objective(Section):
    """What a step minimises."""

    kind: Literal["ftb", "ppo_clip", "grpo", "reinforce", "importance"] = Fixed(
        "ftb",
        "ftb is f-Trajectory Balance. The others are baselines on the same samples: PPO with a clipped ratio, GRPO, REINFORCE with the KL in the reward, and "
        "the importance-weighted gradient of the divergence. They need sampling.temperature 1 and top_p 1; all but importance ignore the divergence.",
    )
    divergence: Divergence = Field(default_factory=Divergence, description=Divergence.__doc__)
    custom: Annotated[str, AfterValidator(_member_path)] | None = Fixed(
        None, "Import path package.module:object of a Divergence, or of a function without arguments that makes one; the member called custom."
    )
    beta: float = Live(0.5, "Temperature of the target pi_ref e^{r/beta} / Z.", ge=1e-6)
    tempered: bool = Live(False, "Use (1/beta) L(beta Delta) instead of L(Delta); practical at small beta.")
    log_z: Literal["batch", "learned"] = Fixed(
        "batch", "Where log Z comes from: batch minimises the loss over each group; learned keeps one value per prompt and moves it step by step."
    )
    log_z_rate: float = Live(0.3, "How far a learned log Z moves down its prompt's mean slope per step, where a slope counts as at most 1.", gt=0, le=1)
    clip_range: float = Live(0.2, "How far the ratio of ppo_clip and grpo may leave 1 before its gradient is cut.", gt=0, le=1)
    truncated: Literal["keep", "mask", "reject"] = Live(
        "keep",
        "What becomes of completions that are cut at sampling.max_tokens. keep: such a completion is an outcome of the process that samples at most max_tokens "
        "tokens, with exactly the summed log-prob that it has, so the loss stays exact and its reward, usually low, pushes it down. mask: it is left out of "
        "loss and normaliser, and the policy is told nothing about it. reject: its whole group is rejected, counted with reason truncated; what is queued "
        "stays.",
    )


class Sampling(Section):
    """How completions are sampled; a live change reaches the groups that are started after it."""

    group_size: int = Fixed(32, "Completions per prompt (K).", ge=2, le=4096)
    temperature: float = Live(1.0, "Sampling temperature; any value is unbiased.", ge=0.01, le=2)
    top_p: float = Live(1.0, "Nucleus mass; any value is unbiased as long as the support stays full.", gt=0, le=1)
    max_tokens: int = Live(256, "Longest completion, in tokens.", ge=1)


class Actors(Section):
    """The generators."""

    count: int = Fixed(1, "Generator actors, each with its own engine, snapshot and version.", ge=1)
    cpus_each: float = Fixed(1.0, "CPU cores that each generator reserves.", ge=0)
    gpus_each: float = Fixed(0.0, "GPUs that each generator reserves.", ge=0)
    groups_in_flight: int = Fixed(8, "Groups that each generator works on at once.", ge=1)
    max_model_len: int = Fixed(512, "Longest prompt plus completion, in tokens.", ge=8)
    kv_cache_gib: float = Fixed(1.0, "Memory for the key-value cache of a CPU engine, in GiB.", gt=0)
    gpu_memory_utilization: float = Fixed(0.85, "Share of each GPU that its engine takes.", gt=0, le=1)
    push_every_steps: int = Live(1, "Steps between published adapters.", ge=1, lt=2**31)
    push_timeout_seconds: float = Live(60.0, "A push that takes longer takes its generator out until it is answered.", ge=1)
    push_retry_seconds: float = Live(2.0, "Wait before a failed push is tried again.", ge=0.1)
    canary_tolerance: float | None = Fixed(
        None, "Largest difference allowed between engine and learner on the canary's summed log-prob; null is 1e-3 in float32 and 1 in bfloat16.", gt=0
    )


class Staleness(Section):
    """How old a group may be."""

    max_steps: int | None = Live(None, "Groups with a token older than this many steps are dropped, counted; null keeps all.", ge=0, lt=2**31)


class Buffer(Section):
    """The queue between generators and learner."""

    capacity_groups: int = Fixed(32, "Groups queued or being generated; when they are that many, the generators wait.", ge=1)


class Learner(Section):
    """The optimizer's side."""

    ranks: int = Fixed(1, "Learner processes, which share each step's groups among them.", ge=1)
    cpus: float = Fixed(1.0, "CPU cores that each rank reserves.", ge=0)
    gpus: float = Fixed(0.0, "GPUs that each rank reserves; with several ranks 0 or 1.", ge=0)
    sharding: Literal["replicated", "fsdp2"] = Fixed(
        "replicated",
        "What each rank holds of the base model. replicated: all of it. fsdp2: a part of each decoder layer's frozen weights, gathered when the layer runs, "
        "for models that don't fit one GPU; embeddings, head and adapter stay whole.",
    )
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Fixed(
        "pack", "Where several ranks go. pack: close together; spread: apart; strict_pack: onto one node; strict_spread: each onto a node of its own."
    )
    collective_timeout_seconds: float = Fixed(600.0, "A rank that waits longer for the others ends the run.", gt=0)
    groups_per_step: int = Fixed(8, "Groups per optimizer step.", ge=1)
    micro_batch_tokens: int = Fixed(
        16384,
        "Tokens per forward and backward pass, a group's prompt counted once. Groups stay whole; the completions of one that is larger go through one by one "
        "or in parts, twice: for the log-probs of all, then for the gradient. The gradient is the same for any value; memory grows with it.",
        ge=1,
    )
    reference_actors: int = Fixed(
        0,
        "Actors that compute the reference's log-probs of each group once, when it is generated, so that the learner needs no pass for them; 0 leaves that to "
        "the learner. They pay where the learner is the bottleneck and there is a machine to spare.",
        ge=0,
        le=1024,
    )
    reference_cpus: float = Fixed(1.0, "CPU cores that each reference actor reserves.", ge=0)
    reference_gpus: float = Fixed(0.0, "GPUs that each reference actor reserves.", ge=0, le=1)
    recompute_activations: bool = Fixed(
        False, "Keep only the inputs of each layer for the backward pass and compute the rest again: a third more time, several times less memory."
    )
    compile: bool = Fixed(False, "Compile the model's norms, some seconds at the start; `ftb-llm bench learner --compiled` tells whether it pays.")
    float32_head: bool = Fixed(False, "Multiply in float32 in the head where model.dtype is bfloat16, as a CPU does anyway; sums are float32 in any case.")
    learning_rate: float = Live(3e-3, "Peak learning rate of AdamW.", gt=0, le=1)
    warmup_steps: int = Live(10, "Steps of linear warm-up.", ge=0, lt=2**31)
    decay: Literal["constant", "linear", "cosine"] = Live("cosine", "Shape of the decay from the warm-up's end to run.max_steps.")
    adam_beta1: float = Fixed(0.9, "Decay of AdamW's mean of gradients.", ge=0, lt=1)
    adam_beta2: float = Fixed(0.95, "Decay of AdamW's mean of squared gradients; policy gradients change fast, so it forgets faster than 0.999.", ge=0, lt=1)
    weight_decay: float = Fixed(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = Live(1.0, "Gradient norm above which gradients are scaled down.", gt=0)


class Control(Section):
    """The REST control plane."""

    enabled: bool = Fixed(True, "Serve the control plane.")
    host: str = Fixed("127.0.0.1", "Address to listen on; any but loopback needs control.token_env.", min_length=1)
    port: int = Fixed(8000, "Port to listen on.", ge=1, le=65535)
    token_env: str | None = Fixed(None, "Environment variable that holds the bearer token.", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


class Eval(Section):
    """The exact oracle, for tasks that have one."""

    every_steps: int = Live(25, "Steps between exact evaluations; the first and last step are always evaluated.", ge=1, lt=2**31)
    audit_groups: int = Fixed(4, "Groups sampled after the last push to compare engine and learner log-probs and speed.", ge=1)


class Checkpoint(Section):
    """What a run can be resumed from."""

    every_steps: int = Live(100, "Steps between checkpoints; one is always written at the end.", ge=1, lt=2**31)
    keep: int = Fixed(3, "Checkpoints, and adapters, to keep.", ge=1)


class Logging(Section):
    """What is shown while training."""

    progress: Literal["auto", "live", "plain", "off"] = Fixed("auto", "Live panel, plain lines, or nothing; auto shows the panel on a terminal.")
    every_steps: int = Fixed(10, "Steps between plain progress lines.", ge=1, lt=2**31)


class Config(Section):
    """A whole run."""

    run: Run = Field(default_factory=Run, description=Run.__doc__)
    model: Model = Field(default_factory=Model, description=Model.__doc__)
    data: Data = Field(default_factory=Data, description=Data.__doc__)
    rewards: Rewards = Field(default_factory=Rewards, description=Rewards.__doc__)
    objective: Objective = Field(default_factory=Objective, description=Objective.__doc__)
    sampling: Sampling = Field(default_factory=Sampling, description=Sampling.__doc__)
    actors: Actors = Field(default_factory=Actors, description=Actors.__doc__)
    staleness: Staleness = Field(default_factory=Staleness, description=Staleness.__doc__)
    buffer: Buffer = Field(default_factory=Buffer, description=Buffer.__doc__)
    learner: Learner = Field(default_factory=Learner, description=Learner.__doc__)
    control: Control = Field(default_factory=Control, description=Control.__doc__)
    eval: Eval = Field(default_factory=Eval, description=Eval.__doc__)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description=Checkpoint.__doc__)
    logging: Logging = Field(default_factory=Logging, description=Logging.__doc__)

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        problems = [*_objective_problems(self.objective, self.sampling), *_rank_problems(self.learner)]
        if self.buffer.capacity_groups < self.learner.groups_per_step:
            problems.append(
                f"buffer.capacity_groups {self.buffer.capacity_groups} can never fill a step of "
                f"learner.groups_per_step {self.learner.groups_per_step}; it must be at least as large"
            )
        if self.sampling.max_tokens >= self.actors.max_model_len:
            problems.append(
                f"sampling.max_tokens {self.sampling.max_tokens} leaves no room for a prompt in "
                f"actors.max_model_len {self.actors.max_model_len}; it must be smaller"
            )
        limit, every = self.staleness.max_steps, self.actors.push_every_steps
        if limit is not None and limit < every - 1:
            problems.append(
                f"staleness.max_steps {limit} can never be met before the next push with actors.push_every_steps {every}; "
                f"it must be at least {every - 1}, or null"
            )
        if self.control.host not in ("127.0.0.1", "localhost", "::1") and self.control.token_env is None:
            problems.append(
                f"control.host {self.control.host} is not loopback and needs a bearer token: set control.token_env to the environment variable that holds it"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _objective_problems(objective: Objective, sampling: Sampling) -> Iterator[str]:
    members = [objective.divergence, *objective.divergence.schedule]
    if objective.custom is None and any(member.name == "custom" for member in members):
        yield "objective.divergence.name custom needs objective.custom: the import path package.module:object of the divergence"
    if objective.kind == "ftb":
        return
    if objective.log_z == "learned":
        yield f"objective.log_z learned only goes with objective.kind ftb, not with {objective.kind}; it must be batch"
    if objective.tempered:
        yield f"objective.tempered true only goes with objective.kind ftb, not with {objective.kind}; it must be false"
    for key, value in (("temperature", sampling.temperature), ("top_p", sampling.top_p)):
        if value != 1:
            yield f"sampling.{key} {value:g} does not go with objective.kind {objective.kind}, which needs the policy's own samples; it must be 1"


def _rank_problems(learner: Learner) -> Iterator[str]:
    if learner.ranks > learner.groups_per_step:
        yield (
            f"learner.ranks {learner.ranks} leaves ranks without a group of learner.groups_per_step {learner.groups_per_step}; "
            "it must be at most that, since a group is never split"
        )
    if learner.ranks == 1 and learner.sharding == "fsdp2":
        yield "learner.sharding fsdp2 has nothing to share with learner.ranks 1; it must be replicated, or learner.ranks at least 2"
    if learner.ranks > 1 and learner.gpus not in (0, 1):
        yield f"learner.gpus {learner.gpus:g} is for each of learner.ranks {learner.ranks}, and a rank uses one GPU of its own; it must be 1, or 0 without GPUs"
    if learner.ranks > 1 and learner.cpus == learner.gpus == 0:
        yield f"learner.cpus 0 and learner.gpus 0 reserve no place for learner.ranks {learner.ranks}; one of them must be above 0"

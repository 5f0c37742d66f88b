"""The documents of the control plane, as they are answered and as OpenAPI describes them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["starting", "training", "stopping", "stopped", "finished", "failed"]


class Document(BaseModel):
    """Base of the answers; a run may report more than is described here."""

    model_config = ConfigDict(extra="allow")


class ErrorItem(BaseModel):
    """One thing that is wrong in a request."""

    path: str = Field(description="Dotted key of the setting; empty when the request as a whole is meant.")
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(description="`urn:ftb-llm:problem:<kind>`, or about:blank where the status says it all.")
    title: str
    status: int
    detail: str = Field(description="One line: what is wrong and what would be right.")
    instance: str = Field(description="Path of the request.")
    errors: list[ErrorItem] | None = Field(default=None, description="On 422, and on 409 for fixed settings.")
    current_etag: str | None = Field(default=None, description="On 412: the ETag to read and retry with.")


class Index(BaseModel):
    """What is served here."""

    service: Literal["ftb_llm control plane"] = "ftb_llm control plane"
    version: str
    docs: str = "/docs"
    openapi: str = "/openapi.json"
    status: str = "/v1/status"


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The run makes progress."""

    ready: Literal[True] = True


class ObjectiveStatus(Document):
    """The objective of the step in progress."""

    kind: str
    divergence: str
    alpha: float | None
    beta: float
    tempered: bool


class ActorStatus(Document):
    """One generator."""

    name: str
    state: str
    version: int | None = Field(description="Policy version it samples from; 0 is the base model, null before its first push.")
    push_pause_ms: float | None = Field(description="Pause of its engine at the last push.")
    groups_in_flight: int
    tokens_per_second: float | None
    last_error: str | None


class BufferStatus(Document):
    """The queue between generators and learner, in groups."""

    groups: int
    capacity: int


class StalenessStatus(Document):
    """Age in steps of the groups of the last step; `limit` null keeps all."""

    mean: float | None
    max: float | None
    min: float | None
    limit: int | None


class Throughput(Document):
    """Speed of both sides."""

    generate_tokens_per_second: float | None
    learn_tokens_per_second: float | None
    steps_per_second: float | None


class Accounting(Document):
    """Groups: `generated = trained + dropped_stale + rejected + buffered + leased`, at every instant."""

    generated: int
    trained: int
    dropped_stale: int
    rejected: int
    buffered: int
    leased: int
    reasons: dict[str, int] = Field(default_factory=dict, description="Why groups were dropped or rejected.")


class ReportsStatus(Document):
    """Whether `metrics.jsonl`, `events.jsonl` and `eval/` are written. While they can't be, the run goes on."""

    ok: bool
    waiting: int = Field(description="Lines and files that wait in memory.")
    lost: int = Field(description="Lines that were given up because too many waited.")
    problem: str | None = Field(description="What the disk says, while it does.")


class DivergenceStatus(Document):
    """One member of the family on the samples of the last step."""

    estimate: float | None = Field(
        description="Estimated divergence of the policy from its target; tv is the sum of absolute differences, js four times the usual one."
    )
    stderr: float | None = Field(description="Standard error of the estimate.")
    loss: float | None = Field(description="Mean loss that this member has, or would have.")
    weight_rms: float | None = Field(description="Root mean square of the weights it gives to the completions.")
    weight_max: float | None = Field(description="The largest of them in size.")
    ess: float | None = Field(description="How many of the step's completions carry its gradient.")


class Status(Document):
    """The run at a glance."""

    run: str
    state: State
    step: int = Field(description="Steps finished.")
    max_steps: int
    policy_version: int = Field(description="Newest published adapter; 0 is the base model.")
    config_version: int
    objective: ObjectiveStatus
    actors: list[ActorStatus]
    buffer: BufferStatus
    staleness: StalenessStatus
    throughput: Throughput
    divergences: dict[str, DivergenceStatus] = Field(description="Every member of the family on the samples of the last step, whichever trains.")
    reward: dict[str, float | None]
    eval: dict[str, float | None] = Field(description="Latest exact numbers; empty for tasks without an oracle.")
    accounting: Accounting
    last_error: str | None
    last_error_step: int | None = Field(default=None, description="Steps finished when it happened.")
    last_error_time: float | None = Field(default=None, description="Unix time.")
    last_checkpoint: int | None = Field(default=None, description="Step of the newest checkpoint.")
    reports: ReportsStatus | None = None
    url: str | None
    run_dir: str


class CurrentConfig(BaseModel):
    """The resolved config; the `ETag` header names this version for `If-Match`."""

    version: int
    config: dict[str, Any]


class ConfigPatched(BaseModel):
    """What a patch did; the `ETag` header names the new version."""

    config_version: int
    effective_step: int = Field(description="The first step that runs under this version.")
    changed: dict[str, tuple[Any, Any]] = Field(description="Dotted key to [old, new]; empty when the patch changed nothing.")


class ConfigHistoryItem(BaseModel):
    """One version of the config."""

    version: int
    effective_step: int
    source: str = Field(description="start, resume, cli or rest; the last two by what the client's User-Agent claims to be.")
    time: float = Field(description="Unix time.")
    changed: dict[str, tuple[Any, Any]]


class ConfigHistory(BaseModel):
    """Some of the versions, oldest first."""

    total: int = Field(description="How many there are, and so the newest one's number.")
    next: int | None = Field(description="`since` of the request that goes on from here; null when the newest version is among these.")
    versions: list[ConfigHistoryItem]


class Accepted(Document):
    """A command was taken; it is done when `poll` answers what `until` says."""

    action: str
    poll: str
    until: str

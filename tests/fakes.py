"""Small hand-written stand-ins for the controller's collaborators, and makers of the things that travel."""

import asyncio
from typing import Any

from ftb_llm.errors import NotServing, RewardError
from ftb_llm.types import (
    AdapterRef,
    CanaryValue,
    Completion,
    EvalReport,
    FinishReason,
    Group,
    GroupRequest,
    Prompt,
    PushReport,
    SamplingSpec,
    ScoredGroup,
    StepReport,
    StepRequest,
)


def make_prompt(index: int = 0, **columns: Any) -> Prompt:
    return Prompt(index=index, text=f"prompt {index}", token_ids=(1, index), columns=columns)


def make_completion(text: str = "a", *, version: int = 0, max_version: int | None = None) -> Completion:
    return Completion(
        token_ids=(5, 2),
        text=text,
        finish_reason=FinishReason.STOP,
        logprob=-1.0,
        min_version=version,
        max_version=version if max_version is None else max_version,
    )


def make_group(identifier: str = "g000000000", *, version: int = 0, size: int = 2, prompt: Prompt | None = None) -> Group:
    return Group(
        id=identifier,
        prompt=prompt or make_prompt(),
        completions=tuple(make_completion(f"text {k}", version=version) for k in range(size)),
        generator="generator-0",
        generate_seconds=0.1,
    )


def make_scored(number: int = 0, *, version: int = 0, size: int = 2) -> ScoredGroup:
    return ScoredGroup(group=make_group(f"g{number:09d}", version=version, size=size), rewards=tuple(float(k) for k in range(size)))


def make_request(number: int = 0, size: int = 2) -> GroupRequest:
    return GroupRequest(group_id=f"g{number:09d}", prompt=make_prompt(), sampling=SamplingSpec(group_size=size, temperature=1.0, top_p=1.0, max_tokens=4))


def make_adapter(version: int) -> AdapterRef:
    canary = CanaryValue(prompt_ids=(1,), completion_ids=(2, 3), adapted=-2.0, base=-3.0)
    return AdapterRef(version=version, path=f"adapters/v{version:06d}", sha256="0" * 64, byte_count=8, scale=2.0, canary=canary)


class FakeGenerator:
    """Answers at once with the version it was pushed last; `bad_pushes` fail their canary, `dies_after` groups kill it."""

    def __init__(self, name: str = "generator-0", *, bad_pushes: int = 0, dies_after: int | None = None) -> None:
        self.name = name
        self.version = 0
        self.pushed: list[int] = []
        self.bad_pushes = bad_pushes
        self.serving = False
        self.dies_after = dies_after
        self.generated = 0

    async def start(self) -> dict[str, Any]:
        return {}

    async def generate(self, request: GroupRequest) -> Group:
        await asyncio.sleep(0)
        if not self.serving:
            raise NotServing("the canary failed")
        if self.dies_after is not None and self.generated >= self.dies_after:
            raise RuntimeError("engine died")
        self.generated += 1
        return make_group(request.group_id, version=self.version, size=request.sampling.group_size, prompt=request.prompt)

    async def push(self, adapter: AdapterRef, payload: Any) -> PushReport:
        await asyncio.sleep(0)
        self.pushed.append(adapter.version)
        ok = self.bad_pushes <= 0
        self.bad_pushes -= 1
        self.serving = ok
        if ok:
            self.version = adapter.version
        return PushReport(
            generator=self.name,
            version=adapter.version,
            byte_count=adapter.byte_count,
            pause_ms=5.0,
            total_ms=9.0,
            canary_engine=-2.0 if ok else -3.0,
            canary_learner=-2.0,
            canary_base=-3.0,
            ok=ok,
            problem=None if ok else "engine still answers as the base model",
        )

    async def measure_speed(self) -> float:
        return 1000.0

    async def info(self) -> dict[str, Any]:
        return {}

    async def stop(self) -> None:
        return None


class FakeLearner:
    """Keeps what it was asked; `on_step` runs inside each step."""

    def __init__(self, on_step: Any = None) -> None:
        self.requests: list[StepRequest] = []
        self.published: list[int] = []
        self.checkpoints: list[int] = []
        self.loaded: str | None = None
        self.on_step = on_step

    async def start(self) -> dict[str, Any]:
        return {}

    async def step(self, request: StepRequest) -> StepReport:
        self.requests.append(request)
        await asyncio.sleep(0)
        if self.on_step is not None:
            self.on_step(request)
        values = tuple(tuple(0.0 for _ in scored.rewards) for scored in request.groups)
        return StepReport(step=request.step, loss=1.0 / request.step, metrics={"optim/grad_norm": 1.0}, delta_GK=values, logp_GK=values)

    async def publish(self, version: int) -> tuple[AdapterRef, Any]:
        self.published.append(version)
        return make_adapter(version), b"payload"

    async def evaluate(self, step: int, beta: float) -> EvalReport | None:
        metrics = {"eval/exact_tv": 0.8 / (1 + step), "eval/reward": 1.0, "eval/target_reward": 2.0, "eval/modes_found": 1.0, "eval/modes_total": 4.0}
        return EvalReport(step=step, metrics=metrics, modes_found=1, modes_total=4, policy={"p": [1.0]}, target={"p": [1.0]}, grid_shape=None)

    async def logprobs(self, groups: list[Group]) -> list[list[float]]:
        return [[completion.logprob + 0.25 for completion in group.completions] for group in groups]

    async def save_checkpoint(self, step: int) -> str:
        self.checkpoints.append(step)
        return f"checkpoints/step_{step:06d}"

    async def load_checkpoint(self, path: str) -> int:
        self.loaded = path
        return int(path.rsplit("_", 1)[1])

    async def info(self) -> dict[str, Any]:
        return {}


class FakeRewards:
    """Rewards by position; every group whose number is in `bad` is refused."""

    def __init__(self, bad: set[int] | None = None) -> None:
        self.bad = bad or set()

    async def score(self, group: Group) -> tuple[float, ...]:
        if int(group.id[1:]) in self.bad:
            raise RewardError("raised", "reward raised ValueError: no")
        return tuple(float(k) for k in range(len(group.completions)))


class FakeProgress:
    def __init__(self) -> None:
        self.statuses: list[dict[str, Any]] = []
        self.lines: list[str] = []

    def update(self, status: dict[str, Any]) -> None:
        self.statuses.append(status)

    def line(self, text: str) -> None:
        self.lines.append(text)

"""Small hand-written stand-ins for the controller's collaborators, and makers of the things that travel."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftb_llm.buffer import GroupBuffer
from ftb_llm.config import build_config
from ftb_llm.config.ledger import ConfigLedger
from ftb_llm.controller import Controller
from ftb_llm.datasets import PromptOrder
from ftb_llm.errors import NotServing, RewardError
from ftb_llm.journal import Journal
from ftb_llm.metrics import step_row
from ftb_llm.run_dir import RunDir
from ftb_llm.run_log import RunLog
from ftb_llm.state import GeneratorPhase, GeneratorState, Phase, RunState
from ftb_llm.status import run_status
from ftb_llm.types import (
    AdapterRef,
    CanaryValue,
    Completion,
    EvalReport,
    FinishReason,
    Group,
    GroupRequest,
    GroupState,
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
        return {"packed": True}

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


def make_run(
    path: Path,
    settings: dict[str, Any],
    *,
    generators: Sequence[FakeGenerator] = (),
    learner: FakeLearner | None = None,
    rewards: FakeRewards | None = None,
    progress: FakeProgress | None = None,
    resume_from: Path | None = None,
) -> Controller:
    """The real controller over fakes, in the folder `path`."""
    run_dir = RunDir(path) if resume_from else RunDir.create(path)
    journal = Journal(path / "run.db")
    return Controller(
        config=build_config(settings),
        config_history=journal.past_configs(),
        run_dir=run_dir,
        journal=journal,
        prompts=PromptOrder([make_prompt(index) for index in range(5)], seed=0, shuffle=True),
        generators=generators or [FakeGenerator()],
        learner=learner or FakeLearner(),
        rewards=rewards or FakeRewards(),
        progress=progress or FakeProgress(),
        resume_from=resume_from,
    )


def make_row(step: int = 11, **metrics: float) -> dict[str, Any]:
    """A row of metrics.jsonl as a step makes it."""
    groups = [make_scored(number, version=step - 3) for number in range(2)]
    ledger = ConfigLedger(build_config({}), next_step=lambda: 1, on_change=lambda version: None)
    report = StepReport(step=step, loss=0.5, metrics={"optim/grad_norm": 1.0, **metrics}, delta_GK=(), logp_GK=())
    row = step_row(
        now=1_760_000_000.0,
        config_version=1,
        policy_version=8,
        objective=ledger.objective_at(step),
        groups=groups,
        report=report,
        timings={"perf/queue_groups": 3.0, "time/learn_seconds": 0.25},
    )
    return row | {"time/step_seconds": 0.5}


def make_push(generator: str = "generator-0", version: int = 8, *, problem: str | None = None) -> PushReport:
    return PushReport(
        generator=generator,
        version=version,
        byte_count=8,
        pause_ms=91.5,
        total_ms=120.0,
        canary_engine=-2.0 if problem is None else -3.0,
        canary_learner=-2.0,
        canary_base=-3.0,
        ok=problem is None,
        problem=problem,
    )


def make_state(*, step: int = 11, phase: Phase = Phase.TRAINING, row: dict[str, Any] | None = None) -> RunState:
    """A run at step 11 with one generator that serves and one whose first push failed."""
    serving, out = GeneratorState(name="generator-0"), GeneratorState(name="generator-1")
    serving.version, serving.last_push, serving.groups_in_flight = 8, make_push(), 8
    serving.enter(GeneratorPhase.SERVING)
    out.enter(GeneratorPhase.OUT, "canary failed at version 8: engine still answers as the base model")
    state = RunState(name="fake", run_dir="runs/fake", phase=phase, started_step=step, policy_version=8, generators=[serving, out])
    state.finish_step(step, row or make_row(step))
    return state


def make_status(state: RunState, ledger: ConfigLedger) -> dict[str, Any]:
    """The status document of that run, as the real one is made."""
    buffer = GroupBuffer(capacity=32, journal=Journal(Path(":memory:")))
    counts = {GroupState.TRAINED: 11, GroupState.BUFFERED: 3, GroupState.LEASED: 3, GroupState.DROPPED_STALE: 1, GroupState.REJECTED: 2}
    buffer.accounting.groups = Counter(counts)
    buffer.accounting.reasons = Counter({"stale": 1, "not_finite": 2})
    return run_status(state, ledger, buffer, RunLog(Path("runs/fake")))

"""The controller: one asyncio loop that moves groups from generators to the learner and adapters back.

    work list ─► generation workers ─► rewards ─► group buffer ─► training loop ─► newest adapter ─► delivery loops
                 (groups_in_flight       (own       (bounded)      (one step       (broadcast)        (one per
                  per generator)       processes)                   at a time)                        generator)

Who waits for whom:
- a generation worker waits for its generator to serve (unblocked by a good push) and for a place in the buffer
  (unblocked by the training loop's lease);
- the training loop waits for enough groups (unblocked by the workers; if every generator is dead it fails instead) and
  for the learner's own calls;
- a delivery loop waits for a newer adapter (unblocked by the training loop). The training loop never waits for it, and
  generation goes on while it pushes.
No two of them wait for each other, so there is no cycle to deadlock in.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftb_llm.api import prometheus
from ftb_llm.audit import logprob_differences, speed_around, speed_of
from ftb_llm.buffer import GroupBuffer
from ftb_llm.config import Config
from ftb_llm.config.ledger import ConfigLedger, ConfigVersion, PastVersions
from ftb_llm.config.resolve import resolve_learning_rate
from ftb_llm.config_record import record_config
from ftb_llm.datasets import PromptOrder, check_prompts_fit
from ftb_llm.delivery import NewestAdapter, abandon, catch_up, deliver_forever
from ftb_llm.errors import FtbError, WrongState
from ftb_llm.events import Events
from ftb_llm.generation import Generation, WorkList, group_number
from ftb_llm.journal import Journal
from ftb_llm.metrics import step_row
from ftb_llm.ports import GeneratorPort, LearnerPort, Progress, ReferencePort, RewardPort
from ftb_llm.readiness import not_ready_cause
from ftb_llm.run_dir import RunDir, checkpoint_step
from ftb_llm.run_log import RunLog
from ftb_llm.state import GeneratorPhase, GeneratorState, Phase, RunState
from ftb_llm.status import run_status
from ftb_llm.types import ScoredGroup, StepRequest

_NOT_PACKED = (
    "the model departs from transformers' conventions (a sliding window shorter than actors.max_model_len, capped logits, an attention of its own), "
    "so the learner runs it row by row with full logits: exact, but slower, and with much more memory"
)
_DRAIN_SECONDS = 10.0  # how long a stop waits for groups that are being generated


class Controller:
    """One run, from started collaborators to its last checkpoint. The control plane talks to this object."""

    def __init__(
        self,
        *,
        config: Config,
        config_history: PastVersions | None,
        run_dir: RunDir,
        journal: Journal,
        prompts: PromptOrder,
        generators: Sequence[GeneratorPort],
        learner: LearnerPort,
        rewards: RewardPort,
        reference: ReferencePort | None = None,
        progress: Progress,
        resume_from: Path | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._journal = journal
        self._learner = learner
        self._progress = progress
        self._resume_from = resume_from
        self._longest_prompt = prompts.longest
        self._ports = {port.name: port for port in generators}
        self.state = RunState(name=run_dir.path.name, run_dir=str(run_dir.path), generators=[GeneratorState(name=port.name) for port in generators])
        self.state.last_checkpoint = checkpoint_step(resume_from) if resume_from else None
        self.state.step = self.state.started_step = self.state.last_checkpoint or 0
        self._log = RunLog(run_dir.path)
        self._events = Events(log=self._log, state=self.state, progress=progress)
        self.emit = self._events.emit
        self._config_before = config if config_history is None else config_history.config
        self.ledger = ConfigLedger(config, next_step=self._next_step, on_change=self._record_config, past=config_history)
        if config_history is None:
            journal.add_config(self.ledger.current)
        elif self.ledger.added is not None:
            self._record_config(self.ledger.added)  # a resume changed the config: that is an event
        self.buffer = GroupBuffer(capacity=config.buffer.capacity_groups, journal=journal)
        self.buffer.forget_versions_after(self.state.step)
        self._newest = NewestAdapter()
        self._generation = Generation(
            config=self._config,
            work=WorkList([group_number(identifier) for identifier in journal.group_ids()]),
            prompts=prompts,
            buffer=self.buffer,
            rewards=rewards,
            reference=reference,
            emit=self.emit,
        )
        self._stop = asyncio.Event()
        self._all_dead = asyncio.Event()
        self._checkpoint_after: int | None = None  # the step after which somebody wants one
        self._published = False
        self._last_step_end = time.monotonic()
        self.facts: dict[str, Any] = {}  # measured once per run, for summary.json

    # -- what the control plane and the command line see

    def status(self) -> dict[str, Any]:
        return run_status(self.state, self.ledger, self.buffer, self._log)

    def metrics_text(self) -> bytes:
        return prometheus.render(self.status(), self.state.last_values)

    def not_ready_cause(self) -> str | None:
        """Why nothing moves, or None."""
        return not_ready_cause(self.state, self._config(), self.buffer)

    def request_stop(self, source: str) -> None:
        if self.state.phase not in (Phase.STARTING, Phase.TRAINING):
            raise WrongState(f"the run is already {self.state.phase.value}")
        self.emit("stop_requested", f"stop requested by {source}; the step under way is finished first", source=source)
        self.state.phase = Phase.STOPPING
        self._stop.set()

    def request_checkpoint(self, source: str) -> dict[str, Any]:
        if self.state.phase is not Phase.TRAINING:
            raise WrongState(f"the run is {self.state.phase.value}; a checkpoint can be asked for while it trains")
        self._checkpoint_after = min(self.state.step + 1, self._config().run.max_steps)
        return {"after_step": self._checkpoint_after}

    # -- the run

    async def run(self) -> None:
        """Start, train, and close; afterwards `state.phase` says how it ended."""
        try:
            await self._start()
            await self._train()
            await self._close()
        except BaseException as caught:  # noqa: BLE001 - recorded, then raised again
            error = root_cause(caught)
            self.state.phase = Phase.FAILED
            self.state.fail(failure(error))
            self.emit("finished", f"the run failed at step {self.state.step}: {self.state.last_error}")
            raise error from None
        finally:
            for generator in self.state.generators:
                await abandon(generator)
            self._events.close()

    async def _start(self) -> None:
        self.emit("starting", "engines load and warm up")
        learner, *_ = await asyncio.gather(self._learner.start(), *(port.start() for port in self._ports.values()))
        if not learner.get("packed", True):
            self.emit("warning", _NOT_PACKED)
        if self._resume_from is not None:
            await self._learner.load_checkpoint(str(self._resume_from))
            await asyncio.to_thread(self._log.forget_metrics_after, self.state.step)
            for damage in await asyncio.to_thread(self._run_dir.damage):
                self.emit("warning", damage)
        await self._publish()
        speed = await speed_around(list(self._ports.values()), self._push_to_all)
        if not self._serving():
            problems = "; ".join(f"{state.name}: {state.last_error}" for state in self.state.generators)
            raise FtbError(f"no generator took its first adapter: {problems}")
        self.facts |= speed if len(self._serving()) == len(self._ports) else {}
        if self._resume_from is None:
            await self._evaluate_start()
        if not self._stop.is_set():
            self.state.phase = Phase.TRAINING
        self.emit("started", f"training from step {self.state.step} to {self._config().run.max_steps}", resumed=self._resume_from is not None)

    async def _train(self) -> None:
        """Run the loops of the flow until the training loop ends; the first one that breaks ends them all."""
        self._last_step_end = self.state.last_progress = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            workers = [
                tasks.create_task(self._generation.work_forever(self._ports[state.name], state))
                for state in self.state.generators
                for _ in range(self._config().actors.groups_in_flight)
            ]
            others = [
                tasks.create_task(deliver_forever(self._ports[state.name], state, self._newest, self._config, self.emit)) for state in self.state.generators
            ]
            others.append(tasks.create_task(self._watch_generators(workers)))
            await self._train_steps()
            self.state.phase = Phase.STOPPING  # from here on no step follows
            await self._generation.drain(_DRAIN_SECONDS)
            for task in [*workers, *others]:
                task.cancel()

    async def _train_steps(self) -> None:
        while self.state.step < self._config().run.max_steps and not self._stop.is_set():
            step = self.state.step + 1
            groups = await self._lease(step)
            if groups is None:
                return
            if step > self._config().run.max_steps:  # lowered while the groups were waited for
                return self.buffer.give_back(groups)
            await self._step(step, groups)

    async def _lease(self, step: int) -> list[ScoredGroup] | None:
        """The step's groups; None when the run is stopped first."""
        lease = asyncio.ensure_future(
            self.buffer.lease(self._config().learner.groups_per_step, step=step, max_staleness_steps=lambda: self._config().staleness.max_steps)
        )
        stop = asyncio.ensure_future(self._stop.wait())
        dead = asyncio.ensure_future(self._all_dead.wait())
        try:
            await asyncio.wait({lease, stop, dead}, return_when=asyncio.FIRST_COMPLETED)
            if lease.done():
                return lease.result()
            if stop.done():
                return None
            await self._checkpoint()
            raise FtbError("every generator is dead: " + "; ".join(f"{state.name}: {state.last_error}" for state in self.state.generators))
        finally:
            for waiting in (lease, stop, dead):
                waiting.cancel()

    async def _step(self, step: int, groups: list[ScoredGroup]) -> None:
        leased_at = time.monotonic()
        self.state.started_step = step
        version = self.ledger.at_step(step)
        request = StepRequest(
            step=step,
            config_version=version.version,
            objective=self.ledger.objective_at(step),
            learning_rate=resolve_learning_rate(version.config, step),
            max_grad_norm=version.config.learner.max_grad_norm,
            groups=tuple(groups),
        )
        try:
            report = await self._learner.step(request)
        except BaseException:
            self.buffer.give_back(groups)
            raise
        learned_at = time.monotonic()
        self.buffer.settle(groups, step=step)
        self.state.learn_throughput.add(sum(scored.group.token_count for scored in groups))
        timings = {
            "perf/generate_tokens_per_second": sum(generator.throughput.per_second() for generator in self.state.generators),
            "perf/learn_tokens_per_second": self.state.learn_throughput.per_second(),
            "perf/queue_groups": float(self.buffer.depth),
            "time/learner_wait_seconds": leased_at - self._last_step_end,
            "time/generator_wait_seconds": self._generation.take_wait_seconds() / (len(self._ports) * version.config.actors.groups_in_flight),
            "time/learn_seconds": learned_at - leased_at,
        }
        row = step_row(
            now=time.time(),
            config_version=version.version,
            policy_version=self.state.policy_version,
            objective=request.objective,
            groups=groups,
            report=report,
            timings=timings,
        )
        self.state.step = step
        row |= await self._after_step(version.config, step)
        now = time.monotonic()
        row["time/step_seconds"], self._last_step_end = now - self._last_step_end, now
        self._log.append_metrics(row)
        self.state.finish_step(step, row)
        self._progress.update(self.status())

    async def _after_step(self, config: Config, step: int) -> dict[str, Any]:
        """What is due at this step's end. Returns the metrics that it adds to the step's row."""
        last = step >= self._config().run.max_steps or self._stop.is_set()
        if last or step % config.actors.push_every_steps == 0:
            await self._publish()
        wanted = self._checkpoint_after is not None and step >= self._checkpoint_after
        if wanted or step % config.checkpoint.every_steps == 0:
            await self._checkpoint()
        if last or step % config.eval.every_steps == 0:
            return await self._evaluate(config.objective.beta)
        return {}

    async def _publish(self) -> None:
        """Publish the adapter as it is now; the delivery loops take it from here."""
        if self.state.policy_version == self.state.step and self._published:
            return
        adapter, payload = await self._learner.publish(self.state.step)
        self.state.policy_version = adapter.version
        self._published = True
        await self._newest.publish(adapter, payload)

    async def _push_to_all(self) -> None:
        """Bring every living generator to the newest adapter; those that can't get there are out."""
        adapter, payload = await self._newest.newer_than(-1)
        limit = self._config().actors.push_timeout_seconds
        pushes = (catch_up(self._ports[state.name], state, adapter, payload, timeout_seconds=limit, emit=self.emit) for state in self.state.generators)
        await asyncio.gather(*pushes)

    async def _checkpoint(self) -> None:
        """Save the present step, unless it is saved already."""
        if self._checkpoint_after is not None and self.state.step >= self._checkpoint_after:
            self._checkpoint_after = None
        if self.state.last_checkpoint == self.state.step:
            return
        path = await self._learner.save_checkpoint(self.state.step)
        self.state.last_checkpoint = self.state.step
        self.emit("checkpoint", f"checkpoint of step {self.state.step} in {path}", path=path)

    async def _evaluate(self, beta: float) -> dict[str, Any]:
        """Metrics of the exact oracle; empty where the task has none. The policy itself goes to eval/, for the heat maps."""
        report = await self._learner.evaluate(self.state.step, beta)
        if report is None:
            return {}
        self._log.write_document("eval/first.json" if report.step == 0 else "eval/last.json", asdict(report))
        return report.metrics

    async def _evaluate_start(self) -> None:
        metrics = await self._evaluate(self._config().objective.beta)
        row = {"step": 0, "time": time.time(), "config_version": self.ledger.current.version, "policy_version": 0, **metrics}
        self._log.append_metrics(row)
        self.state.finish_step(0, row)

    async def _close(self) -> None:
        """Whatever ended the training, the last step is published, evaluated and saved; a run that went to its end is audited."""
        stopped = self._stop.is_set()
        self.state.phase = Phase.STOPPING
        await self._publish()
        await self._complete_last_row()
        await self._checkpoint()
        if not stopped:
            await self._audit()
        self.state.phase = Phase.STOPPED if stopped else Phase.FINISHED
        self.emit("finished", f"the run {'was stopped' if stopped else 'finished'} at step {self.state.step}")
        self._progress.update(self.status())

    async def _complete_last_row(self) -> None:
        """A stop between two steps, or a lowered max_steps, leaves a last row that was not evaluated."""
        step, row = self.state.step, self.state.last_row
        if row.get("step") != step or any(name.startswith("eval/") for name in row):
            return
        metrics = await self._evaluate(self.ledger.at_step(step).config.objective.beta)
        await asyncio.to_thread(self._log.forget_metrics_after, step - 1)
        self._log.append_metrics(row | metrics)
        self.state.finish_step(step, row | metrics)

    async def _audit(self) -> None:
        """Bring the engines to the last adapter and compare them with the learner. The run is saved already: a failure is a warning."""
        try:
            await self._push_to_all()
            requests = [self._generation.request(number) for number in range(self._config().eval.audit_groups)]
            self.facts |= await logprob_differences(self._serving(), self._learner, requests)
            self.facts |= await speed_of(self._serving())
        except FtbError as error:
            self.emit("warning", f"engine and learner could not be compared after the last step: {error}")

    # -- inside

    def _serving(self) -> list[GeneratorPort]:
        return [self._ports[state.name] for state in self.state.generators if state.phase is GeneratorPhase.SERVING]

    def _config(self) -> Config:
        return self.ledger.current.config

    def _next_step(self) -> int:
        """The first step that has not started; `WrongState` when none will."""
        if self.state.phase not in (Phase.STARTING, Phase.TRAINING):
            raise WrongState(f"no step will follow: the run is {self.state.phase.value}")
        return self.state.started_step + 1

    def _record_config(self, version: ConfigVersion) -> None:
        """Called before a version counts: what is raised here refuses it."""
        check_prompts_fit(version.config, self._longest_prompt)
        record_config(version, before=self._config_before, journal=self._journal, run_dir=self._run_dir, emit=self.emit)
        self._config_before = version.config

    async def _watch_generators(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """Workers end only when their generator is dead; when all have, the training loop must not wait for groups."""
        await asyncio.wait(workers)
        self._all_dead.set()


def root_cause(error: BaseException) -> BaseException:
    """The first error inside a task group's bundle: what broke, the others were only cancelled for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def failure(error: BaseException) -> str:
    """What ended the run: our own errors speak for themselves, of others the name says the most."""
    text = str(error)
    return text if text and isinstance(error, FtbError) else ": ".join(filter(None, (type(error).__name__, text)))

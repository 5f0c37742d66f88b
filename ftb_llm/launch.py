"""The composition root: checks everything, starts everything, and puts everything away again.

The only module that knows actors, learner, Ray, control plane and controller at once; nothing but the command line imports it.
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.merge import check_adapter, merged_weights
from actors.ray_actor import GeneratorActor
from ftb_llm.api.app import create_app
from ftb_llm.api.server import check_port, serve
from ftb_llm.bench.family_spec import Found, Task
from ftb_llm.bench.spec import TrialResult, TrialSpec
from ftb_llm.bench.workers import spread
from ftb_llm.config import Config
from ftb_llm.config.ledger import difference
from ftb_llm.controller import Controller
from ftb_llm.custom import load_custom
from ftb_llm.datasets import PromptOrder
from ftb_llm.errors import CheckpointError, FixedSetting, SetupError
from ftb_llm.export import Exported, export_merged
from ftb_llm.inputs import Inputs, read_inputs
from ftb_llm.journal import Journal, check_books
from ftb_llm.machine import PeakMemory, core_count, gpu_count, tree_rss_bytes
from ftb_llm.ports import Progress
from ftb_llm.preflight import read_token
from ftb_llm.progress import Progress as SilentProgress
from ftb_llm.remote import RemoteGenerator, RemoteLearner, RemoteReference, check_resources, reserved, running_ray
from ftb_llm.report import write_report
from ftb_llm.rewards import RewardSet, RewardWorkers
from ftb_llm.run_dir import RunDir
from ftb_llm.state import Phase
from ftb_llm.summary import summarise
from learner.checkpoint import verified
from learner.family_judge import judge_alone, trial_seconds
from learner.model_check import check_model
from learner.ray_actor import LearnerActor, ReferenceActor
from learner.trial import run_trial

JOURNAL = "run.db"
_MADE_OF = ("model.", "data.", "run.seed.", "sampling.group_size.", "objective.kind.", "objective.log_z.")  # whole sections and single settings
INTERRUPTED = 130


def train(config: Config, *, resume: Path | None, progress: Progress) -> int:
    """Run to the end. Returns 0, or 130 after Ctrl-C; raises on failure, before anything starts if the fault is in the setup."""
    began = time.monotonic()
    token = check_setup(config)
    os.environ.pop(config.control.token_env or "", None)  # neither rewards nor Ray's workers have a use for it
    inputs = read_inputs(config, progress)
    check_model(config, inputs.model_path, progress)

    def drive(run_dir: RunDir, place: PlacementGroup | None) -> int:
        try:
            return asyncio.run(_run(config, inputs, run_dir, place, token, progress, began))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None  # a second Ctrl-C

    if resume:
        with RunDir.open(resume).locked() as run_dir:
            check_resumable(run_dir)
            check_resumed_config(run_dir, config)
            with ray_for(config) as place:
                return drive(run_dir, place)
    path = Path(config.run.dir) / (config.run.name or default_name(config))
    RunDir.check_free(path)
    with ray_for(config) as place, gone_unless_started(RunDir.create(path)) as created, created.locked() as run_dir:
        return drive(run_dir, place)


@contextmanager
def gone_unless_started(run_dir: RunDir) -> Iterator[RunDir]:
    """Take a fresh run's folder away when its start fails: there is nothing in it, and the name is free for the next try."""
    try:
        yield run_dir
    except BaseException:
        started = any(event["kind"] == "started" for event in run_dir.events())
        if not started and run_dir.newest_checkpoint() is None:  # events may be missing where a disk was full
            shutil.rmtree(run_dir.path, ignore_errors=True)  # actors that are just ending may still write; the reason counts more
        raise


@contextmanager
def ray_for(config: Config) -> Iterator[PlacementGroup | None]:
    """A Ray with room for the run's actors; yields the place that is kept for the learner's ranks."""
    learner = config.learner
    bundle = {name: amount for name, amount in (("CPU", learner.cpus), ("GPU", learner.gpus)) if amount}
    with running_ray():
        check_resources(*wanted_resources(config))
        with reserved(bundle, count=learner.ranks, strategy=learner.placement) as place:
            yield place


def check_setup(config: Config) -> str | None:
    """Everything that can be known to be wrong before anything is started. Returns the control plane's bearer token."""
    RewardSet(config.rewards.functions)
    if config.objective.custom is not None:
        load_custom(config.objective.custom)
    if config.control.enabled:
        check_port(config.control.host, config.control.port)
    if not os.environ.get("RAY_ADDRESS"):
        check_machine(config)
    return read_token(config)


def check_machine(config: Config) -> None:
    """This machine must hold all actors; a cluster is asked when its Ray is there."""
    (cpus, gpus), learner, actors = wanted_resources(config), config.learner, config.actors
    ranks = "" if learner.ranks == 1 else f"learner.ranks {learner.ranks} x "
    fewer = "" if learner.ranks == 1 else ", learner.ranks"
    some = learner.reference_actors
    beside = (f" plus {some} x learner.reference_cpus {learner.reference_cpus:g}", f" plus {some} x learner.reference_gpus {learner.reference_gpus:g}")
    cpus_beside, gpus_beside = beside if some else ("", "")
    if cpus > core_count():
        raise SetupError(
            f"actors.cpus_each: {actors.count} x {actors.cpus_each:g} plus {ranks}learner.cpus {learner.cpus:g}{cpus_beside} "
            f"are {cpus:g} cores, but this machine has {core_count()}; lower actors.count, actors.cpus_each{fewer} or learner.cpus"
        )
    if gpus > gpu_count():
        raise SetupError(
            f"actors.gpus_each: {actors.count} x {actors.gpus_each:g} plus {ranks}learner.gpus {learner.gpus:g}{gpus_beside} "
            f"are {gpus:g} GPUs, but this machine has {gpu_count()} that torch can use; lower actors.count, actors.gpus_each{fewer} or learner.gpus"
        )


def check_resumable(run_dir: RunDir) -> None:
    """What a run goes on from must be whole; that is known here, before engines are loaded for nothing."""
    checkpoint = run_dir.newest_checkpoint()
    if checkpoint is not None:
        try:
            verified(checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; move {checkpoint} away to go on from the one before it") from None
    if checkpoint is not None or any(True for _ in run_dir.metrics()):
        check_books(run_dir.path / JOURNAL)


def check_resumed_config(run_dir: RunDir, config: Config) -> None:
    """A resumed run may move to other resources or schedules, but what its checkpoint and its queue are made of stays."""
    with closing(Journal(run_dir.path / JOURNAL)) as journal:
        past = journal.past_configs()
    changed = [key for key in difference(past.config, config) if f"{key}.".startswith(_MADE_OF)] if past else []
    if changed:
        raise FixedSetting(changed)


def wanted_resources(config: Config) -> tuple[float, float]:
    """CPUs and GPUs of all actors together."""
    actors, learner = config.actors, config.learner
    cpus = actors.count * actors.cpus_each + learner.ranks * learner.cpus + learner.reference_actors * learner.reference_cpus
    return cpus, actors.count * actors.gpus_each + learner.ranks * learner.gpus + learner.reference_actors * learner.reference_gpus


def default_name(config: Config) -> str:
    stem = Path(config.data.path.removeprefix("builtin:")).stem or "run"
    return f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"


async def _run(config: Config, inputs: Inputs, run_dir: RunDir, place: PlacementGroup | None, token: str | None, progress: Progress, began: float) -> int:
    """Compose the run, run it, and write its summary and report whatever its end."""
    checkpoint = run_dir.newest_checkpoint()
    if checkpoint is None:
        run_dir.forget_metrics_after(-1)  # a run that never came to its first checkpoint begins again
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(closing(Journal(run_dir.path / JOURNAL)))
        past = journal.past_configs()
        if past is None:  # what a resume changes is written down as any change is
            run_dir.write_json("config.json", config.model_dump(mode="json"))
        generators = [start_generator(config, inputs, index) for index in range(config.actors.count)]
        learner = start_learner(config, inputs, run_dir, place)
        stack.push_async_callback(learner.stop)
        reference = start_reference(config, inputs)
        if reference is not None:
            stack.push_async_callback(reference.stop)
            await reference.start()
        for generator in generators:
            stack.push_async_callback(generator.stop)
        controller = Controller(
            config=config,
            config_history=past,
            run_dir=run_dir,
            journal=journal,
            prompts=PromptOrder(inputs.prompts, seed=config.run.seed, shuffle=config.data.shuffle),
            generators=generators,
            learner=learner,
            reference=reference,
            rewards=await stack.enter_async_context(RewardWorkers(config.rewards)),
            progress=progress,
            resume_from=checkpoint,
        )
        if config.control.enabled:
            url = await stack.enter_async_context(serve(create_app(controller, token=token), config.control.host, config.control.port))
            controller.state.url = url
            progress.line(f"control plane at {url}, its API page at {url}/docs")
        memory = await stack.enter_async_context(PeakMemory(lambda: job_rss_bytes([*generators, learner, *([reference] if reference else [])])))
        interrupted = ctrl_c_stops(controller)

        async def outcome() -> None:
            facts = {"peak_rss_gib": memory.peak_gib, "total_seconds": time.monotonic() - began}
            await asyncio.to_thread(write_outcome, controller, run_dir, facts)  # beside the control plane, which still answers

        try:
            await controller.run()
        except BaseException:
            try:
                await outcome()
            except OSError as error:  # what ended the run is the news
                progress.line(f"warning: summary and report can't be written: {error}")
            raise
        await outcome()
    return INTERRUPTED if interrupted.is_set() else 0


def start_generator(config: Config, inputs: Inputs, index: int) -> RemoteGenerator:
    name = f"generator-{index}"
    actor = GeneratorActor.options(num_cpus=config.actors.cpus_each, num_gpus=config.actors.gpus_each)  # type: ignore[attr-defined]
    return RemoteGenerator(name, actor.remote(config, name=name, model_path=inputs.model_path))


def start_learner(config: Config, inputs: Inputs, run_dir: RunDir, place: PlacementGroup | None) -> RemoteLearner:
    """One actor per rank, each in its own bundle of the reserved place."""

    def start(rank: int) -> Any:
        actor = LearnerActor.options(  # type: ignore[attr-defined]
            num_cpus=config.learner.cpus,
            num_gpus=config.learner.gpus,
            scheduling_strategy=None if place is None else PlacementGroupSchedulingStrategy(placement_group=place, placement_group_bundle_index=rank),
        )
        return actor.remote(config, model_path=inputs.model_path, run_dir=run_dir.path.resolve(), prompts=inputs.prompts, task_name=inputs.task)

    return RemoteLearner([start(rank) for rank in range(config.learner.ranks)])


def start_reference(config: Config, inputs: Inputs) -> RemoteReference | None:
    learner = config.learner
    actor = ReferenceActor.options(num_cpus=learner.reference_cpus, num_gpus=learner.reference_gpus)  # type: ignore[attr-defined]
    actors = [actor.remote(config, model_path=inputs.model_path) for _ in range(learner.reference_actors)]
    return RemoteReference(actors) if actors else None


def ctrl_c_stops(controller: Controller) -> asyncio.Event:
    """The first Ctrl-C (or SIGTERM) asks for a clean stop, the second, or one while the run starts, ends it where it stands. Returns whether one came."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    run = asyncio.current_task()
    assert run is not None

    def stop() -> None:
        if interrupted.is_set():
            run.cancel("a second Ctrl-C")
        interrupted.set()
        if controller.state.phase is Phase.STARTING:
            run.cancel("Ctrl-C")  # nothing is there yet that a clean stop would save
        elif controller.state.phase is Phase.TRAINING:
            controller.request_stop("Ctrl-C")

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop)
    return interrupted


async def job_rss_bytes(remotes: Sequence[RemoteGenerator | RemoteLearner | RemoteReference]) -> int:
    """A Ray of our own lies below this process, a cluster's actors do not: those are asked."""
    own = await asyncio.to_thread(tree_rss_bytes)
    if not os.environ.get("RAY_ADDRESS"):
        return own
    facts = await asyncio.gather(*(remote.info() for remote in remotes))
    return own + sum(fact["rss_bytes"] for fact in facts)


def write_outcome(controller: Controller, run_dir: RunDir, facts: dict[str, Any]) -> None:
    summary = summarise(
        run_dir,
        controller.ledger.current.config,
        state=controller.state.phase.value,
        accounting=controller.buffer.accounting.as_dict(),
        facts=controller.facts | facts,
    )
    if controller.state.phase is Phase.FAILED:
        summary["failure"] = controller.state.last_error
    run_dir.write_json("summary.json", summary)
    write_report(run_dir.path)


def run_trials(specs: Sequence[TrialSpec], *, jobs: int) -> Iterator[TrialResult]:
    """Trials side by side in processes of their own, each result as it comes."""
    return spread(run_trial, specs, jobs=jobs)


def judge_family(task: Task) -> Found:
    """One model family against the naive loop, its adapter merged as a run's would be."""

    def export(run: Path, out: Path) -> None:
        export_whole(run, None, out, progress=SilentProgress())

    return judge_alone(task, export)


def family_trial() -> float:
    """Seconds that the learner's trial at load takes."""
    return trial_seconds()


def export_whole(run: Path, version: int | None, out: Path | None, *, progress: Progress) -> Exported:
    """A run's policy as a whole model, merged as its engines merged it."""
    return export_merged(run, version, out, progress=progress, merge=merged_weights, check=check_adapter)

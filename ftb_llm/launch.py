"""The composition root: checks everything, starts everything, and puts everything away again.

The only module that knows actors, learner, Ray, control plane and controller at once; nothing but the command line imports it.
"""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from actors.ray_actor import GeneratorActor
from ftb_llm.api.app import create_app
from ftb_llm.api.server import check_port, serve
from ftb_llm.config import Config
from ftb_llm.config.ledger import difference
from ftb_llm.controller import Controller
from ftb_llm.datasets import PromptOrder, load_prompts
from ftb_llm.errors import ConfigError, FixedSetting, InvalidConfig, SetupError
from ftb_llm.journal import Journal
from ftb_llm.machine import PeakMemory, core_count, tree_rss_bytes
from ftb_llm.ports import Progress
from ftb_llm.remote import RemoteGenerator, RemoteLearner, check_resources, running_ray
from ftb_llm.report import write_report
from ftb_llm.rewards import RewardSet, RewardWorkers
from ftb_llm.run_dir import RunDir
from ftb_llm.state import Phase
from ftb_llm.summary import summarise
from ftb_llm.types import Prompt
from learner.ray_actor import LearnerActor

_BUILTIN = "builtin:"
_MADE_OF = ("model.", "data.", "run.seed", "sampling.group_size", "objective.kind")
INTERRUPTED = 130


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What a run needs from outside, read and checked."""

    model_path: Path
    task: str | None  # the built-in task whose oracle applies
    prompts: list[Prompt]


def train(config: Config, *, resume: Path | None, progress: Progress) -> int:
    """Run to the end. Returns 0, or 130 after Ctrl-C; raises on failure, before anything starts if the fault is in the setup."""
    began = time.monotonic()
    token = check_setup(config)
    inputs = read_inputs(config, progress)
    run_dir = RunDir.open(resume) if resume else RunDir.create(Path(config.run.dir) / (config.run.name or default_name(config)))
    checkpoint = newest_checkpoint(run_dir) if resume else None
    journal = Journal(run_dir.path / "run.db")
    try:
        check_resumed_config(journal, config)
        run_dir.write_json("config.json", config.model_dump(mode="json"))
        with running_ray():
            check_resources(*wanted_resources(config))
            return asyncio.run(_run(config, inputs, run_dir, journal, checkpoint, token, progress, began))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None  # a second Ctrl-C
    finally:
        journal.close()


def check_setup(config: Config) -> str | None:
    """Everything that can be known to be wrong before anything is started. Returns the control plane's bearer token."""
    RewardSet(config.rewards.functions)
    if config.control.enabled:
        check_port(config.control.host, config.control.port)
    if not os.environ.get("RAY_ADDRESS"):
        cpus, _ = wanted_resources(config)
        if cpus > core_count():
            raise SetupError(
                f"actors.cpus_each: {config.actors.count} x {config.actors.cpus_each:g} plus learner.cpus {config.learner.cpus:g} "
                f"are {cpus:g} cores, but this machine has {core_count()}; lower actors.count, actors.cpus_each or learner.cpus"
            )
    if config.control.token_env is None:
        return None
    token = os.environ.get(config.control.token_env)
    if not token:
        raise SetupError(f"control.token_env: the environment variable {config.control.token_env} is not set; it must hold the bearer token")
    return token


def check_resumed_config(journal: Journal, config: Config) -> None:
    """A resumed run may move to other resources or schedules, but what its checkpoint and its queue are made of stays."""
    for version in journal.configs()[-1:]:
        changed = [key for key in difference(version.config, config) if key.startswith(_MADE_OF)]
        if changed:
            raise FixedSetting(changed)


def wanted_resources(config: Config) -> tuple[float, float]:
    """CPUs and GPUs of all actors together."""
    actors, learner = config.actors, config.learner
    return actors.count * actors.cpus_each + learner.cpus, actors.count * actors.gpus_each + learner.gpus


def read_inputs(config: Config, progress: Progress) -> Inputs:
    """The model folder (built-in ones are built on first use) and the tokenized prompts."""
    from transformers import AutoTokenizer

    from ftb_llm.tasks.base_model import ensure_built

    task = config.data.path.removeprefix(_BUILTIN) if config.data.path.startswith(_BUILTIN) else None
    builtin_model = config.model.path.startswith(_BUILTIN)
    model_path = str(ensure_built(builtin_name("model.path", config.model.path))) if builtin_model else config.model.path
    data_path = str(ensure_built(builtin_name("data.path", config.data.path)) / "prompts.jsonl") if task else config.data.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        message = f"{config.model.path} can't be loaded: {' '.join(str(error).split())}"
        raise InvalidConfig([ConfigError("model.path", message)]) from None
    return Inputs(model_path=Path(model_path), task=task, prompts=load_prompts(config, data_path, tokenizer))


def builtin_name(key: str, value: str) -> str:
    from ftb_llm.tasks import TASKS

    name = value.removeprefix(_BUILTIN)
    if name not in TASKS:
        raise InvalidConfig([ConfigError(key, f"{value} is no built-in; it must be one of {', '.join(_BUILTIN + task for task in TASKS)}")])
    return name


def default_name(config: Config) -> str:
    stem = Path(config.data.path.removeprefix(_BUILTIN)).stem or "run"
    return f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"


def newest_checkpoint(run_dir: RunDir) -> Path:
    checkpoint = run_dir.newest_checkpoint()
    if checkpoint is None:
        raise SetupError(f"--resume: {run_dir.path} has no checkpoint to go on from")
    return checkpoint


async def _run(
    config: Config, inputs: Inputs, run_dir: RunDir, journal: Journal, checkpoint: Path | None, token: str | None, progress: Progress, began: float
) -> int:
    """Compose the run, run it, and write its summary and report whatever its end."""
    async with AsyncExitStack() as stack:
        generators = [start_generator(config, inputs, index) for index in range(config.actors.count)]
        learner = start_learner(config, inputs, run_dir)
        stack.push_async_callback(learner.stop)
        for generator in generators:
            stack.push_async_callback(generator.stop)
        controller = Controller(
            config=config,
            config_history=journal.configs(),
            run_dir=run_dir,
            journal=journal,
            prompts=PromptOrder(inputs.prompts, seed=config.run.seed, shuffle=config.data.shuffle),
            generators=generators,
            learner=learner,
            rewards=await stack.enter_async_context(RewardWorkers(config.rewards)),
            progress=progress,
            resume_from=checkpoint,
        )
        if config.control.enabled:
            url = await stack.enter_async_context(serve(create_app(controller, token=token), config.control.host, config.control.port))
            controller.state.url = url
            progress.line(f"control plane at {url}, its API page at {url}/docs")
        memory = await stack.enter_async_context(PeakMemory(lambda: job_rss_bytes([*generators, learner])))
        interrupted = ctrl_c_stops(controller)
        try:
            await controller.run()
        finally:
            write_outcome(controller, run_dir, {"peak_rss_gib": memory.peak_gib, "total_seconds": time.monotonic() - began})
    return INTERRUPTED if interrupted.is_set() else 0


def start_generator(config: Config, inputs: Inputs, index: int) -> RemoteGenerator:
    name = f"generator-{index}"
    actor = GeneratorActor.options(num_cpus=config.actors.cpus_each, num_gpus=config.actors.gpus_each)  # type: ignore[attr-defined]
    return RemoteGenerator(name, actor.remote(config, name=name, model_path=inputs.model_path))


def start_learner(config: Config, inputs: Inputs, run_dir: RunDir) -> RemoteLearner:
    actor = LearnerActor.options(num_cpus=config.learner.cpus, num_gpus=config.learner.gpus)  # type: ignore[attr-defined]
    return RemoteLearner(actor.remote(config, model_path=inputs.model_path, run_dir=run_dir.path.resolve(), prompts=inputs.prompts, task_name=inputs.task))


def ctrl_c_stops(controller: Controller) -> asyncio.Event:
    """The first Ctrl-C (or SIGTERM) asks for a clean stop, the second ends the run where it stands. Returns whether one came."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    run = asyncio.current_task()
    assert run is not None

    def stop() -> None:
        if interrupted.is_set():
            run.cancel("a second Ctrl-C")
        interrupted.set()
        if controller.state.phase in (Phase.STARTING, Phase.TRAINING):
            controller.request_stop("Ctrl-C")

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop)
    return interrupted


async def job_rss_bytes(remotes: Sequence[RemoteGenerator | RemoteLearner]) -> int:
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
    run_dir.write_json("summary.json", summary)
    write_report(run_dir.path)

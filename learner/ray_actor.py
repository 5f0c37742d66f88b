"""One rank of the learner as a Ray actor: the plain class, and how it finds the other ranks. Beside it the reference alone."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from ftb_llm.config import Config
from ftb_llm.machine import tree_rss_bytes
from ftb_llm.types import AdapterRef, EvalReport, Group, Prompt, StepReport, StepRequest
from learner.learner import Learner, thread_count
from learner.ranks import join_store, open_store
from learner.reference import Reference


@ray.remote
class LearnerActor:
    """Loads on the first call, so that what goes wrong reaches the caller as itself and not as a dead actor."""

    _loaded: Learner | None = None

    def __init__(self, config: Config, *, model_path: Path, run_dir: Path, prompts: Sequence[Prompt], task_name: str | None) -> None:
        self._config = config
        self._inputs: dict[str, Any] = {"model_path": model_path, "run_dir": run_dir, "prompts": prompts, "task_name": task_name}

    @property
    def _learner(self) -> Learner:
        if self._loaded is None:
            self._loaded = Learner(self._config, **self._inputs)
        return self._loaded

    def rendezvous(self) -> str:
        """Asked of rank 0: where the others will find it."""
        address, self._store = open_store(ray.util.get_node_ip_address())
        return address

    def join(self, rank: int, address: str) -> None:
        """Be that rank of the group that meets at `address`; called before anything else, where there are several."""
        join_store(rank=rank, count=self._config.learner.ranks, address=address, threads=thread_count(self._config))

    def step(self, request: StepRequest) -> StepReport | None:
        return self._learner.step(request)

    def publish(self, version: int) -> tuple[AdapterRef, bytes] | tuple[None, None]:
        """Call it with `num_returns=2`: the bytes then stay in the object store."""
        return self._learner.publish(version)

    def evaluate(self, step: int, beta: float) -> EvalReport | None:
        return self._learner.evaluate(step, beta)

    def logprobs(self, groups: Sequence[Group]) -> list[list[float]] | None:
        return self._learner.logprobs(groups)

    def save_checkpoint(self, step: int) -> str | None:
        return self._learner.save_checkpoint(step)

    def load_checkpoint(self, path: str) -> int:
        return self._learner.load_checkpoint(path)

    def info(self) -> dict[str, Any]:
        return self._learner.info()


@ray.remote
class ReferenceActor:
    """Loads on the first call, like the learner."""

    _loaded: Reference | None = None

    def __init__(self, config: Config, *, model_path: Path) -> None:
        self._config = config
        self._model_path = model_path

    @property
    def _reference(self) -> Reference:
        if self._loaded is None:
            self._loaded = Reference(self._config, self._model_path)
        return self._loaded

    def score(self, group: Group) -> tuple[tuple[float, ...], ...]:
        return self._reference.score(group)

    def info(self) -> dict[str, Any]:
        """Facts about the process; the answer says that the model is there."""
        return {"pid": os.getpid(), "rss_bytes": tree_rss_bytes(), "packed": self._reference.packed}

"""The learner: consumes groups, takes f-TB steps, publishes adapters.

A plain class, one per rank. Its methods are called one at a time, in the same order on every rank, since with several ranks
a forward pass may need the others. Every rank computes everything; rank 0 writes and answers, the others return None.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ftb_llm.config import Config
from ftb_llm.errors import WrongState
from ftb_llm.machine import tree_rss_bytes
from ftb_llm.types import AdapterRef, EvalReport, Group, Prompt, StepReport, StepRequest
from learner import adapters, checkpoint
from learner.evaluate import Evaluator
from learner.model import AdaptedModel
from learner.step import policy_logprobs, take_step


class Learner:
    """Everything that depends on the weights."""

    def __init__(self, config: Config, *, model_path: Path, run_dir: Path, prompts: Sequence[Prompt], task_name: str | None) -> None:
        self._config = config
        self._model_path = model_path
        self._task_name = task_name
        self._adapters = run_dir / "adapters"
        self._checkpoints = run_dir / "checkpoints"
        self._model = AdaptedModel(config, model_path)
        assert self._model.ranks.count == config.learner.ranks, f"{self._model.ranks.count} ranks met, but learner.ranks is {config.learner.ranks}"
        torch.set_num_threads(thread_count(config))  # last: accelerate has a mind of its own
        self._canary = adapters.Canary(self._model, prompts[0].token_ids, config.actors.max_model_len)
        self._step = 0

    @property
    def _answers(self) -> bool:
        return self._model.ranks.rank == 0

    def step(self, request: StepRequest) -> StepReport | None:
        """Take one optimizer step, the one after the last. The request holds all that may change in a live run, so all ranks change at once."""
        if request.step != self._step + 1:
            raise WrongState(f"step {request.step} was asked for, but the last one taken is {self._step}")
        report = take_step(self._model, request, micro_batch_tokens=self._config.learner.micro_batch_tokens)
        self._step = request.step
        report = replace(report, metrics=report.metrics | self._model.ranks.take_metrics())
        return report if self._answers else None

    def publish(self, version: int) -> tuple[AdapterRef, bytes] | tuple[None, None]:
        """Write the adapter as it is now under `version`; returns its reference and its bytes."""
        if version != self._step:
            raise WrongState(f"version {version} can't be published after step {self._step}: a version is the step it was taken after")
        canary = self._canary.value(self._model)
        if not self._answers:
            return None, None
        published = adapters.publish(self._model, version=version, parent=self._adapters, canary=canary, config=self._config)
        adapters.prune(self._adapters, newest=version, keep=self._config.checkpoint.keep)
        return published

    def evaluate(self, step: int, beta: float) -> EvalReport | None:
        """Ask the exact oracle; None where the task has none."""
        report = None if self._evaluator is None else self._evaluator.report(step, beta)
        return report if self._answers else None

    def logprobs(self, groups: Sequence[Group]) -> list[list[float]] | None:
        """Summed log-probs of the completions under the present adapter."""
        values = policy_logprobs(self._model, groups, micro_batch_tokens=self._config.learner.micro_batch_tokens)
        return values if self._answers else None

    def save_checkpoint(self, step: int) -> str | None:
        """Write everything that the next step depends on; returns the folder."""
        if step != self._step:
            raise WrongState(f"a checkpoint of step {step} was asked for, but the last one taken is {self._step}")
        if not self._answers:
            return None
        return str(checkpoint.save(self._model, step=step, parent=self._checkpoints, keep=self._config.checkpoint.keep))

    def load_checkpoint(self, path: str) -> int:
        """Go back to a checkpoint; returns its step."""
        self._step = checkpoint.load(self._model, Path(path))
        return self._step

    def info(self) -> dict[str, Any]:
        """Facts about the process and the model."""
        return {
            "pid": os.getpid(),
            "rss_bytes": tree_rss_bytes(),
            "device": str(self._model.device),
            "rank": self._model.ranks.rank,
            "packed": self._model.scorer.packed,
            "trial_seconds": self._model.scorer.trial_seconds,
            "threads": torch.get_num_threads(),
            "step": self._step,
            "scale": self._model.scale,
            **self._model.parameter_counts(),
        }

    @cached_property
    def _evaluator(self) -> Evaluator | None:
        if self._task_name is None:
            return None
        return Evaluator(self._model, AutoTokenizer.from_pretrained(self._model_path), self._task_name)


def thread_count(config: Config) -> int:
    """Threads of one rank: the cores that it reserves."""
    return int(config.learner.cpus) or 1

"""The learner: consumes groups, takes f-TB steps, publishes adapters.

A plain class, one process. Its methods are called one at a time; it waits for nothing and knows no one.
"""

import os
from collections.abc import Sequence
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
        torch.set_num_threads(int(config.learner.cpus) or 1)
        self._config = config
        self._model_path = model_path
        self._task_name = task_name
        self._adapters = run_dir / "adapters"
        self._checkpoints = run_dir / "checkpoints"
        self._model = AdaptedModel(config, model_path)
        self._canary = adapters.Canary(self._model, prompts[0].token_ids, config.actors.max_model_len)
        self._step = 0

    def step(self, request: StepRequest) -> StepReport:
        """Take one optimizer step, the one after the last."""
        if request.step != self._step + 1:
            raise WrongState(f"step {request.step} was asked for, but the last one taken is {self._step}")
        report = take_step(self._model, request, micro_batch_tokens=self._config.learner.micro_batch_tokens)
        self._step = request.step
        return report

    def publish(self, version: int) -> tuple[AdapterRef, bytes]:
        """Write the adapter as it is now under `version`; returns its reference and its bytes."""
        if version != self._step:
            raise WrongState(f"version {version} can't be published after step {self._step}: a version is the step it was taken after")
        canary = self._canary.value(self._model)
        published = adapters.publish(self._model, version=version, parent=self._adapters, canary=canary, config=self._config)
        adapters.prune(self._adapters, newest=version, keep=self._config.checkpoint.keep)
        return published

    def evaluate(self, step: int, beta: float) -> EvalReport | None:
        """Ask the exact oracle; None where the task has none."""
        return None if self._evaluator is None else self._evaluator.report(step, beta)

    def logprobs(self, groups: Sequence[Group]) -> list[list[float]]:
        """Summed log-probs of the completions under the present adapter."""
        return policy_logprobs(self._model, groups, micro_batch_tokens=self._config.learner.micro_batch_tokens)

    def save_checkpoint(self, step: int) -> str:
        """Write everything that the next step depends on; returns the folder."""
        if step != self._step:
            raise WrongState(f"a checkpoint of step {step} was asked for, but the last one taken is {self._step}")
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

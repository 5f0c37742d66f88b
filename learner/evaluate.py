"""The exact evaluation: log-probs of every completion that a task can enumerate, judged by its oracle."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ftb_llm.tasks import get_task
from ftb_llm.tasks.oracle import Array, Oracle
from ftb_llm.types import EvalReport
from learner.model import AdaptedModel
from learner.packing import pack

_ROWS = 2048  # completions per forward pass


class Evaluator:
    """Scores policy and reference on every completion of every prompt of one task."""

    def __init__(self, model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, task_name: str) -> None:
        self._model = model
        self._oracle = Oracle(get_task(task_name))
        task = self._oracle.task
        end = tokenizer.eos_token_id
        self._prompts = {prompt: tokenizer.encode(prompt) for prompt in task.prompts()}
        self._completions = {
            prompt: [[*tokenizer.encode(text, add_special_tokens=False), end] for text in task.completions(prompt)] for prompt in task.prompts()
        }
        with model.as_reference():
            self._reference = self._logprobs()

    def report(self, step: int, beta: float) -> EvalReport:
        return self._oracle.report(step=step, beta=beta, reference=self._reference, policy=self._logprobs())

    def _logprobs(self) -> dict[str, Array]:
        return {prompt: self._of(ids, self._completions[prompt]) for prompt, ids in self._prompts.items()}

    def _of(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Array:
        values: list[float] = []
        with torch.no_grad():
            for start in range(0, len(completions), _ROWS):
                batch = pack([prompt], [completions[start : start + _ROWS]], self._model.device)
                values += self._model.scorer.completion_logprobs(batch).flatten().tolist()
        return np.array(values)

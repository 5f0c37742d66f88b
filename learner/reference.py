"""The reference model alone, for actors that score each group once when it is generated (`learner.reference_actors`)."""

from pathlib import Path

import torch

from ftb_llm.config import Config
from ftb_llm.types import Group
from learner.batching import parts_of
from learner.logprobs import Scorer
from learner.model import load_base
from learner.packing import pack


class Reference:
    """Base model without an adapter. A plain class, one process."""

    def __init__(self, config: Config, model_path: Path) -> None:
        torch.set_num_threads(int(config.learner.reference_cpus) or 1)
        self._budget = config.learner.micro_batch_tokens
        self._device = torch.device("cuda" if config.learner.reference_gpus else "cpu")
        model = load_base(config, model_path).to(self._device).eval().requires_grad_(False)  # so that the head is the learner's frozen one
        self._scorer = Scorer(model, longest=config.actors.max_model_len, float32_head=config.learner.float32_head)

    @property
    def packed(self) -> bool:
        return self._scorer.packed

    @torch.no_grad()
    def score(self, group: Group) -> tuple[tuple[float, ...], ...]:
        """Log-prob of each token of each completion."""
        rows: list[tuple[float, ...]] = []
        for part in parts_of([group], budget=self._budget):
            completions = [completion.token_ids for completion in group.completions[part.start : part.stop]]
            logp_KT = self._scorer.token_logprobs(pack([group.prompt.token_ids], [completions], self._device))[0]
            rows += [tuple(row[: len(ids)]) for row, ids in zip(logp_KT.tolist(), completions, strict=True)]
        return tuple(rows)

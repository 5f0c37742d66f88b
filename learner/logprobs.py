"""Log-probs of completions, per token and summed, the end token included. Shapes as in `learner.packing`."""

import logging
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.agreement import take_packed
from learner.packing import Batch
from learner.ways import packed_way, plain_way

log = logging.getLogger(__name__)


class Scorer:
    """Scores packed batches under a model, adapted or not.

    The fast way runs the model's body over the packed row and the head in chunks. It stands on transformers' conventions:
    attention that comes from its interface, logits that are the head of the last hidden state. A model that departs from them
    is found out by the trial of `learner.agreement`, and goes through its own forward instead, row by row with full logits.
    """

    def __init__(self, model: PreTrainedModel, *, longest: int, float32_head: bool = False, recompute: bool = False) -> None:
        self._model = model
        self._float32_head = float32_head
        began = time.monotonic()
        self.packed = take_packed(model, longest=longest, float32_head=float32_head)
        self.trial_seconds = time.monotonic() - began
        log.info("trial of the packed way: %s after %.2f s", "yes" if self.packed else "no", self.trial_seconds)
        if recompute:
            _recompute_layers(model)

    def completion_logprobs(self, batch: Batch) -> Tensor:
        """Summed log-prob of each completion given its prompt, `logp_GK` in float32."""
        return self.token_logprobs(batch).sum(-1)

    def token_logprobs(self, batch: Batch) -> Tensor:
        """Log-prob of each token of each completion, `logp_GKT` in float32, zero beyond a completion's end."""
        if self.packed:
            return batch.spread(packed_way(self._model, batch, float32_head=self._float32_head))
        return batch.spread(plain_way(self._model, batch))

    def computed_places(self, batch: Batch) -> int:
        """How many places a pass over the batch computes: its tokens, and what is padded or repeated."""
        if self.packed:
            return len(batch.ids_N) + batch.padding
        return batch.count * max(len(batch.prompts[index // batch.group_size]) + len(own) for index, own in enumerate(batch.own))


def _recompute_layers(model: nn.Module) -> None:
    """Activation checkpointing: backward computes each decoder layer again instead of keeping what it made."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)

"""Log-probs of completions, per token and summed, the end token included. Shapes as in `learner.packing`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.attention import NAME
from learner.head import chosen_logprobs
from learner.packing import Batch, pack

_AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # largest difference per token between two orders of summing


class Scorer:
    """Scores packed batches under a model, adapted or not.

    The fast way runs the model's body over the packed row and the head in chunks. It stands on transformers' conventions:
    attention that comes from its interface, logits that are the head of the last hidden state. A model that departs from them
    is found out by a trial on a few tokens, and goes through its own forward instead, row by row with full logits.
    """

    def __init__(self, model: PreTrainedModel, *, longest: int, float32_head: bool = False, recompute: bool = False) -> None:
        self._model = model
        self._float32_head = float32_head
        self.packed = _takes_packed(model, longest)
        if self.packed:
            model.set_attn_implementation(NAME)
            self.packed = self._agrees()
        if recompute:
            _recompute_layers(model)

    def completion_logprobs(self, batch: Batch) -> Tensor:
        """Summed log-prob of each completion given its prompt, `logp_GK` in float32."""
        return self.token_logprobs(batch).sum(-1)

    def token_logprobs(self, batch: Batch) -> Tensor:
        """Log-prob of each token of each completion, `logp_GKT` in float32, zero beyond a completion's end."""
        return batch.spread(self._packed(batch) if self.packed else self._plain(batch))

    def computed_places(self, batch: Batch) -> int:
        """How many places a pass over the batch computes: its tokens, and what is padded or repeated."""
        if self.packed:
            return len(batch.ids_N) + batch.padding
        return batch.count * max(len(batch.prompts[index // batch.group_size]) + len(own) for index, own in enumerate(batch.own))

    def _packed(self, batch: Batch) -> Tensor:
        hidden_ND = self._model.get_decoder()(
            input_ids=batch.ids_N.unsqueeze(0),
            position_ids=batch.positions_N.unsqueeze(0),
            attention_mask=batch.ids_N.new_zeros(1, 1, 1, 1),  # of four dimensions, so transformers passes it on and makes none of its own
            use_cache=False,
            packed=batch,
        ).last_hidden_state[0]
        return chosen_logprobs(self._model.get_output_embeddings(), hidden_ND[batch.place_S], batch.source_M, batch.target_M, float32=self._float32_head)

    def _plain(self, batch: Batch) -> Tensor:
        """Prompt and completion as one padded row each, as anyone would do it."""
        rows: list[Tensor] = []
        places: list[tuple[int, int]] = []
        for index, own in enumerate(batch.own):
            prompt = batch.prompts[index // batch.group_size]
            row = torch.tensor([*prompt, *own], device=batch.ids_N.device)
            places += [(index, place) for place in range(len(prompt) - 1, len(row))]
            rows.append(batch.ids_N[row])
        mask_BL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits_BLV = self._model(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask_BL, use_cache=False).logits
        row_M, place_M = torch.tensor(places, device=mask_BL.device).unbind(-1)
        return logits_BLV[row_M, place_M].float().log_softmax(-1).gather(-1, batch.target_M.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Try it: prompts and completions of different lengths, both ways."""
        weight = self._model.get_input_embeddings().weight
        ids = [(7 * index + 3) % weight.shape[0] for index in range(12)]
        batch = pack([ids[:5], ids[2:5]], [[ids[5:9], ids[8:9]], [ids[3:6], ids[4:11]]], weight.device)
        difference = (self._packed(batch) - self._plain(batch)).abs().max().item()
        return difference <= _AGREE.get(weight.dtype, 1e-3)


def _takes_packed(model: PreTrainedModel, longest: int) -> bool:
    """Does the model's attention come from transformers' interface, and does it see all of a sequence of `longest` tokens?"""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers or not hasattr(config, "layer_types") else None
    return (
        getattr(model, "_supports_attention_backend", False)
        and set(layers) <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
    )


def _recompute_layers(model: nn.Module) -> None:
    """Activation checkpointing: backward computes each decoder layer again instead of keeping what it made."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)

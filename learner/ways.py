"""The two ways to the log-probs of a packed batch's tokens. Shapes as in `learner.packing`."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from learner.head import chosen_logprobs
from learner.packing import Batch


def packed_way(model: PreTrainedModel, batch: Batch, *, float32_head: bool = False) -> Tensor:
    """The model's body over the packed row and the head in chunks, `logp_M`; its attention has to be the packed one."""
    hidden_ND = model.get_decoder()(
        input_ids=batch.ids_N.unsqueeze(0),
        position_ids=batch.positions_N.unsqueeze(0),
        attention_mask=batch.ids_N.new_zeros(1, 1, 1, 1),  # of four dimensions, so transformers passes it on and makes none
        use_cache=False,
        packed=batch,
    ).last_hidden_state[0]
    head, places_SD = model.get_output_embeddings(), hidden_ND[batch.place_S]
    return chosen_logprobs(head, places_SD, batch.source_M, batch.target_M, float32=float32_head)


def plain_way(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Prompt and completion as one padded row each through the model's own forward, as anyone would do it, `logp_M`."""
    rows: list[Tensor] = []
    places: list[tuple[int, int]] = []
    for index, own in enumerate(batch.own):
        prompt = batch.prompts[index // batch.group_size]
        row = torch.tensor([*prompt, *own], device=batch.ids_N.device)
        places += [(index, place) for place in range(len(prompt) - 1, len(row))]
        rows.append(batch.ids_N[row])
    mask_BL = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids_BL = pad_sequence(rows, batch_first=True)
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
    row_M, place_M = torch.tensor(places, device=mask_BL.device).unbind(-1)
    logp_MV = logits_BLV[row_M, place_M].float().log_softmax(-1)
    return logp_MV.gather(-1, batch.target_M.unsqueeze(-1)).squeeze(-1)

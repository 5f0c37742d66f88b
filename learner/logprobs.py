"""Log-probs of completions, per token and summed, the end token included.

Every prompt runs once, however many completions it has: they continue on its key-value cache, through which gradients flow.
Prompts are padded on the left, completions on the right, so the last prompt position and the first completion position
are the same for all rows. Shapes: `G` prompts, `K` completions each, `B = G K`, `P` prompt and `T` completion tokens, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Ids = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts with the same number of completions each, row `g * K + k` of the completions being the k-th of prompt g."""

    prompt_ids_GP: Tensor
    prompt_mask_GP: Tensor
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor

    @property
    def group_size(self) -> int:
        return len(self.completion_ids_BT) // len(self.prompt_ids_GP)

    @property
    def token_mask_GKT(self) -> Tensor:
        return self.completion_mask_BT.bool().view(-1, self.group_size, self.completion_mask_BT.shape[1])


def pack(prompts: Sequence[Ids], completions: Sequence[Sequence[Ids]], device: torch.device | str = "cpu") -> Batch:
    """Pad prompts and their completions into one batch."""
    sizes = {len(group) for group in completions}
    if len(sizes) != 1 or len(prompts) != len(completions):
        raise ValueError(f"every prompt needs the same number of completions, got {[len(group) for group in completions]} for {len(prompts)} prompts")
    rows = [row for group in completions for row in group]
    if not all(prompts) or not all(rows):
        raise ValueError("a prompt or completion without tokens has no log-prob")
    prompt_ids, prompt_mask = _padded(prompts, left=True)
    completion_ids, completion_mask = _padded(rows, left=False)
    return Batch(
        prompt_ids_GP=prompt_ids.to(device),
        prompt_mask_GP=prompt_mask.to(device),
        completion_ids_BT=completion_ids.to(device),
        completion_mask_BT=completion_mask.to(device),
    )


def completion_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Summed log-prob of each completion given its prompt, `logp_GK` in float32."""
    return token_logprobs(model, batch).sum(-1)


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-prob of each token of each completion, `logp_GKT` in float32, zero beyond a completion's end."""
    lengths_G = batch.prompt_mask_GP.sum(-1)
    out = model(
        input_ids=batch.prompt_ids_GP,
        attention_mask=batch.prompt_mask_GP,
        position_ids=(batch.prompt_mask_GP.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    first_GK = batch.completion_ids_BT[:, 0].view(-1, batch.group_size)
    first_GK1 = torch.log_softmax(out.logits[:, -1].float(), -1).gather(-1, first_GK).unsqueeze(-1)
    width = batch.completion_ids_BT.shape[1]
    if width == 1:
        return first_GK1
    cache = out.past_key_values
    cache.batch_repeat_interleave(batch.group_size)
    mask_BT = torch.cat([batch.prompt_mask_GP.repeat_interleave(batch.group_size, 0), batch.completion_mask_BT[:, :-1]], -1)
    start_B = lengths_G.repeat_interleave(batch.group_size)
    logits_BTV = model(
        input_ids=batch.completion_ids_BT[:, :-1],
        attention_mask=mask_BT,
        position_ids=start_B.unsqueeze(-1) + torch.arange(width - 1, device=start_B.device),
        past_key_values=cache,
        use_cache=True,
    ).logits.float()
    logp_BT = logits_BTV.log_softmax(-1).gather(-1, batch.completion_ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1) * batch.completion_mask_BT[:, 1:]
    return torch.cat([first_GK1, logp_BT.view(*first_GK.shape, -1)], -1)


def _padded(rows: Sequence[Ids], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask. The padding id is 0: it is never attended to, and its own output is never used."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.as_tensor(row)
        mask[index, place] = 1
    return ids, mask

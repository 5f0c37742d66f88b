"""A sampler inside the learner's own process: whole groups from the present weights, for experiments that want no engine.

Prompts run once, their completions go on together on the repeated key-value cache, one token at a time. Shapes: `G` prompts,
`K` completions each, `B = G K`, `P` prompt and `T` completion tokens, `V` vocabulary.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ftb_llm.errors import FtbError
from ftb_llm.types import Completion, FinishReason, Group, GroupRequest, SamplingSpec
from learner.model import AdaptedModel

NAME = "local"  # what stands as the generator of its groups


class Sampler:
    """Completes groups as the engine would, with random numbers of its own."""

    def __init__(self, model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self._texts: dict[tuple[int, ...], str] = {}  # a small task samples the same completions again and again

    def sample(self, requests: Sequence[GroupRequest], *, version: int) -> list[Group]:
        """One group per request, all with the same sampling; `version` names the weights as they are now."""
        began = time.monotonic()
        spec = requests[0].sampling
        assert all(request.sampling == spec for request in requests)
        end = self._tokenizer.eos_token_id
        ids_BT, logp_BT = sample_tokens(self._model.module, [request.prompt.token_ids for request in requests], spec, end=end, generator=self._generator)
        completions = [self._completion(ids, logps, spec, end, version) for ids, logps in zip(ids_BT.tolist(), logp_BT.tolist(), strict=True)]
        seconds = time.monotonic() - began
        return [
            Group(
                id=request.group_id,
                prompt=request.prompt,
                completions=tuple(completions[place * spec.group_size : (place + 1) * spec.group_size]),
                generator=NAME,
                generate_seconds=seconds,
            )
            for place, request in enumerate(requests)
        ]

    def _completion(self, ids: list[int], logps: list[float], spec: SamplingSpec, end: int, version: int) -> Completion:
        stopped = end in ids
        length = ids.index(end) + 1 if stopped else len(ids)
        token_ids = tuple(ids[:length])
        return Completion(
            token_ids=token_ids,
            text=self._text(token_ids),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            logprob=sum(logps[:length]),
            min_version=version,
            max_version=version,
            token_logprobs=tuple(logps[:length]) if spec.token_logprobs else None,
        )

    def _text(self, token_ids: tuple[int, ...]) -> str:
        if token_ids not in self._texts:
            self._texts[token_ids] = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return self._texts[token_ids]


@torch.no_grad()
def sample_tokens(module: nn.Module, prompts: Sequence[Sequence[int]], spec: SamplingSpec, *, end: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and the model's own log-probs of them, `ids_BT` and `logp_BT`; what follows a row's end token means nothing."""
    device = generator.device
    rows = [torch.as_tensor(prompt, device=device) for prompt in prompts]
    prompt_ids_GP = pad_sequence(rows, batch_first=True, padding_side="left")
    prompt_mask_GP = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    out = module(
        input_ids=prompt_ids_GP,
        attention_mask=prompt_mask_GP,
        position_ids=(prompt_mask_GP.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    size = spec.group_size
    cache = out.past_key_values
    cache.batch_repeat_interleave(size)
    mask_BT = prompt_mask_GP.repeat_interleave(size, 0)
    position_B1 = mask_BT.sum(-1, keepdim=True)
    logits_BV = out.logits[:, -1].repeat_interleave(size, 0)
    ids: list[Tensor] = []
    logps: list[Tensor] = []
    running_B1 = torch.ones_like(position_B1, dtype=torch.bool)
    while True:
        logp_BV = logits_BV.float().log_softmax(-1)
        token_B1 = _draw(logp_BV, spec, generator)
        ids.append(token_B1)
        logps.append(logp_BV.gather(-1, token_B1))
        running_B1 = running_B1 & (token_B1 != end)
        if len(ids) == spec.max_tokens or not bool(running_B1.any()):
            return torch.cat(ids, -1), torch.cat(logps, -1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(position_B1)], -1)
        logits_BV = module(input_ids=token_B1, attention_mask=mask_BT, position_ids=position_B1 + len(ids) - 1, past_key_values=cache, use_cache=True).logits[
            :, -1
        ]


def _draw(logp_BV: Tensor, spec: SamplingSpec, generator: torch.Generator) -> Tensor:
    """One token per row, at the temperature and from the nucleus that the spec names."""
    if not bool(logp_BV.isfinite().all()):
        raise FtbError("the model's logits are not finite")
    p_BV = (logp_BV / spec.temperature).softmax(-1)
    if spec.top_p < 1:
        sorted_BV, order_BV = p_BV.sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= spec.top_p
        p_BV = p_BV.scatter(-1, order_BV, sorted_BV.masked_fill(beyond_BV, 0.0))
    return torch.multinomial(p_BV, 1, generator=generator)

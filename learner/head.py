"""Log-probs of chosen tokens without the logits: the head is applied to a few places at a time.

For a frozen head the gradient with respect to a hidden state, `W[token] - softmax(W h) W`, does not depend on what the
loss makes of the log-prob. So its dear half is computed while the logits are there, and nothing is computed twice.
Shapes: `S` places, `M` tokens, each predicted at one of the places, `V` vocabulary, `D` width, `C` places of one chunk.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20  # of float32 logits at a time


def chosen_logprobs(head: nn.Module, hidden_SD: Tensor, source_M: Tensor, target_M: Tensor, *, float32: bool = False, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Log-prob in float32 of each token `target_M` under the logits at the place `source_M`.

    `source_M` need not be sorted, and a place may predict several tokens. `float32` also multiplies in float32 where the
    weights are of lower precision; their products are summed in float32 in any case.
    """
    if type(head) is nn.Linear and not head.weight.requires_grad:
        return _FrozenHead.apply(hidden_SD, head.weight, head.bias, source_M, target_M, float32, chunk_bytes)
    pieces = [part.shape[0] for part in hidden_SD.split(rows_per_chunk(vocabulary_of(head), chunk_bytes))]
    picked, order = [], []
    for start, rows in zip(_starts(pieces), pieces, strict=True):
        own_M = ((source_M >= start) & (source_M < start + rows)).nonzero().squeeze(-1)
        order.append(own_M)
        chunk = hidden_SD[start : start + rows]
        picked.append(checkpoint(_adapted, head, chunk, source_M[own_M] - start, target_M[own_M], use_reentrant=False))
    return torch.cat(picked)[torch.cat(order).argsort()]


def rows_per_chunk(vocabulary: int, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (4 * vocabulary))


def vocabulary_of(head: nn.Module) -> int:
    plain: Any = getattr(head, "base_layer", head)
    return int(plain.weight.shape[0])


def _adapted(head: nn.Module, hidden_CD: Tensor, source_M: Tensor, target_M: Tensor) -> Tensor:
    """A head that is trained itself: autograd does it, chunk by chunk, with the logits computed again backward."""
    logp_CV = head(hidden_CD).float().log_softmax(-1)
    return logp_CV[source_M, target_M]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor, target: Tensor, float32: bool, chunk_bytes: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        if float32:
            weight = weight.float()
        hidden = hidden.to(weight.dtype)
        rows = min(len(hidden), rows_per_chunk(len(weight), chunk_bytes))
        buffer_CV = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        chosen_M = hidden.new_empty(len(source), dtype=torch.float32)
        mean_SD = torch.empty_like(hidden) if wanted else None  # softmax W: the mean row of the head
        for start in range(0, len(hidden), rows):
            chunk_CD = hidden[start : start + rows]
            logits_CV = _logits(chunk_CD, weight, bias, buffer_CV[: len(chunk_CD)])
            own_M = ((source >= start) & (source < start + rows)).nonzero().squeeze(-1)
            place_M = source[own_M] - start
            scores_M = logits_CV[place_M, target[own_M]]
            top_C1 = logits_CV.amax(-1, keepdim=True)
            logits_CV.sub_(top_C1).exp_()
            total_C1 = logits_CV.sum(-1, keepdim=True)
            chosen_M[own_M] = scores_M - (top_C1 + total_C1.log()).squeeze(-1)[place_M]
            if mean_SD is not None:
                mean_SD[start : start + rows] = torch.mm(logits_CV.to(weight.dtype), weight) / total_C1.to(weight.dtype)
        ctx.save_for_backward(weight, source, target, mean_SD)
        return chosen_M

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        weight, source, target, mean_SD = ctx.saved_tensors
        total_S = grad_M.new_zeros(len(mean_SD)).index_add_(0, source, grad_M)
        grad_SD = mean_SD.float().mul_(-total_S.unsqueeze(-1))
        grad_SD.index_add_(0, source, weight[target].float().mul_(grad_M.unsqueeze(-1)))
        return grad_SD.to(mean_SD.dtype), None, None, None, None, None, None


def _logits(hidden_CD: Tensor, weight: Tensor, bias: Tensor | None, out_CV: Tensor) -> Tensor:
    """float32 logits, written into `out_CV`."""
    if weight.dtype == torch.float32:
        torch.mm(hidden_CD, weight.t(), out=out_CV)
    elif weight.device.type == "cuda":
        torch.mm(hidden_CD, weight.t(), out_dtype=torch.float32, out=out_CV)
    else:
        out_CV.copy_(torch.mm(hidden_CD, weight.t()))
    return out_CV if bias is None else out_CV.add_(bias)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:index]) for index in range(len(sizes))]

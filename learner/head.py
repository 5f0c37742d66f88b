"""Log-probs of chosen tokens without the logits: the vocabulary is gone through a block at a time, for all places at once.

The softmax is carried along as in flash attention, by its largest logit and its sum so far, so no block is computed twice and
the head's weight is read once. For a frozen head the gradient with respect to a hidden state, `W[token] - softmax(W h) W`,
does not depend on what the loss makes of the log-prob: its dear half is summed up along with the softmax.
Shapes: `S` places, `M` tokens, each predicted at one of the places, `V` vocabulary, `C` words of a block, `D` width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 * 2**20  # of float32 logits at a time
ALIGNED = 256  # words: products of odd widths take a third longer


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


def words_per_block(places: int, vocabulary: int, chunk_bytes: int) -> int:
    words = chunk_bytes // (4 * places)
    return max(1, min(vocabulary, words - words % ALIGNED if words > ALIGNED else words))


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
        in_float32 = float32 or hidden.device.type == "cpu"  # whose kernels can't sum products of bfloat16 in float32
        hidden_SD = hidden.to(torch.float32 if in_float32 else weight.dtype)
        words = words_per_block(len(hidden), len(weight), chunk_bytes)
        buffer = hidden.new_empty(len(hidden) * words, dtype=torch.float32)
        score_M = hidden.new_empty(len(source), dtype=torch.float32)
        softmax = _RunningSoftmax(hidden_SD, with_mean=ctx.needs_input_grad[0])
        for start in range(0, len(weight), words):
            block_CD = weight[start : start + words].to(hidden_SD.dtype)
            logits_SC = buffer[: len(hidden) * len(block_CD)].view(len(hidden), -1)
            _multiply(hidden_SD, block_CD.t(), out=logits_SC)
            if bias is not None:
                logits_SC += bias[start : start + words]
            word_M = target - start
            inside_M = (word_M >= 0) & (word_M < len(block_CD))
            score_M = torch.where(inside_M, logits_SC[source, word_M.clamp(0, len(block_CD) - 1)], score_M)
            softmax.add(logits_SC, block_CD)
        ctx.save_for_backward(weight, source, target, None if softmax.mean_SD is None else softmax.mean_SD.to(hidden.dtype))
        return score_M - softmax.log_sum_S[source]

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        weight, source, target, mean_SD = ctx.saved_tensors
        total_S = grad_M.new_zeros(len(mean_SD)).index_add_(0, source, grad_M)
        grad_SD = mean_SD.float().mul_(-total_S.unsqueeze(-1))
        grad_SD.index_add_(0, source, weight[target].float().mul_(grad_M.unsqueeze(-1)))
        return grad_SD.to(mean_SD.dtype), None, None, None, None, None, None


class _RunningSoftmax:
    """Of logits that come block by block: the logarithm of their sum and, if wanted, the mean row of the head, softmax W."""

    def __init__(self, hidden_SD: Tensor, *, with_mean: bool) -> None:
        self._top_S1 = hidden_SD.new_full((len(hidden_SD), 1), -torch.inf, dtype=torch.float32)
        self._total_S1 = torch.zeros_like(self._top_S1)
        self._sum_SD = torch.zeros_like(hidden_SD, dtype=torch.float32) if with_mean else None

    def add(self, logits_SC: Tensor, block_CD: Tensor) -> None:
        """The logits are overwritten."""
        top_S1 = torch.maximum(self._top_S1, logits_SC.amax(-1, keepdim=True))
        shrink_S1 = (self._top_S1 - top_S1).exp_()
        weight_SC = logits_SC.sub_(top_S1).exp_()
        self._top_S1 = top_S1
        self._total_S1.mul_(shrink_S1).add_(weight_SC.sum(-1, keepdim=True))
        if self._sum_SD is not None:
            _add_product(self._sum_SD.mul_(shrink_S1), weight_SC, block_CD)

    @property
    def log_sum_S(self) -> Tensor:
        return (self._top_S1 + self._total_S1.log()).squeeze(-1)

    @property
    def mean_SD(self) -> Tensor | None:
        return None if self._sum_SD is None else self._sum_SD / self._total_S1


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Into a float32 tensor, whatever the factors are of."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left right` to a float32 tensor, in the right factor's precision."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:index]) for index in range(len(sizes))]

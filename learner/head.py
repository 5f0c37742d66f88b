"""Log-probs of chosen tokens without the logits: the vocabulary is gone through a block at a time, for many places at once.

The softmax is carried along as in flash attention, by its largest logit and its sum so far, so no block is computed twice and
the head's weight is read once. For a frozen head the gradient with respect to a hidden state, `W[token] - softmax(W h) W`,
does not depend on what the loss makes of the log-prob: its dear half is summed up along with the softmax.
Shapes: `S` places, `M` tokens, each predicted at one of the places, `V` vocabulary, `D` width; `P` places and `C` words of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.lora import ADAPTER, is_plain

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}  # of float32 logits at a time; a GPU wants wider products
PLACES = 4096  # at a time: with more, a block would have few words, and what is summed up would be gone through for each of many
ALIGNED = 256  # words: products of odd widths take a third longer


def chosen_logprobs(head: nn.Module, hidden_SD: Tensor, source_M: Tensor, target_M: Tensor, *, float32: bool = False, chunk_bytes: int | None = None) -> Tensor:
    """Log-prob in float32 of each token `target_M` under the logits at the place `source_M`.

    `source_M` need not be sorted, and a place may predict several tokens. `float32` also multiplies in float32 where the
    weights are of lower precision; their products are summed in float32 in any case.
    """
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(hidden_SD.device.type, CHUNK_BYTES["cuda"])
    if isinstance(head, LoraLinear) and head.disable_adapters:
        head = head.base_layer
    if type(head) is nn.Linear and not head.weight.requires_grad:
        return _FrozenHead.apply(hidden_SD, head.weight, head.bias, source_M, target_M, float32, chunk_bytes)
    pieces = [part.shape[0] for part in hidden_SD.split(rows_per_chunk(vocabulary_of(head), chunk_bytes))]
    picked, order = [], []
    for start, rows in zip(_starts(pieces), pieces, strict=True):
        own_M = ((source_M >= start) & (source_M < start + rows)).nonzero().squeeze(-1)
        order.append(own_M)
        chunk = hidden_SD[start : start + rows]
        picked.append(checkpoint(_adapted, head, chunk, source_M[own_M] - start, target_M[own_M], float32, use_reentrant=False))
    return torch.cat(picked)[torch.cat(order).argsort()]


def words_per_block(places: int, vocabulary: int, chunk_bytes: int) -> int:
    words = chunk_bytes // (4 * max(1, places))
    if words > ALIGNED:
        words -= words % ALIGNED
    return max(1, min(vocabulary, words))


def rows_per_chunk(vocabulary: int, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (4 * vocabulary))


def vocabulary_of(head: nn.Module) -> int:
    plain: Any = getattr(head, "base_layer", head)
    return int(plain.weight.shape[0])


def _adapted(head: Any, hidden_PD: Tensor, source_M: Tensor, target_M: Tensor, float32: bool) -> Tensor:
    """A head that is trained itself: autograd does it, some places at a time, with the logits computed again backward."""
    if isinstance(head, LoraLinear) and is_plain(head):
        a, b = head.lora_A[ADAPTER].weight, head.lora_B[ADAPTER].weight
        change_PV = head.scaling[ADAPTER] * (hidden_PD.to(a.dtype) @ a.t() @ b.t())
        logits_PV = _Logits.apply(hidden_PD, head.base_layer.weight, head.base_layer.bias, float32) + change_PV.float()
    else:
        logits_PV = head(hidden_PD).float()
    return logits_PV.log_softmax(-1)[source_M, target_M]


class _Logits(torch.autograd.Function):
    """Of a frozen head, in float32."""

    @staticmethod
    def forward(ctx: Any, hidden_PD: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = hidden_PD.dtype
        factors = (part.to(_factor_dtype(weight, float32)) for part in (hidden_PD, weight))
        logits_PV = hidden_PD.new_empty(len(hidden_PD), len(weight), dtype=torch.float32)
        return _multiply(*factors, out=logits_PV) if bias is None else _multiply(*factors, out=logits_PV).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad_PV: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return (grad_PV.to(weight.dtype) @ weight).to(ctx.dtype), None, None, None


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor, target: Tensor, float32: bool, chunk_bytes: int) -> Tensor:
        hidden_SD = hidden.to(_factor_dtype(weight, float32))
        score_M = hidden.new_empty(len(source), dtype=torch.float32)
        log_sum_S = hidden.new_empty(len(hidden), dtype=torch.float32)
        mean_SD = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), PLACES):
            hidden_PD = hidden_SD[start : start + PLACES]
            softmax = _RunningSoftmax(hidden_PD, with_mean=mean_SD is not None)
            for first, logits_PC, block_CD in _blocks(hidden_PD, weight, bias, chunk_bytes):
                _pick(score_M, logits_PC, source - start, target - first)
                softmax.add(logits_PC, block_CD)
            log_sum_S[start : start + PLACES] = softmax.log_sum_P
            if mean_SD is not None:
                mean_SD[start : start + PLACES] = softmax.mean_PD
        ctx.save_for_backward(weight, source, target, mean_SD)  # in float32: where a token is nearly certain, little is left of the difference
        ctx.dtype = hidden.dtype
        return score_M - log_sum_S[source]

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        weight, source, target, mean_SD = ctx.saved_tensors
        total_S = grad_M.new_zeros(len(mean_SD)).index_add_(0, source, grad_M)
        grad_SD = mean_SD * -total_S.unsqueeze(-1)
        grad_SD.index_add_(0, source, weight[target].float().mul_(grad_M.unsqueeze(-1)))
        return grad_SD.to(ctx.dtype), None, None, None, None, None, None


def _blocks(hidden_PD: Tensor, weight: Tensor, bias: Tensor | None, chunk_bytes: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block by block of the vocabulary: its first word, its logits, which the next block overwrites, and its rows of the head."""
    places, width = hidden_PD.shape
    copied = weight.dtype != hidden_PD.dtype  # a block's rows, which then are as large as the logits of that many places
    words = words_per_block(max(places, width) if copied else places, len(weight), chunk_bytes)
    buffer = hidden_PD.new_empty(places * words, dtype=torch.float32)
    for first in range(0, len(weight), words):
        block_CD = weight[first : first + words].to(hidden_PD.dtype)
        logits_PC = _multiply(hidden_PD, block_CD, out=buffer[: places * len(block_CD)].view(places, -1))
        yield first, logits_PC if bias is None else logits_PC.add_(bias[first : first + words]), block_CD


def _pick(score_M: Tensor, logits_PC: Tensor, place_M: Tensor, word_M: Tensor) -> None:
    """Keep the logits of the tokens whose place and word are among these. Without a mask's `nonzero`, which a GPU would be waited for."""
    places, words = logits_PC.shape
    inside_M = (place_M >= 0) & (place_M < places) & (word_M >= 0) & (word_M < words)
    own_M = logits_PC[place_M.clamp(0, places - 1), word_M.clamp(0, words - 1)]
    torch.where(inside_M, own_M, score_M, out=score_M)


class _RunningSoftmax:
    """Of logits that come block by block: the logarithm of their sum and, if wanted, the mean row of the head, softmax W."""

    def __init__(self, hidden_PD: Tensor, *, with_mean: bool) -> None:
        self._top_P1 = hidden_PD.new_full((len(hidden_PD), 1), torch.finfo(torch.float32).min, dtype=torch.float32)
        self._total_P1 = torch.zeros_like(self._top_P1)
        self._sum_PD = torch.zeros_like(hidden_PD, dtype=torch.float32) if with_mean else None

    def add(self, logits_PC: Tensor, block_CD: Tensor) -> None:
        """The logits are overwritten."""
        top_P1 = torch.maximum(self._top_P1, logits_PC.amax(-1, keepdim=True))
        shrink_P1 = (self._top_P1 - top_P1).exp_()
        weight_PC = logits_PC.sub_(top_P1).exp_()
        self._top_P1 = top_P1
        self._total_P1.mul_(shrink_P1).add_(weight_PC.sum(-1, keepdim=True))
        if self._sum_PD is not None:
            _add_product(self._sum_PD.mul_(shrink_P1), weight_PC, block_CD)

    @property
    def log_sum_P(self) -> Tensor:
        return (self._top_P1 + self._total_P1.log()).squeeze(-1)

    @property
    def mean_PD(self) -> Tensor:
        assert self._sum_PD is not None
        return self._sum_PD / self._total_P1


def _factor_dtype(weight: Tensor, float32: bool) -> torch.dtype:
    """A CPU's kernels can't sum products of bfloat16 in float32."""
    return torch.float32 if float32 or weight.device.type == "cpu" else weight.dtype


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """`left right'` into a float32 tensor, whatever the factors are of."""
    if left.dtype == torch.float32:
        return torch.mm(left, right.t(), out=out)
    return torch.mm(left, right.t(), out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left right` to a float32 tensor, in the right factor's precision."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:index]) for index in range(len(sizes))]

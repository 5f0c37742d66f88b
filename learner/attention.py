"""Attention over a packed row: every completion sees its own past and its group's prompt, which is there once.

A completion's queries attend to themselves and to the prompt in two calls of torch's fused kernel, whose results are put
together in the row by their log-sum-exps. Backward, each kernel is given the joint result instead of its own: that alone makes
its gradients those of the joint softmax. Nothing is masked or repeated K times, and the calls are cut so that little is padded.

Shapes: `N` tokens in the row, `H` heads, `E` a head's width; what a kernel takes and gives is `X H Y E`, `X` stretches of `Y` places.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.packing import Batch
from learner.rectangles import Call

NAME = "ftb_packed"  # as transformers knows it


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' attention interface: packed where a packed batch comes with the call, its own SDPA elsewhere."""
    batch: Batch | None = kwargs.pop("packed", None)
    if batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    query_NHE, key_NHE, value_NHE = (part[0].transpose(0, 1) for part in (query, key, value))
    return _PackedAttention.apply(query_NHE, key_NHE, value_NHE, batch, scale).unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> Tensor:
        out_NHE = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse_NH = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for call in batch.calls:
            places = call.queries
            queries, keys, values = _taken(call, query, key, value)
            out, lse = _attend(queries, keys, values, causal=call.causal, scale=scale)
            if not call.causal:
                out, lse = _join(places.take(out_NHE), places.take(lse_NH), out, lse)
            places.put(out_NHE, out)
            places.put(lse_NH, lse)
        ctx.save_for_backward(query, key, value, out_NHE, lse_NH)
        ctx.calls, ctx.scale = batch.calls, scale
        return out_NHE

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value)]
        for call in ctx.calls:
            d_out, outs = call.queries.take(grad), call.queries.take(out)
            queries, keys, values = _taken(call, query, key, value)
            sums = call.queries.take_filled(lse, padding=torch.inf)  # whose exponential, the weight of padding, is zero
            parts = _attend_backward(d_out, queries, keys, values, outs, sums, causal=call.causal, scale=ctx.scale)
            for places, whole, part in zip((call.queries, call.keys, call.keys), grads, parts, strict=True):
                (places.put if call.causal else places.add)(whole, _own_heads(part, whole.shape[1]))
        return grads[0], grads[1], grads[2], None, None


def _taken(call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the call's kernel is given: keys and values once for each of the query heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = (call.keys.take(part) for part in (key, value))
    if repeats > 1:
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    return call.queries.take(query), keys, values


def _own_heads(grad_XHYE: Tensor, heads: int) -> Tensor:
    """Gradients of heads that were repeated, each added up."""
    return grad_XHYE if grad_XHYE.shape[1] == heads else grad_XHYE.unflatten(1, (heads, -1)).sum(2)


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over what two saw."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return out.lerp_(other_out, weight.to(out.dtype)), torch.logaddexp(lse, other_lse)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The attention's result and the log-sum-exp of its scores, `X H Y E` and `X H Y`."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, lse
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : query.shape[2]]


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given the result and the log-sum-exp of the whole softmax of which this is a part."""
    if query.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        d_query, d_key, d_value = backward(grad, query, key, value, out, lse, 0.0, causal, scale=scale)
        return d_query, d_key, d_value
    # As the kernel's forward leaves it: rows a multiple of 32 long, and infinity, so a weight of zero, where there is no query.
    padded = nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel takes this layout for granted, and reads other places in any other
    seed = torch.zeros((), dtype=torch.long, device=query.device)  # of a dropout that is not there
    d_query, d_key, d_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, padded, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    return d_query, d_key, d_value

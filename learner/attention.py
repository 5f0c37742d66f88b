"""Attention over a packed row: every completion sees its own past and its group's prompt, which is there once.

A completion's queries attend to the prompt and to themselves in two calls of torch's fused kernel, whose results are put
together by their log-sum-exps. Backward, each kernel is given the joint result instead of its own: that alone makes its
gradients those of the joint softmax. Nothing is masked, repeated K times or padded but the completions of one run to its longest.

Shapes: `N` tokens in the row, `H` heads, `E` a head's width, `G` prompts of a run, `K` completions each, `B = G K`, `P` and `T` tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.packing import Batch, Run

NAME = "ftb_packed"  # as transformers knows it


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' attention interface: packed where a packed batch comes with the call, its own SDPA elsewhere."""
    batch: Batch | None = kwargs.pop("packed", None)
    if batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    query_NHE, key_NHE, value_NHE = (part[0].transpose(0, 1) for part in (query, key, value))
    repeats = query_NHE.shape[1] // key_NHE.shape[1]
    if repeats > 1:
        key_NHE, value_NHE = key_NHE.repeat_interleave(repeats, 1), value_NHE.repeat_interleave(repeats, 1)
    return _PackedAttention.apply(query_NHE, key_NHE, value_NHE, batch, scale).unsqueeze(0), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float) -> Tensor:
        out_NHE = torch.empty_like(query, memory_format=torch.contiguous_format)
        ctx.sums = []  # log-sum-exps, run by run
        for run in batch.runs:
            prompt, own = (_Places(places_XY) for places_XY in (run.prompt_GP, run.own_BT))
            keys, values = prompt.take(key), prompt.take(value)
            out, lse_prompt = _attend(prompt.take(query), keys, values, causal=True, scale=scale)
            prompt.put(out_NHE, out)
            lse_joint = None
            if run.own_BT.shape[1]:
                queries = own.take(query)
                own_out, own_lse = _attend(queries, own.take(key), own.take(value), causal=True, scale=scale)
                far_out, far_lse = (_by_row(part, run) for part in _attend(_by_group(queries, run), keys, values, causal=False, scale=scale))
                lse_joint = torch.logaddexp(own_lse, far_lse)
                own_out *= (own_lse - lse_joint).exp().unsqueeze(-1).to(own_out.dtype)
                own_out += far_out * (far_lse - lse_joint).exp().unsqueeze(-1).to(far_out.dtype)
                own.put_real(out_NHE, own_out, run)
            ctx.sums.append((lse_prompt, lse_joint))
        ctx.save_for_backward(query, key, value, out_NHE)
        ctx.batch, ctx.scale = batch, scale
        return out_NHE

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value)]
        for run, (lse_prompt, lse_joint) in zip(ctx.batch.runs, ctx.sums, strict=True):
            prompt, own = _Places(run.prompt_GP), _Places(run.own_BT)
            keys, values = prompt.take(key), prompt.take(value)
            taken = [prompt.take(part) for part in (grad, query, out)]
            of_prompt = _attend_backward(taken[0], taken[1], keys, values, taken[2], lse_prompt, causal=True, scale=ctx.scale)
            if lse_joint is not None:
                d_out, queries, outs = (own.take(part) for part in (grad, query, out))
                d_out = d_out * _real(run).view(len(run.read_B), 1, -1, 1)  # what is padded there is a repetition of some other place
                of_own = _attend_backward(d_out, queries, own.take(key), own.take(value), outs, lse_joint, causal=True, scale=ctx.scale)
                far = [_by_group(part, run) for part in (d_out, queries, outs)]
                of_far = _attend_backward(far[0], far[1], keys, values, far[2], _by_group(lse_joint, run), causal=False, scale=ctx.scale)
                own.put_real(grads[0], of_own[0] + _by_row(of_far[0], run), run)
                own.put_real(grads[1], of_own[1], run)
                own.put_real(grads[2], of_own[2], run)
                of_prompt = (of_prompt[0], of_prompt[1] + of_far[1], of_prompt[2] + of_far[2])
            for whole, part in zip(grads, of_prompt, strict=True):
                prompt.put(whole, part)
        return grads[0], grads[1], grads[2], None, None


class _Places:
    """Places of the row, X rows of Y each, as the kernels want them: X, heads, Y, width."""

    def __init__(self, places_XY: Tensor) -> None:
        self._places = places_XY

    def take(self, row_NHE: Tensor) -> Tensor:
        return row_NHE[self._places].transpose(1, 2)

    def put(self, row_NHE: Tensor, values_XHYE: Tensor) -> None:
        row_NHE[self._places] = values_XHYE.transpose(1, 2)

    def put_real(self, row_NHE: Tensor, values_XHYE: Tensor, run: Run) -> None:
        """Put back what is no padding."""
        real_XY = _real(run)
        row_NHE[self._places[real_XY]] = values_XHYE.transpose(1, 2)[real_XY]


def _real(run: Run) -> Tensor:
    return torch.arange(run.own_BT.shape[1], device=run.read_B.device) < run.read_B.unsqueeze(-1)


def _by_group(part: Tensor, run: Run) -> Tensor:
    """B x H x T (x E) as G x H x K T (x E): all completions of a prompt ask it together."""
    groups, (_, heads, *rest) = len(run.prompt_GP), part.shape
    return part.reshape(groups, -1, heads, *rest).transpose(1, 2).flatten(2, 3)


def _by_row(part: Tensor, run: Run) -> Tensor:
    """The reverse."""
    groups, heads, _, *rest = part.shape
    size, width = len(run.own_BT) // groups, run.own_BT.shape[1]
    return part.reshape(groups, heads, size, width, *rest).transpose(1, 2).flatten(0, 1)


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

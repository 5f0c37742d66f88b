"""A LoRA layer in as few passes over memory as it takes: PEFT's modules and names, a forward and backward of our own.

PEFT's own forward writes the low-rank product, its scaled copy and the sum as three tensors as large as the layer's output,
and autograd as many backward. Here both products are added in place, and only the input and its projection are kept.
Where the layer closes a gated feed-forward, `W (silu(gate) * up)`, its input is computed again backward instead: of the four
tensors of the feed-forward's width that autograd would keep, more than half of what a decoder layer keeps, two are enough.
"""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

ADAPTER = "default"
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")  # what transformers calls the parts of a gated feed-forward


def speed_up(model: PeftModel) -> int:
    """Give every plain LoRA layer the fused forward, and gated feed-forwards theirs; returns how many layers. Any other kind keeps PEFT's."""
    layers = [module for module in model.modules() if isinstance(module, Linear) and is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # an attribute of the object: state and names stay PEFT's
    for block in model.modules():
        if _is_gated(block, layers) and _agrees(block):
            block.forward = partial(_gated_forward, block)
    return len(layers)


def is_plain(layer: Linear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and layer.lora_B[ADAPTER].bias is None
    )


def _is_gated(block: Any, plain: list[Linear]) -> bool:
    return all(hasattr(block, name) for name in GATED) and type(block.act_fn) in (SiLUActivation, nn.SiLU) and any(block.down_proj is layer for layer in plain)


@torch.no_grad()
def _agrees(block: Any) -> bool:
    """Does the block's own forward do nothing else? The same operations in the same order give the same bits, and large inputs tell of limits."""
    weight = block.down_proj.base_layer.weight
    x = torch.linspace(-2, 2, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    x = torch.cat([x, 1e2 * x, 1e4 * x], 1)
    return torch.equal(block(x), _gated_forward(block, x))


def _forward(layer: Linear, x: Tensor) -> Tensor:
    base: nn.Linear = layer.base_layer
    if layer.disable_adapters:
        return base(x)
    return _LoraLinear.apply(x, *_weights(layer))


def _gated_forward(block: Any, x: Tensor) -> Tensor:
    gate, up = block.gate_proj(x), block.up_proj(x)
    if block.down_proj.disable_adapters:
        return block.down_proj(functional.silu(gate) * up)
    return _GatedLoraLinear.apply(gate, up, *_weights(block.down_proj))


def _weights(layer: Linear) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
    base: nn.Linear = layer.base_layer
    return base.weight, base.bias, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]


class _LoraLinear(torch.autograd.Function):
    """`x W' + bias + scale (x A') B'`, the adapter in the precision of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        out, projected_NR = _product(x_NI, x.shape[:-1], weight, bias, a, b, scale)
        ctx.save_for_backward(x_NI, projected_NR, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, projected_NR, weight, a, b = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_NR, grad_a, grad_b = _adapter_gradients(grad_NO, x_NI, projected_NR, a, b, ctx.scale)
        grad_x = _input_gradient(grad_NO, grad_NR, weight, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a, grad_b, None


class _GatedLoraLinear(torch.autograd.Function):
    """The same of `x = silu(gate) * up`, which is not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        x_NI = functional.silu(gate).mul_(up).flatten(0, -2)
        out, projected_NR = _product(x_NI, gate.shape[:-1], weight, bias, a, b, scale)
        ctx.save_for_backward(gate, up, projected_NR, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, projected_NR, weight, a, b = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        opened = functional.silu(gate)
        grad_NR, grad_a, grad_b = _adapter_gradients(grad_NO, (opened * up).flatten(0, -2), projected_NR, a, b, ctx.scale)
        grad_x = _input_gradient(grad_NO, grad_NR, weight, a).view_as(gate)
        grad_up = opened.mul_(grad_x)
        return torch.ops.aten.silu_backward(grad_x.mul_(up), gate), grad_up, None, None, grad_a, grad_b, None


def _product(x_NI: Tensor, places: torch.Size, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The layer's output at these places, and the adapter's projection of the input.

    The output is made in its final shape and filled through a flat view: a function of autograd must not return a view, which
    models that change a layer's output in place could not change.
    """
    out = x_NI.new_empty(*places, len(weight))
    out_NO = out.view(-1, len(weight))
    if bias is None:
        torch.mm(x_NI, weight.t(), out=out_NO)
    else:
        torch.addmm(bias, x_NI, weight.t(), out=out_NO)
    projected_NR = x_NI @ a.to(x_NI.dtype).t()
    out_NO.addmm_(projected_NR, b.to(x_NI.dtype).t(), alpha=scale)
    return out, projected_NR


def _adapter_gradients(grad_NO: Tensor, x_NI: Tensor, projected_NR: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the projection, which the input's is made of, and of both factors."""
    grad_NR = (grad_NO @ b.to(grad_NO.dtype)).mul_(scale)
    return grad_NR, (grad_NR.t() @ x_NI).to(a.dtype), (grad_NO.t() @ projected_NR).mul_(scale).to(b.dtype)


def _input_gradient(grad_NO: Tensor, grad_NR: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    return (grad_NO @ weight).addmm_(grad_NR, a.to(grad_NO.dtype))

"""A LoRA layer in as few passes over memory as it takes: PEFT's modules and names, a forward and backward of our own.

PEFT's own forward writes the low-rank product, its scaled copy and the sum as three tensors as large as the layer's output,
and autograd as many backward. Here both products are added in place, and only the input and its projection are kept.
"""

from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn

ADAPTER = "default"


def speed_up(model: PeftModel) -> int:
    """Give every plain LoRA layer the fused forward; returns how many there are. Any other kind keeps PEFT's."""
    layers = [module for module in model.modules() if isinstance(module, Linear) and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # an attribute of the object: state, names and hooks stay PEFT's
    return len(layers)


def _is_plain(layer: Linear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and layer.lora_B[ADAPTER].bias is None
    )


def _forward(layer: Linear, x: Tensor) -> Tensor:
    base: nn.Linear = layer.base_layer
    if layer.disable_adapters:
        return base(x)
    return _LoraLinear.apply(x, base.weight, base.bias, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])


class _LoraLinear(torch.autograd.Function):
    """`x W' + bias + scale (x A') B'`, the adapter in the precision of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        projected_NR = x_NI @ a.to(x.dtype).t()
        out_NO = nn.functional.linear(x_NI, weight, bias).addmm_(projected_NR, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x_NI, projected_NR, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, projected_NR, weight, a, b = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_NR = (grad_NO @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_a = (grad_NR.t() @ x_NI).to(a.dtype)
        grad_b = (grad_NO.t() @ projected_NR).mul_(ctx.scale).to(b.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight).addmm_(grad_NR, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None

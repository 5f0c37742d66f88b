"""The LoRA layer on CUDA against PEFT's own in float64 on the CPU."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from learner.lora import speed_up


def adapted(dtype: torch.dtype) -> PeftModel:
    """The same numbers each time, rounded to the dtype."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(48, 80)), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model.to(dtype)


def value_and_gradients(model: PeftModel, x: Tensor, grad: Tensor) -> list[Tensor]:
    layer = model.base_model.model[0]
    own = x.clone().requires_grad_()
    out = model(own)
    of = (own, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return [part.detach().cpu().double() for part in (out, *torch.autograd.grad(out, of, grad))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_value_and_gradients_are_pefts(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """In norm."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(3, 17, size, generator=generator).to(dtype) for size in (48, 80))
    model = adapted(dtype).to(device)
    assert speed_up(model) == 1
    got = value_and_gradients(model, x.to(device), grad.to(device))
    for own, exact in zip(got, value_and_gradients(adapted(dtype).double(), x.double(), grad.double()), strict=True):
        assert (own - exact).norm() <= tolerance * exact.norm()

import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from learner.lora import _GatedLoraLinear, _LoraLinear, speed_up
from tests import tiny_families, tiny_llama

IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def adapted(path: Path, **changes: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(path), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def outcome(model: PeftModel) -> tuple[torch.Tensor, ...]:
    logits = model(IDS).logits
    return logits.detach(), *torch.autograd.grad(logits.square().sum(), [part for part in model.parameters() if part.requires_grad])


def test_value_and_gradient_are_pefts(path: Path) -> None:
    plain, fast = adapted(path), adapted(path)
    assert speed_up(fast) == 14
    torch.testing.assert_close(outcome(fast), outcome(plain), rtol=1e-5, atol=1e-5)
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(IDS).logits, plain(IDS).logits)
    assert fast.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_output_may_be_changed_in_place(bias: bool, gated: bool) -> None:
    """As some models do that clip projections or scale them, with a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    gate, x, weight, own_bias, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    trained = [part.requires_grad_() for part in (x, a, b)]
    added = own_bias if bias else None
    inputs = (gate, x) if gated else (x,)
    out = (_GatedLoraLinear if gated else _LoraLinear).apply(*inputs, weight, added, a, b, 1.5)
    got = torch.autograd.grad(out.clamp_(-1, 1).sum(), trained)
    whole = functional.silu(gate) * x if gated else x
    expected = functional.linear(whole, weight, added) + 1.5 * whole @ a.t() @ b.t()
    torch.testing.assert_close(out, expected.clamp(-1, 1))
    torch.testing.assert_close(got, torch.autograd.grad(expected.clamp(-1, 1).sum(), trained))


@pytest.mark.parametrize(("kind", "changes"), [("olmo", {"clip_qkv": 0.5}), ("olmo", {"clip_qkv": 0.5, "attention_bias": True})])
def test_a_model_that_clips_its_projections_in_place_is_pefts(kind: str, changes: dict[str, Any]) -> None:
    models = []
    for _ in range(2):
        base = tiny_families.make(kind, **changes)
        torch.manual_seed(0)
        models.append(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval())
    plain, fast = models
    assert speed_up(fast) == 14
    torch.testing.assert_close(outcome(fast), outcome(plain), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, weight, bias, a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    trained = [part.requires_grad_() for part in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: _LoraLinear.apply(x, weight, bias, a, b, 1.5), trained)


def test_gradients_of_the_gated_feed_forward_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    gate, up, weight, bias, a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    trained = [part.requires_grad_() for part in (gate, up, a, b)]
    assert torch.autograd.gradcheck(lambda gate, up, a, b: _GatedLoraLinear.apply(gate, up, weight, bias, a, b, 1.5), trained)


def kept_bytes(model: PeftModel) -> int:
    """What autograd keeps for the backward pass, but for the weights."""
    weights = {part.data_ptr() for part in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.setdefault(part.data_ptr(), part), lambda part: part):
        model(IDS)
    return sum(part.nbytes for place, part in kept.items() if place not in weights)


def test_a_gated_feed_forward_keeps_two_tensors_of_its_width_not_four(path: Path) -> None:
    model = adapted(path)
    speed_up(model)
    fewer = kept_bytes(model)
    blocks = [module for module in model.modules() if isinstance(module, LlamaMLP)]
    for block in blocks:
        del block.forward  # back to that of its class
    width = model.config.intermediate_size
    assert kept_bytes(model) - fewer == len(blocks) * 2 * IDS.numel() * width * 4


@pytest.mark.parametrize(
    "own",
    [
        lambda block, x: block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x) * 1.01),
        lambda block, x: block.down_proj(block.act_fn(block.gate_proj(x)).clamp(max=16) * block.up_proj(x)),
    ],
    ids=["another factor", "a limit"],
)
def test_a_feed_forward_that_does_something_else_keeps_its_own_forward(path: Path, own: Any) -> None:
    """And only that one."""
    model = adapted(path)
    first, second = (module for module in model.modules() if isinstance(module, LlamaMLP))
    second.forward = types.MethodType(own, second)
    speed_up(model)
    assert isinstance(first.forward, partial)
    assert not isinstance(second.forward, partial)


def test_the_gated_feed_forward_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 30, 48), (2, 30, 48), (32, 48), (4, 48), (32, 4))
    gate, up, weight, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    grad = torch.randn(2, 30, 32, generator=generator)

    def outcome(dtype: torch.dtype, kept: torch.dtype) -> list[torch.Tensor]:
        trained = [part.bfloat16().to(dtype).requires_grad_() for part in (gate, up)] + [part.bfloat16().to(kept).requires_grad_() for part in (a, b)]
        out = _GatedLoraLinear.apply(trained[0], trained[1], weight.bfloat16().to(dtype), None, trained[2], trained[3], 1.5)
        return [out.detach(), *torch.autograd.grad(out, trained, grad.bfloat16().to(dtype))]

    got = outcome(torch.bfloat16, torch.float32)
    assert [part.dtype for part in got] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for own, exact in zip(got, outcome(torch.float64, torch.float64), strict=True):
        assert (own - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_other_layers_keep_their_own_forward(path: Path, changes: dict[str, object]) -> None:
    model = adapted(path, **changes)
    assert speed_up(model) == 0
    assert not any(isinstance(module.forward, partial) for module in model.modules())

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from learner.head import chosen_logprobs

PLACES, TOKENS, VOCABULARY, WIDTH = 13, 40, 57, 8
ROW_BYTES = 4 * VOCABULARY


def problem(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
    hidden = (3 * torch.randn(PLACES, WIDTH, generator=generator)).to(dtype)
    source = torch.randint(PLACES, (TOKENS,), generator=generator)
    return head, hidden, source, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def naive(head: nn.Module, hidden: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return head(hidden).log_softmax(-1)[source, target]


def with_gradient(logp: Tensor, *of: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, len(logp), dtype=logp.dtype)
    return [logp.detach(), *torch.autograd.grad((weights * logp).sum(), of)]


@pytest.mark.parametrize("chunk_bytes", [1, 5 * ROW_BYTES, PLACES * ROW_BYTES, 10**9])
@pytest.mark.parametrize("bias", [False, True])
def test_any_chunk_gives_the_exact_value_and_gradient(chunk_bytes: int, bias: bool) -> None:
    head, hidden, source, target = problem(bias=bias)
    got = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target, chunk_bytes=chunk_bytes), hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = with_gradient(naive(head.double(), exact, source, target), exact)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()


def test_logits_of_thousands_stay_finite() -> None:
    head, hidden, source, target = problem()
    large = (1e3 * hidden).requires_grad_()
    value, gradient = with_gradient(chosen_logprobs(head, large, source, target), large)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert value.min() < -1e3


@pytest.mark.parametrize("chunk_bytes", [ROW_BYTES, 10**9])
def test_an_adapted_head_gets_its_own_gradient(chunk_bytes: int) -> None:
    class Model(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.lm_head = head

    head, hidden, source, target = problem()
    layer = get_peft_model(Model(head), LoraConfig(r=2, target_modules=["lm_head"])).base_model.model.lm_head
    nn.init.normal_(layer.lora_B["default"].weight)
    of = (hidden.requires_grad_(), layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    got = with_gradient(chosen_logprobs(layer, hidden, source, target, chunk_bytes=chunk_bytes), *of)
    torch.testing.assert_close(got, with_gradient(naive(layer, hidden, source, target), *of), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("float32", [False, True])
def test_products_of_bfloat16_weights_are_float32(float32: bool) -> None:
    head, hidden, source, target = problem(torch.bfloat16)
    got = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target, float32=float32, chunk_bytes=5 * ROW_BYTES), hidden)
    exact = hidden.detach().double().requires_grad_()
    value, slope = with_gradient(naive(head.double(), exact, source, target), exact)
    assert got[0].dtype == torch.float32
    assert (got[0] - value).norm() <= 1e-6 * value.norm()
    assert (got[1] - slope).norm() <= 4e-3 * slope.norm()  # half a unit in the last place of bfloat16, in which it is given on


def test_without_a_gradient_none_is_prepared() -> None:
    head, hidden, source, target = problem()
    assert not chosen_logprobs(head, hidden, source, target).requires_grad

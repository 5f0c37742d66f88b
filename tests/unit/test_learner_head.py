from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from learner.head import chosen_logprobs, words_per_block

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


def lora_of(head: nn.Linear, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = get_peft_model(nn.ModuleDict({"lm_head": head}), LoraConfig(r=2, target_modules=["lm_head"])).base_model.model.lm_head
        nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def exact_of_adapted(layer: Any, source: Tensor, target: Tensor, *of: Tensor) -> list[Tensor]:
    """In float64, given the hidden states and both factors."""
    hidden, a, b = exact = [part.detach().double().requires_grad_() for part in of]
    logits = hidden @ layer.base_layer.weight.double().t() + layer.scaling["default"] * hidden @ a.t() @ b.t()
    return with_gradient(logits.log_softmax(-1)[source, target], *exact)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_is_nearly_certain_keeps_its_small_gradient(dtype: torch.dtype) -> None:
    head, hidden, source, _ = problem(dtype)
    hidden = 2 * hidden
    target = head(hidden).argmax(-1)[source]
    _, gradient = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target, chunk_bytes=5 * ROW_BYTES), hidden)
    exact = hidden.detach().double().requires_grad_()
    expected, slope = with_gradient(naive(head.double(), exact, source, target), exact)
    likely = expected.exp() > 0.99
    assert likely.any() and (1 - expected[likely].exp()).min() < 1e-4
    places = source[likely].unique()
    error, size = (gradient - slope)[places].norm(dim=-1), slope[places].norm(dim=-1)
    assert (size > 1e-4).any()
    assert (error <= (1e-3 if dtype is torch.float32 else 6e-3) * size + 1e-5).all()


@pytest.mark.parametrize("chunk_bytes", [1, 5 * ROW_BYTES, 10**9])
def test_words_that_cannot_be_are_no_words(chunk_bytes: int) -> None:
    """Whole blocks of them, at the start and later."""
    head, hidden, source, _ = problem(bias=True)
    head.bias[:10] = head.bias[30:40] = -torch.inf
    target = torch.full_like(source, 12)
    got = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target, chunk_bytes=chunk_bytes), hidden)
    torch.testing.assert_close(got, with_gradient(naive(head, hidden, source, target), hidden), rtol=1e-5, atol=1e-5)


def test_many_places_go_through_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, source, target = problem()
    whole = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target), hidden)
    monkeypatch.setattr("learner.head.PLACES", 5)
    for own, expected in zip(with_gradient(chosen_logprobs(head, hidden, source, target, chunk_bytes=ROW_BYTES), hidden), whole, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("places", "vocabulary", "chunk_bytes", "words"),
    [(2041, 151_936, 32 * 2**20, 4096), (10, 57, 32 * 2**20, 57), (10**7, 100, 1, 1), (4, 1000, 4 * 4 * 300, 256), (4, 1000, 4 * 4 * 200, 200)],
)
def test_a_block_fits_the_limit_and_is_of_a_good_width(places: int, vocabulary: int, chunk_bytes: int, words: int) -> None:
    assert words_per_block(places, vocabulary, chunk_bytes) == words


@pytest.mark.parametrize("chunk_bytes", [ROW_BYTES, 10**9])
@pytest.mark.parametrize("float32", [False, True])
def test_logits_of_an_adapted_bfloat16_head_are_float32(chunk_bytes: int, float32: bool) -> None:
    head, hidden, source, target = problem(torch.bfloat16)
    layer = lora_of(head)
    of = (hidden.requires_grad_(), layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    got = with_gradient(chosen_logprobs(layer, hidden, source, target, float32=float32, chunk_bytes=chunk_bytes), *of)
    expected = exact_of_adapted(layer, source, target, *of)
    assert (got[0] - expected[0]).abs().max() < 1e-4
    for own, slope in zip(got[1:], expected[1:], strict=True):
        assert (own - slope).norm() <= 1e-2 * slope.norm()


def test_an_adapted_head_whose_adapter_is_off_is_the_frozen_one() -> None:
    head, hidden, source, target = problem(torch.bfloat16)
    layer = lora_of(head)
    layer.enable_adapters(False)
    assert torch.equal(chosen_logprobs(layer, hidden, source, target), chosen_logprobs(head, hidden, source, target))


@pytest.mark.parametrize("chunk_bytes", [ROW_BYTES, 10**9])
def test_an_adapted_head_gets_its_own_gradient(chunk_bytes: int) -> None:
    head, hidden, source, target = problem()
    layer = lora_of(head)
    of = (hidden.requires_grad_(), layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    got = with_gradient(chosen_logprobs(layer, hidden, source, target, chunk_bytes=chunk_bytes), *of)
    for own, exact in zip(got, exact_of_adapted(layer, source, target, *of), strict=True):
        assert (own - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("float32", [False, True])
def test_products_of_bfloat16_weights_are_float32(float32: bool) -> None:
    head, hidden, source, target = problem(torch.bfloat16)
    got = with_gradient(chosen_logprobs(head, hidden.requires_grad_(), source, target, float32=float32, chunk_bytes=5 * ROW_BYTES), hidden)
    exact = hidden.detach().double().requires_grad_()
    value, slope = with_gradient(naive(head.double(), exact, source, target), exact)
    assert got[0].dtype == torch.float32
    assert (got[0] - value).norm() <= 1e-6 * value.norm()
    assert (got[1] - slope).norm() <= 4e-3 * slope.norm()  # half a unit in the last place of bfloat16, in which it is given on


def test_without_a_gradient_none_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, source, target = problem()
    prepared: list[Tensor] = []
    monkeypatch.setattr("learner.head._add_product", lambda total, left, right: prepared.append(total))
    chosen_logprobs(head, hidden, source, target)
    assert not prepared
    chosen_logprobs(head, hidden.requires_grad_(), source, target)
    assert len(prepared) == 1


def test_the_gradient_may_be_asked_for_twice() -> None:
    head, hidden, source, target = problem()
    logp = chosen_logprobs(head, hidden.requires_grad_(), source, target).sum()
    first, second = (torch.autograd.grad(logp, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)

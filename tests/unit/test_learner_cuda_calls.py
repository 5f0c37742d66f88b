"""What is called on a CUDA device only, called on torch's meta device: the arguments fit the operators, the results have their shapes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learner.attention import _attend, _attend_backward
from learner.head import chosen_logprobs


@pytest.mark.parametrize("tokens", [1, 32, 40])
@pytest.mark.parametrize("keys", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_forward_and_backward(dtype: torch.dtype, keys: int | None, tokens: int) -> None:
    query = torch.empty(2, tokens, 3, 64, dtype=dtype, device="meta").transpose(1, 2)
    key = torch.empty(2, keys or tokens, 3, 64, dtype=dtype, device="meta").transpose(1, 2)
    out, lse = _attend(query, key, key, causal=keys is None, scale=0.3)
    assert (out.shape, out.dtype) == (query.shape, dtype)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    grads = _attend_backward(out, query, key, key, out, lse, causal=keys is None, scale=0.3)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(part.shape, dtype) for part in (query, key, key)]


class Calls(TorchDispatchMode):
    """Keeps what the backward kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_efficient_attention_backward.default:
            self.given.append(args)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("tokens", [32, 40])
def test_the_backward_kernel_gets_the_layout_that_it_takes_for_granted(tokens: int) -> None:
    """Batch, token, head, width for the result; log-sum-exps in rows of 32. What is given here is laid out otherwise."""
    query, out = (torch.empty(2, 3, tokens, 64, device="meta") for _ in range(2))
    lse = torch.empty(2, tokens, 3, device="meta").transpose(1, 2)
    with Calls() as calls:
        _attend_backward(out, query, query, query, out, lse, causal=False, scale=0.3)
    ((_grad, _query, _key, _value, _bias, result, sums, *_),) = calls.given
    assert isinstance(result, Tensor)
    assert result.transpose(1, 2).is_contiguous()
    assert sums.is_contiguous()
    assert sums.shape[-1] % 32 == 0


class Products(TorchDispatchMode):
    """Keeps the precision of the factors of each matrix product, and of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out, torch.ops.aten.mm.default):
            self.seen.add((args[1].dtype, result.dtype))
        if func is torch.ops.aten.addmm_.default:
            self.seen.add((args[2].dtype, result.dtype))
        return result


@pytest.mark.parametrize(("float32", "factors"), [(False, torch.bfloat16), (True, torch.float32)])
def test_products_of_a_bfloat16_head_are_written_in_float32(float32: bool, factors: torch.dtype) -> None:
    """In several blocks and pieces, forward and backward."""
    head = nn.Linear(8, 1100, bias=True, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    hidden = torch.empty(5000, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    source, target = (torch.empty(6000, dtype=torch.long, device="meta") for _ in range(2))
    with Products() as products:
        logp = chosen_logprobs(head, hidden, source, target, float32=float32, chunk_bytes=4 * 4096 * 300)
        (grad,) = torch.autograd.grad(logp.sum(), hidden)
    assert products.seen == {(factors, torch.float32)}
    assert (logp.shape, logp.dtype) == ((6000,), torch.float32)
    assert (grad.shape, grad.dtype) == (hidden.shape, torch.bfloat16)

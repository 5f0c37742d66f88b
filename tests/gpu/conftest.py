"""These tests need a CUDA device, and products of float32 in float32."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    yield torch.device("cuda")
    torch.set_float32_matmul_precision(before)

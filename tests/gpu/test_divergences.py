"""Normalisers and weights on CUDA are those on the CPU."""

import pytest
import torch

from ftb_llm.divergences import FAMILY, get_divergence


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_normalise_gives_the_cpus_values(device: torch.device, name: str, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.cat([scale * torch.randn(16, 8, dtype=torch.float64, generator=generator) for scale in (0.1, 1.0, 30.0, 1e4)])
    mask = torch.rand(delta.shape, generator=generator) < 0.7 if masked else None
    log_z, weights = get_divergence(name).normalise(delta, mask)
    own_log_z, own_weights = get_divergence(name).normalise(delta.to(device), None if mask is None else mask.to(device))
    assert own_log_z.device.type == own_weights.device.type == "cuda"
    torch.testing.assert_close(own_log_z.cpu(), log_z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own_weights.cpu(), weights, rtol=1e-7, atol=1e-9)

"""One whole step on CUDA against the same on the CPU, in float32."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from ftb_llm.types import StepReport
from learner.model import AdaptedModel
from learner.step import take_step
from tests import tiny_llama


class Recording(AdaptedModel):
    """Keeps the gradient that the update sees."""

    gradient: dict[str, Tensor]

    def update(self, *, step: int, learning_rate: float, max_grad_norm: float) -> float:
        self.gradient = {name: parameter.grad.cpu() for name, parameter in self.module.named_parameters() if parameter.grad is not None}
        return super().update(step=step, learning_rate=learning_rate, max_grad_norm=max_grad_norm)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one device per process, whichever model came first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"), hidden_size=128)  # two heads of 64


def step_on(gpus: int, path: Path, device_type: str, **changes: Any) -> tuple[StepReport, dict[str, Tensor]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    learner = tiny_llama.RUN["learner"] | {"gpus": gpus, "micro_batch_tokens": 40}  # several micro-batches, and groups in parts
    model = Recording(tiny_llama.tiny_config(learner=learner), path)
    assert model.device.type == device_type
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    request = tiny_llama.step_request(1)
    report = take_step(model, replace(request, objective=replace(request.objective, **changes)), micro_batch_tokens=learner["micro_batch_tokens"])
    assert all(tensor.isfinite().all() for tensor in model.adapter_state().values())
    return report, model.gradient


@pytest.mark.parametrize("changes", [{}, {"divergence": "js"}, {"log_z": "learned"}, {"kind": "reinforce"}], ids=["reverse_kl", "js", "learned", "reinforce"])
def test_a_step_is_that_of_the_cpu(device: torch.device, path: Path, changes: dict[str, Any]) -> None:
    expected, slopes = step_on(0, path, "cpu", **changes)
    got, gradient = step_on(1, path, device.type, **changes)
    assert got.loss == pytest.approx(expected.loss, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(torch.tensor(got.logp_GK), torch.tensor(expected.logp_GK), rtol=1e-4, atol=1e-4)
    assert gradient.keys() == slopes.keys()
    whole = torch.cat([slope.flatten() for slope in slopes.values()])
    assert (torch.cat([part.flatten() for part in gradient.values()]) - whole).norm() <= 1e-3 * whole.norm()

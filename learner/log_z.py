"""log Z learned per prompt, the classical alternative to the batch normaliser (`objective.log_z: learned`)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LONGEST_MOVE = 1.0  # of the slope: the exponential members' slopes know no bound


class LogZTable:
    """One number per prompt, moved down the loss's own slope once per step.

    A prompt that was never seen starts from the batch normaliser of its groups: from zero, a log Z of a hundred would take
    the whole run to reach. Values belong to prompts by their index in the dataset, and to one target: with another beta, or
    tempered when they weren't, all prompts start again.
    """

    def __init__(self) -> None:
        self._target: tuple[float, bool] | None = None
        self._values: dict[int, float] = {}

    def use(self, beta: float, tempered: bool) -> None:
        """Say whose log Z is asked for from now on; values of another target are forgotten."""
        if self._target != (beta, tempered):
            self._target, self._values = (beta, tempered), {}

    def lookup(self, prompts: Sequence[int], batch_log_z_G: Tensor) -> Tensor:
        """The learned value of each group's prompt, else the group's own batch normaliser."""
        known = [self._values.get(prompt) for prompt in prompts]
        values = [own if value is None else value for value, own in zip(known, batch_log_z_G.tolist(), strict=True)]
        return torch.tensor(values, dtype=torch.float64, device=batch_log_z_G.device)

    def update(self, prompts: Sequence[int], log_z_G: Tensor, slope_G: Tensor, rate: float) -> None:
        """One step down for every prompt of the step; `slope_G` is the mean of L' over each group at `log_z_G`.

        A prompt that is new takes the mean of what its groups began with, and moves from there.
        """
        values, slopes = defaultdict(list), defaultdict(list)
        for prompt, value, slope in zip(prompts, log_z_G.tolist(), slope_G.tolist(), strict=True):
            values[prompt].append(value)
            slopes[prompt].append(slope)
        for prompt, own in values.items():
            slope = sum(slopes[prompt]) / len(own)
            self._values[prompt] = sum(own) / len(own) - rate * max(-_LONGEST_MOVE, min(_LONGEST_MOVE, slope))

    def state(self) -> dict[str, Any]:
        return {"target": self._target, "values": {str(prompt): value for prompt, value in self._values.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self._target = None if state["target"] is None else (float(state["target"][0]), bool(state["target"][1]))
        self._values = {int(prompt): value for prompt, value in state["values"].items()}

"""What the controller needs of its collaborators: real ones are Ray actors, those in unit tests are small fakes."""

from typing import Any, Protocol

from ftb_llm.types import AdapterRef, EvalReport, Group, GroupRequest, PushReport, StepReport, StepRequest


class GeneratorPort(Protocol):
    """One generator: an engine with a policy snapshot of its own."""

    name: str

    async def start(self) -> dict[str, Any]:
        """Load the engine and warm it up."""

    async def generate(self, request: GroupRequest) -> Group:
        """Complete one prompt K times; many calls may be under way at once."""

    async def push(self, adapter: AdapterRef, payload: Any) -> PushReport:
        """Merge the adapter into the engine and check it with the canary."""

    async def measure_speed(self) -> float:
        """Tokens per second on a fixed workload, with nothing else in the engine."""

    async def info(self) -> dict[str, Any]:
        """Facts about the process, its memory among them."""

    async def stop(self) -> None:
        """Shut the engine down."""


class LearnerPort(Protocol):
    """The learner. Its calls are made one at a time."""

    async def start(self) -> dict[str, Any]:
        """Load the model and the adapter."""

    async def step(self, request: StepRequest) -> StepReport:
        """Take one optimizer step."""

    async def publish(self, version: int) -> tuple[AdapterRef, Any]:
        """Write the adapter and put its bytes where generators can fetch them."""

    async def evaluate(self, step: int, beta: float) -> EvalReport | None:
        """Ask the exact oracle; None where the task has none."""

    async def logprobs(self, groups: list[Group]) -> list[list[float]]:
        """Summed log-probs of the completions under the present adapter."""

    async def save_checkpoint(self, step: int) -> str:
        """Write everything that a resumed run needs; returns the folder."""

    async def load_checkpoint(self, path: str) -> int:
        """Go back to a checkpoint; returns its step."""

    async def info(self) -> dict[str, Any]:
        """Facts about the process, its memory among them."""


class ReferencePort(Protocol):
    """Actors that hold the reference model alone."""

    async def score(self, group: Group) -> tuple[tuple[float, ...], ...]:
        """Log-prob of each token of each completion."""


class RewardPort(Protocol):
    """Scores one group; raises `RewardError`."""

    async def score(self, group: Group) -> tuple[float, ...]: ...


class Progress(Protocol):
    """Shows the run to whoever started it."""

    def update(self, status: dict[str, Any]) -> None: ...

    def line(self, text: str) -> None: ...

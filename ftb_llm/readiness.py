"""Whether the run makes progress, and if not, what it waits for: `GET /readyz`."""

import time

from ftb_llm.buffer import GroupBuffer
from ftb_llm.config import Config
from ftb_llm.state import GeneratorPhase, Phase, RunState

_IDLE_SECONDS = 120.0  # a step may take long; longer than this is worth a look


def not_ready_cause(state: RunState, config: Config, buffer: GroupBuffer) -> str | None:
    """Why nothing moves, or None."""
    if state.phase is not Phase.TRAINING:
        return f"the run is {state.phase.value}"
    serving = [generator.name for generator in state.generators if generator.phase is GeneratorPhase.SERVING]
    if not serving:
        phases = (f"{generator.name} is {generator.phase.value}: {generator.last_error}" for generator in state.generators)
        return f"no generator serves; {'; '.join(phases)}"
    idle_seconds = time.monotonic() - state.last_progress
    if idle_seconds < _IDLE_SECONDS:
        return None
    waits_for = "the learner's step" if buffer.depth >= config.learner.groups_per_step else "groups"
    return f"no step for {idle_seconds:.0f} s; waiting for {waits_for}; serving generators: {', '.join(serving)}"

"""Results of trials that nobody ran: what the tests of tables, plots and the command line show."""

from dataclasses import replace

from ftb_llm.bench.spec import CurvePoint, TrialResult, TrialSpec
from ftb_llm.bench.trials import Row


def a_result(name: str, **changes: object) -> TrialResult:
    point = CurvePoint(step=400, completions=102_400, exact_tv=0.03, exact_jsd=0.002, reward=2.0, modes_found=15)
    result = TrialResult(
        spec=TrialSpec(task="hypergrid", objective=name, lag=4, seed=2),
        curve=(replace(point, step=0, completions=0, exact_tv=0.8), point),
        modes_total=16,
        target_reward=2.1,
        coverage=33.5,
        coverage_target=36.0,
        pass_at_k={"1": 0.8, "4": 0.99},
        seconds=45.0,
    )
    return replace(result, **changes)


def rows(*, seeds: int = 2) -> list[Row]:
    """Exact TV 0.01, 0.03, ... by seed, on one task at two lags."""
    found = []
    for name in ("hellinger", "grpo"):
        for lag in (0, 50):
            for seed in range(seeds):
                result = a_result(name)
                last = replace(result.curve[-1], exact_tv=0.01 + 0.02 * seed + lag / 100)
                found.append(replace(result, spec=replace(result.spec, lag=lag, seed=seed), curve=(last,), coverage=30.0 + seed).row())
    return found

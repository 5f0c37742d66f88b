from typing import Any

import pytest

from ftb_llm.config import Config, build_config
from ftb_llm.config.resolve import resolve_learning_rate, resolve_objective


def config(decay: str = "cosine", warmup: int = 4, max_steps: int = 12, **objective: Any) -> Config:
    learner = {"learning_rate": 0.1, "warmup_steps": warmup, "decay": decay}
    return build_config({"run": {"max_steps": max_steps}, "learner": learner, "objective": objective})


def rates(of: Config) -> list[float]:
    return [resolve_learning_rate(of, step) for step in range(1, of.run.max_steps + 1)]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_to_the_peak(decay: str) -> None:
    assert rates(config(decay))[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_decays() -> None:
    assert rates(config("constant"))[5:] == [0.1] * 7
    assert rates(config("linear"))[5:] == pytest.approx([0.1 * (1 - k / 8) for k in range(1, 8)])
    cosine = rates(config("cosine"))
    assert cosine[8] == pytest.approx(0.05)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert cosine[-1] > 0


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(config(warmup=0))[0] == 0.1


def test_a_warm_up_longer_than_the_run() -> None:
    assert rates(config(warmup=100, max_steps=3)) == pytest.approx([0.1 * k / 101 for k in (1, 2, 3)])


def test_a_run_shortened_under_way_has_nothing_left() -> None:
    assert resolve_learning_rate(config("linear", max_steps=12), 20) == 0


def test_objective() -> None:
    spec = resolve_objective(config(divergence={"name": "alpha", "alpha": 0.5}, beta=0.25, tempered=True).objective, 7)
    assert (spec.kind, spec.divergence, spec.alpha, spec.beta, spec.tempered) == ("ftb", "alpha", 0.5, 0.25, True)

"""The canary's verdict."""

import math

import pytest

from actors.canary import judge


@pytest.mark.parametrize(
    ("engine", "learner", "base"),
    [
        (-5.0, -5.0, -7.0),
        (-5.0009, -5.0, -7.0),  # within the tolerance
        (-7.0, -7.0, -7.0),  # an adapter that still does nothing
        (-7.0, -7.0005, -7.0),  # base and learner too close to be told apart
    ],
)
def test_engine_that_speaks_as_the_learner_is_fine(engine: float, learner: float, base: float) -> None:
    assert judge(engine, learner, base, 1e-3) is None


def test_close_values_are_judged_by_the_learner_alone() -> None:
    assert "differ by more than 0.001" in str(judge(-7.0, -7.0015, -7.0, 1e-3))


def test_undelivered_adapter_is_named() -> None:
    problem = judge(-7.0, -5.0, -7.0, 1e-3)
    assert problem is not None
    assert problem.startswith("adapter was not delivered: engine still answers as the base model")


def test_another_value_than_the_learners_names_both() -> None:
    problem = judge(-5.5, -5.0, -7.0, 1e-3)
    assert problem is not None
    assert "-5.500000" in problem
    assert "-5.000000" in problem


@pytest.mark.parametrize("engine", [math.nan, math.inf, -math.inf])
def test_engine_without_a_number_fails(engine: float) -> None:
    assert judge(engine, -5.0, -7.0, 1e-3) is not None


@pytest.mark.parametrize("learner", [math.nan, math.inf])
def test_learner_without_a_number_fails(learner: float) -> None:
    assert judge(-5.0, learner, -7.0, 1e-3) is not None

import json
import math

import numpy as np
import pytest

from ftb_llm.tasks import get_task
from ftb_llm.tasks.oracle import DISTANCES, REST_FLOOR, Oracle


class Coin:
    """Three completions in two modes: small enough to work out by hand."""

    name = "coin"
    malformed_reward = 0.0
    grid_shape = None

    def prompts(self) -> list[str]:
        return ["p"]

    def completions(self, prompt: str) -> list[str]:
        return ["a", "b", "c"]

    def rewards(self, prompt: str) -> list[float]:
        return [0.0, math.log(2), math.log(4)]

    def base_weights(self, prompt: str) -> list[float]:
        return [1.0, 1.0, 1.0]

    def modes(self, prompt: str) -> list[list[int]]:
        return [[1], [2]]


ORACLE = Oracle(Coin())
REFERENCE = np.log([0.25, 0.25, 0.25])
TARGET = np.array([1, 2, 4, 1]) / 8  # at beta 1; the rest has the remaining quarter and reward 0


def report(policy: list[float], *, beta: float = 1.0):
    with np.errstate(divide="ignore"):
        return ORACLE.report(step=3, beta=beta, reference={"p": REFERENCE}, policy={"p": np.log(np.array(policy))})


def test_target_is_the_tilted_reference() -> None:
    assert np.exp(ORACLE.log_target("p", REFERENCE, 1.0)) == pytest.approx(TARGET, abs=1e-12)
    assert np.exp(ORACLE.log_target("p", REFERENCE, 0.5)) == pytest.approx(np.array([1, 4, 16, 1]) / 22, abs=1e-12)


def test_policy_on_target_is_at_distance_zero() -> None:
    done = report([1 / 8, 2 / 8, 4 / 8])
    assert all(done.metrics[f"eval/exact_{name}"] == pytest.approx(0, abs=1e-12) for name in DISTANCES)
    assert done.metrics["eval/reward"] == pytest.approx(done.metrics["eval/target_reward"]) == pytest.approx((2 * math.log(2) + 4 * math.log(4)) / 8)
    assert (done.step, done.modes_found, done.modes_total, done.grid_shape) == (3, 2, 2, None)
    assert done.policy["p"] == pytest.approx(TARGET)
    assert done.target["p"] == pytest.approx(TARGET)


def test_values_worked_out_by_hand() -> None:
    metrics = report([1 / 4, 1 / 4, 1 / 4]).metrics  # p = 1/4 each, q = 1/8 2/8 4/8 1/8, so p/q = 2 1 1/2 2
    assert metrics["eval/exact_tv"] == pytest.approx(1 / 4)
    assert metrics["eval/exact_reverse_kl"] == pytest.approx(math.log(2) / 4)
    assert metrics["eval/exact_forward_kl"] == pytest.approx(math.log(2) / 4)
    assert metrics["eval/exact_pearson"] == pytest.approx((1 / 8 + 1 / 8 + 1 / 8) / 2)
    assert metrics["eval/exact_neyman"] == pytest.approx((1 / 16 + 1 / 4 + 1 / 16) / 2)
    assert metrics["eval/exact_hellinger"] == pytest.approx(4 * (1 - (2 * math.sqrt(1 / 32) + 1 / 4 + math.sqrt(1 / 8))))


def generator(name: str, u: np.ndarray) -> np.ndarray:
    """f of the reference table, written from u = p/q alone."""
    table = {
        "tv": np.abs(u - 1) / 2,
        "reverse_kl": u * np.log(u) - u + 1,
        "forward_kl": -np.log(u) + u - 1,
        "pearson": (u - 1) ** 2 / 2,
        "neyman": (u - 1) ** 2 / (2 * u),
        "hellinger": 2 * (np.sqrt(u) - 1) ** 2,
        "js": 2 * (u * np.log(u) - (u + 1) * np.log((u + 1) / 2)),
    }
    return table[name]


@pytest.mark.parametrize("name", DISTANCES)
def test_every_divergence_is_the_f_divergence_of_its_generator(name: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        p, q = random.dirichlet(np.ones(50), 2)
        assert DISTANCES[name](np.log(p), np.log(q)) == pytest.approx(float(q @ generator(name, p / q)), rel=1e-9)


def test_the_rest_is_one_outcome_with_the_malformed_reward() -> None:
    metrics = report([0.1, 0.2, 0.3])
    assert metrics.policy["p"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert metrics.metrics["eval/reward"] == pytest.approx(0.2 * math.log(2) + 0.3 * math.log(4))
    assert sum(metrics.policy["p"]) == pytest.approx(1)
    assert sum(metrics.target["p"]) == pytest.approx(1)


def test_rounding_above_one_is_undone_but_more_is_an_error() -> None:
    rounded = report([0.5 + 1e-6, 0.25, 0.25])
    assert sum(rounded.policy["p"]) == pytest.approx(1, abs=1e-12)
    assert rounded.policy["p"][-1] == pytest.approx(REST_FLOOR, rel=1e-3)
    with pytest.raises(ValueError, match=r"probability 1\.1"):
        report([0.6, 0.25, 0.25])


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("policy", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e-300, 0.5, 0.5]])
def test_every_number_is_finite_and_plain_json(policy: list[float], beta: float) -> None:
    done = report(policy, beta=beta)
    assert all(math.isfinite(value) and value >= 0 for value in done.metrics.values())
    json.dumps([done.metrics, done.policy, done.target], allow_nan=False)
    assert 0 <= done.metrics["eval/exact_tv"] <= 1


@pytest.mark.parametrize(("policy", "found"), [([0.3, 0.124, 0.3], 1), ([0.3, 0.126, 0.3], 2), ([0.9, 0.0, 0.0], 0), ([0.0, 0.0, 0.9], 1)])
def test_a_mode_is_found_at_half_of_the_targets_mass(policy: list[float], found: int) -> None:
    assert report(policy).modes_found == found
    assert report(policy).metrics["eval/modes_found"] == found
    assert report(policy).metrics["eval/modes_total"] == 2


@pytest.mark.parametrize("bad", [np.log([0.5, 0.5]), np.array([np.nan, -1.0, -1.0]), np.array([np.inf, -1.0, -1.0])])
def test_impossible_log_probs_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="prompt 'p'"):
        ORACLE.report(step=0, beta=1.0, reference={"p": REFERENCE}, policy={"p": bad})


def test_uniform_reference_on_the_hypergrid() -> None:
    task = get_task("hypergrid")
    uniform = {prompt: np.full(1024, -math.log(1024)) for prompt in task.prompts()}
    done = Oracle(task).report(step=0, beta=0.5, reference=uniform, policy=uniform)
    assert done.metrics["eval/exact_tv"] > 0.7  # the quickstart starts here
    assert (done.modes_found, done.modes_total, done.grid_shape) == (0, 16, (32, 32))
    assert all(len(row) == 1025 for row in [*done.policy.values(), *done.target.values()])

from itertools import combinations

import numpy as np
import pytest

from ftb_llm.bench.coverage import SAMPLES, count, pass_at_k


def test_distinct_and_correct_samples_are_counted() -> None:
    p = [0.5, 0.25, 0.0, 0.25]
    correct = np.array([True, True, True, False])
    found = count(p, correct, np.random.default_rng(0))
    assert found.distinct == 2  # the third is never drawn
    assert abs(found.correct - 0.75 * SAMPLES) < 5 * (SAMPLES * 0.75 * 0.25) ** 0.5


def test_coverage_of_a_uniform_policy_is_the_expected_one() -> None:
    generator = np.random.default_rng(1)
    size = 300
    distinct = [count([1.0] * size, np.ones(size, dtype=np.bool_), generator).distinct for _ in range(400)]
    assert np.mean(distinct) == pytest.approx(size * (1 - (1 - 1 / size) ** SAMPLES), abs=2)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k: int) -> None:
    marks = [True, True, False, False, False, False]
    subsets = list(combinations(marks, k))
    assert pass_at_k(2, k, samples=6) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("correct", "k", "expected"), [(0, 256, 0.0), (256, 1, 1.0), (1, 256, 1.0), (64, 1, 0.25)])
def test_pass_at_k_at_its_ends(correct: int, k: int, expected: float) -> None:
    assert pass_at_k(correct, k) == expected

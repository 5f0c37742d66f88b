"""How many different correct answers a policy gives, and how soon it gives one: counted on samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

SAMPLES = 256
PASS_AT = (1, 4, 16, 64, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Of the samples of one prompt: how many different correct answers, and how many correct samples."""

    distinct: int
    correct: int


def count(probabilities: Sequence[float], correct: NDArray[np.bool_], generator: np.random.Generator) -> Coverage:
    """Draw `SAMPLES` outcomes. A policy whose outcomes are all enumerated is sampled exactly by drawing from that list."""
    p = np.asarray(probabilities, dtype=np.float64)
    drawn = generator.multinomial(SAMPLES, p / p.sum())
    return Coverage(distinct=int((drawn[correct] > 0).sum()), correct=int(drawn[correct].sum()))


def pass_at_k(correct: int, k: int, samples: int = SAMPLES) -> float:
    """Probability that one of k samples, drawn without replacement from these, is correct: `1 - C(n - c, k) / C(n, k)`, which is unbiased."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)

"""Sums as text: a prompt such as `12=` asks for a sum of one to three digits; 9 + 81 + 729 answers can be enumerated.

The reward is verifiable, 1 for a correct sum and 0 otherwise, and every distinct correct answer counts as a mode, so the
number of modes found is the number of solutions that the policy covers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

TARGETS = (6, 9, 12, 15)
LONGEST = 3  # digits in a sum
MALFORMED_REWARD = 0.0
RIGHT_WEIGHT = 4.0  # the base model writes a right answer this much more often than a wrong one: it half knows how to add
QUESTION = re.compile(r"([0-9]+)=")
ANSWER = re.compile(rf"[1-9](\+[1-9]){{0,{LONGEST - 1}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """The task as the oracle and the base model see it."""

    name: str = "sums"
    malformed_reward: float = MALFORMED_REWARD
    grid_shape: tuple[int, int] | None = None

    def prompts(self) -> list[str]:
        return [f"{target}=" for target in TARGETS]

    def completions(self, prompt: str) -> list[str]:
        """Every answer, the shortest first."""
        return ["+".join(digits) for length in range(1, LONGEST + 1) for digits in product("123456789", repeat=length)]

    def rewards(self, prompt: str) -> list[float]:
        return [_score(prompt, completion) for completion in self.completions(prompt)]

    def base_weights(self, prompt: str) -> list[float]:
        return [RIGHT_WEIGHT if value else 1.0 for value in self.rewards(prompt)]

    def modes(self, prompt: str) -> list[list[int]]:
        """One mode per distinct correct answer."""
        return [[index] for index, value in enumerate(self.rewards(prompt)) if value == 1.0]


def reward(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any) -> list[float | None]:
    """1 for a correct sum, 0 for a wrong one and for text that is no sum."""
    return [_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    question = QUESTION.fullmatch(prompt)
    if question is None:
        raise ValueError(f"prompt {prompt!r} asks for no sum; it must look like '12='")
    if ANSWER.fullmatch(completion) is None:
        return MALFORMED_REWARD
    return float(sum(int(digit) for digit in completion.split("+")) == int(question[1]))

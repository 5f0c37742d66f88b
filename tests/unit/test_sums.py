import pytest

from ftb_llm.errors import ConfigError
from ftb_llm.tasks import get_task
from ftb_llm.tasks.sums import TARGETS, reward

SUMS = get_task("sums")


def test_enumeration_has_every_sum_of_up_to_three_digits_once() -> None:
    texts = SUMS.completions("12=")
    assert len(texts) == len(set(texts)) == 9 + 81 + 729
    assert texts[0] == "1"
    assert texts[9] == "1+1"
    assert texts[-1] == "9+9+9"


def test_right_and_wrong_sums() -> None:
    assert reward(["12=", "12=", "12=", "6=", "6="], ["3+4+5", "3+9", "3+4", "6", "7"]) == [1.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("text", ["", "12", "3+", "+9+3", "3+4+5+0", "3 + 9", "3+9 ", "0+3+9", "1+2+3+6", "3+9\n", "3=9", "a"])
def test_malformed_text_gets_nothing(text: str) -> None:
    assert reward(["12="], [text]) == [0.0]


@pytest.mark.parametrize("target", TARGETS)
def test_reward_and_modes_agree_with_the_enumeration(target: int) -> None:
    prompt = f"{target}="
    texts, rewards = SUMS.completions(prompt), SUMS.rewards(prompt)
    assert reward([prompt] * len(texts), texts, None) == rewards
    right = [index for index, text in enumerate(texts) if eval(text) == target]  # texts are our own digits and plus signs
    assert SUMS.modes(prompt) == [[index] for index in right]
    assert sum(rewards) == len(right)


def test_known_number_of_solutions() -> None:
    assert len(SUMS.modes("6=")) == 1 + 5 + 10
    assert len(SUMS.modes("12=")) == 7 + 52
    assert len(SUMS.modes("15=")) == 4 + 61


def test_prompt_must_ask_for_a_sum() -> None:
    with pytest.raises(ValueError, match="'twelve=' asks for no sum; it must look like '12='"):
        reward(["twelve="], ["3+9"])


def test_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match="'chess' is no built-in task; the tasks are hypergrid, sums"):
        get_task("chess")

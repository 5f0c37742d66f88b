import math
import subprocess
import sys

import pytest

from ftb_llm.tasks import get_task
from ftb_llm.tasks.hypergrid import LANDSCAPES, SIDE, landscape, reward

HYPERGRID = get_task("hypergrid")


def test_unmoved_landscape_has_the_known_log_partition_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LANDSCAPES, "centre:", (0, 0))
    total = sum(landscape("centre:", row, column) for row in range(SIDE) for column in range(SIDE))
    assert math.log(total) == pytest.approx(5.3034, abs=5e-5)  # published for side 32, two dimensions, R0 = 0.001


@pytest.mark.parametrize("prompt", LANDSCAPES)
def test_landscape_takes_three_values(prompt: str) -> None:
    values = HYPERGRID.rewards(prompt)
    assert set(values) == {0.001, 0.501, 2.501}
    assert values.count(2.501) == 36
    assert values.count(0.501) > 100


@pytest.mark.parametrize("prompt", LANDSCAPES)
def test_four_whole_separate_modes_away_from_the_border(prompt: str) -> None:
    modes = [[divmod(index, SIDE) for index in mode] for mode in HYPERGRID.modes(prompt)]
    assert len(modes) == 4
    for cells in modes:
        rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
        assert sorted(cells) == [(row, column) for row in rows for column in columns]
        assert rows == list(range(rows[0], rows[0] + 3))
        assert columns == list(range(columns[0], columns[0] + 3))
        assert rows[0] > 0
        assert columns[0] > 0
        assert rows[-1] < SIDE - 1
        assert columns[-1] < SIDE - 1
    apart = [max(abs(a - c), abs(b - d)) for one in modes for other in modes if one is not other for a, b in one for c, d in other]
    assert min(apart) > 10


def test_landscapes_are_moved_towards_the_side_they_name() -> None:
    assert landscape("north:", 2, 5) == landscape("south:", 8, 5) == 2.501
    assert landscape("west:", 5, 2) == landscape("east:", 5, 8) == 2.501
    assert landscape("south:", 2, 5) == landscape("east:", 5, 2) == 0.001
    assert len({tuple(HYPERGRID.rewards(prompt)) for prompt in LANDSCAPES}) == 4


@pytest.mark.parametrize("prompt", LANDSCAPES)
def test_reward_of_text_agrees_with_the_enumeration(prompt: str) -> None:
    texts = HYPERGRID.completions(prompt)
    assert len(set(texts)) == SIDE * SIDE
    assert texts[3 * SIDE + 17] == "03 17"
    assert reward([prompt] * len(texts), texts, None, some_column=["x"] * len(texts)) == HYPERGRID.rewards(prompt)


@pytest.mark.parametrize(
    "text", ["", "17", "17 ", "17 5", " 17 05", "17 05 ", "17 05 05", "32 00", "00 99", "17  05", "1705", "aa bb", "-1 05", "17 05\n", "१७ ०५"]
)
def test_malformed_text_gets_the_constant_low_reward(text: str) -> None:
    assert reward(["north:"], [text], [[1, 2]]) == [0.0]
    assert HYPERGRID.malformed_reward == 0.0 < min(HYPERGRID.rewards("north:"))


@pytest.mark.parametrize("text", ["17 05", "nonsense"])
def test_unknown_prompt_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="'up:' names no hypergrid landscape; the landscapes are north:, east:"):
        reward(["up:"], [text])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="shorter"):
        reward(["north:", "north:"], ["17 05"])


def test_reward_needs_no_torch() -> None:
    code = "import sys, ftb_llm.tasks.hypergrid, ftb_llm.tasks.base_model; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

import pytest
import torch

from learner.log_z import LogZTable


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_new_prompt_starts_from_its_groups_normalisers() -> None:
    table = LogZTable()
    assert table.lookup([4, 7, 4], tensor(1.0, 2.0, 3.0)).tolist() == [1.0, 2.0, 3.0]
    table.update([4, 7, 4], tensor(1.0, 2.0, 3.0), tensor(0.0, 0.0, 0.0), rate=0.5)
    assert table.lookup([7, 4, 9], tensor(0.0, 0.0, 5.0)).tolist() == [2.0, 2.0, 5.0]


def test_it_moves_down_the_mean_slope_of_the_prompts_groups() -> None:
    table = LogZTable()
    table.load_state({"target": [0.5, False], "values": {"4": 1.0}})
    table.update([4, 4], tensor(1.0, 1.0), tensor(0.4, 0.2), rate=0.5)
    assert table.state()["values"] == {"4": pytest.approx(0.85)}


def test_a_huge_slope_moves_it_by_at_most_the_rate() -> None:
    table = LogZTable()
    table.load_state({"target": None, "values": {"1": 0.0, "2": 0.0}})
    table.update([1, 2], tensor(0.0, 0.0), tensor(1e300, -1e300), rate=0.5)
    assert table.state()["values"] == {"1": -0.5, "2": 0.5}


def test_looking_up_learns_nothing() -> None:
    table = LogZTable()
    table.lookup([1], tensor(3.0))
    assert table.state()["values"] == {}


@pytest.mark.parametrize("other", [(0.1, False), (0.5, True)])
def test_values_belong_to_one_target(other: tuple[float, bool]) -> None:
    table = LogZTable()
    table.use(0.5, False)
    table.update([1], tensor(3.0), tensor(0.0), rate=0.5)
    again = LogZTable()
    again.load_state(table.state())
    again.use(0.5, False)
    assert again.lookup([1], tensor(9.0)).tolist() == [3.0]
    again.use(*other)
    assert again.lookup([1], tensor(9.0)).tolist() == [9.0]

import torch

from ftb_llm.bench.losses import losses_table, measure_losses, median_ms
from ftb_llm.divergences import FAMILY


def test_every_member_is_timed_and_the_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    rows = measure_losses()
    assert torch.get_num_threads() == threads
    assert {*FAMILY, "alpha", "all"} == {row["divergence"] for row in rows}
    assert all(list(row)[:3] == ["divergence", "alpha", "ms"] and 0 < row["ms"] < 10_000 for row in rows)
    assert [(row["groups"], row["group_size"]) for row in rows[:1]] == [(4096, 16)]
    labels = [line[0] for line in losses_table(rows).rows]
    assert {"reverse_kl", "alpha:0.75", "tv:0.1", "all shadow divergences of a step"} <= set(labels)


def test_the_median_is_of_the_calls_after_the_first_two() -> None:
    calls = []
    assert median_ms(lambda: calls.append(None)) < 1
    assert len(calls) == 52

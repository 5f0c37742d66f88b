from ftb_llm.bench.tables import Table, cell, divergences_tables, staleness_tables
from ftb_llm.bench.trials import Row
from tests.bench_results import rows


def test_a_cell_is_the_mean_and_the_spread_over_the_seeds() -> None:
    values: list[Row] = [{"exact_tv": value, "error": None} for value in (0.01, 0.02, 0.06)]
    assert cell(values, "exact_tv", 3) == "0.030 ± 0.026"
    assert cell(values[:1], "exact_tv", 3) == "0.010"
    values[1]["error"] = "step 5: bad"
    assert cell(values, "exact_tv", 3) == "0.030 ± 0.026 (1 broke off)"


def test_staleness_is_objectives_by_lags() -> None:
    tv, coverage = staleness_tables(rows())
    assert tv.title == "Final exact TV, hypergrid"
    assert tv.rows[0] == ["objective", "lag 0", "lag 50"]
    assert tv.rows[1] == ["hellinger", "0.020 ± 0.014", "0.520 ± 0.014"]
    assert coverage.title == "Distinct correct answers in 256 samples, hypergrid (the target: 36.0)"
    assert coverage.rows[2] == ["grpo", "30.5 ± 0.7", "30.5 ± 0.7"]


def test_divergences_have_every_number_per_lag() -> None:
    on, off = divergences_tables(rows(seeds=1))
    assert on.title == "hypergrid, on-policy (target: reward 2.100, 16 modes, coverage 36.0)"
    assert off.title.startswith("hypergrid, 50 steps off-policy")
    assert on.rows[:2] == [["objective", "exact TV", "JSD", "reward", "modes", "coverage"], ["hellinger", "0.010", "0.0020", "2.000", "15.0", "30.0"]]


def uneven() -> list[Row]:
    """All rows in reverse, but for grpo's at lag 0."""
    return [row for row in reversed(rows(seeds=1)) if (row["name"], row["lag"]) != ("grpo", 0)]


def test_a_missing_cell_is_a_dash_and_the_order_is_that_of_the_request() -> None:
    tv, _ = staleness_tables(uneven(), ["hellinger", "js", "grpo"])
    assert tv.rows == [["objective", "lag 0", "lag 50"], ["hellinger", "0.010", "0.510"], ["grpo", "–", "0.510"]]
    on, off = divergences_tables(uneven(), ["hellinger", "grpo"])
    assert on.title.startswith("hypergrid, on-policy")
    assert on.rows[2] == ["grpo", "–", "–", "–", "–", "–"]
    assert [line[0] for line in off.rows[1:]] == ["hellinger", "grpo"]


def test_objectives_that_nobody_asked_for_come_last() -> None:
    assert [line[0] for line in staleness_tables(rows(), ["grpo"])[0].rows[1:]] == ["grpo", "hellinger"]


def test_markdown() -> None:
    assert Table(title="T", rows=[["a", "b"], ["1", "2"]]).markdown() == "### T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"

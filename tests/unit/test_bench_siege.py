"""The siege's arithmetic, on a run whose numbers are written by hand."""

import pytest

from ftb_llm.bench.attacks import Outcome
from ftb_llm.bench.honest import Asked
from ftb_llm.bench.siege import (
    Assault,
    Evidence,
    Stretch,
    expected_steps,
    memory_growth_mb,
    place,
    ratios,
    row_of,
    siege_tables,
    steps_between,
    summary,
)

# Two steps a second from 100 to 110, one a second from 110 to 120, then two again.
STEPS = [*(100 + i / 2 for i in range(20)), *(110.0 + i for i in range(10)), *(120 + i / 2 for i in range(60))]
MACHINE = {"cores": 2, "date": "2026-01-02T03:04:05+00:00"}


def stretch(begin: float, end: float, cpu_seconds: float = 0.0) -> Stretch:
    return Stretch(begin=begin, end=end, cpu_seconds=cpu_seconds)


def an_assault(outcome: Outcome | None = None) -> Assault:
    return Assault(
        attack="idle",
        before=stretch(102, 108, 0.6),
        on_run=stretch(110, 120, 5.0),
        between=stretch(121, 127, 0.6),
        on_sink=stretch(127, 137, 1.0),
        after=stretch(137, 143, 0.6),
        outcome=outcome,
        cores_on_sink=0.1,
    )


def evidence() -> Evidence:
    asked = [
        Asked(what="GET /healthz", at=103.0, seconds=0.002),
        Asked(what="GET /healthz", at=112.0, seconds=0.004),
        Asked(what="GET /healthz", at=118.0, seconds=0.5, problem="TimeoutError: timed out"),
        Asked(what="GET /v1/status", at=122.0, seconds=0.004),
    ]
    memory = [(109.0, 100_000_000), (115.0, 130_000_000), (122.0, 105_000_000), (130.0, 900_000_000)]
    return Evidence(steps=STEPS, memory=memory, asked=asked)


def test_a_step_under_way_counts_for_the_part_that_lies_in_the_stretch() -> None:
    assert place([10.0, 12.0], 9.0) == 0
    assert place([10.0, 12.0], 10.5) == pytest.approx(1.25)
    assert place([10.0, 12.0], 13.0) == 2
    assert steps_between([10.0, 12.0, 14.0], 11.0, 12.5) == pytest.approx(0.75)


def test_a_run_that_died_takes_no_steps_any_more() -> None:
    assert steps_between([1.0, 2.0, 3.0], 5.0, 9.0) == 0


def test_what_is_expected_is_the_rate_of_the_quiet_stretches_on_both_sides() -> None:
    assert expected_steps(STEPS, stretch(110, 120), stretch(102, 108)) == pytest.approx(20)
    assert expected_steps(STEPS, stretch(127, 137), stretch(102, 108), stretch(112, 118)) == pytest.approx(15)


def test_memory_grows_from_what_was_held_before() -> None:
    samples = [(1.0, 50_000_000), (2.0, 40_000_000), (3.0, 45_000_000), (4.0, 90_000_000)]
    assert memory_growth_mb(samples, 2.5, 3.5) == pytest.approx(5)
    assert memory_growth_mb(samples, 0.5, 1.5) is None
    assert memory_growth_mb(samples, 5.0, 6.0) is None


def test_a_row_has_the_attack_beside_the_quiet_and_the_sink() -> None:
    row = row_of(an_assault(Outcome(opened=1100, closed=972, held=200, sent_bytes=3_000_000, most_bytes=20_000, cpu_seconds=0.5)), evidence())
    assert row["step_rate_ratio"] == pytest.approx(0.5)
    assert row["step_rate_ratio_sink"] == pytest.approx(1)
    assert row["step_rate_ratio_to_sink"] == pytest.approx(0.5)
    assert row["memory_growth_mb"] == pytest.approx(30)
    assert (row["honest_requests"], row["honest_failures"]) == (3, 1)
    assert row["honest_problems"] == ["GET /healthz: TimeoutError: timed out"]
    assert row["honest_quiet_ms"] == pytest.approx(2) and row["honest_ms"] == pytest.approx(4) and row["honest_worst_ms"] == pytest.approx(500)
    assert (row["server_cores"], row["server_cores_quiet"]) == pytest.approx((0.5, 0.1))
    assert row["attacker_cores"] == pytest.approx(0.05)
    assert (row["opened"], row["closed"], row["broken_off"]) == (1100, 972, False)


def test_an_attack_that_was_broken_off_has_no_numbers_of_the_attacker() -> None:
    row = row_of(an_assault(None), evidence())
    assert row["broken_off"] and row["opened"] is None and row["attacker_cores"] is None
    assert row["step_rate_ratio"] == pytest.approx(0.5)


def test_without_steps_there_is_no_ratio() -> None:
    found = ratios([{"steps": 0, "steps_expected": 0, "steps_on_sink": 0, "steps_on_sink_expected": 0}])
    assert set(found.values()) == {None}


def test_the_summary_weighs_attacks_by_their_steps_and_takes_the_worst_memory() -> None:
    one = row_of(an_assault(Outcome()), evidence())
    other = one | {"steps": 60.0, "steps_expected": 60.0, "memory_growth_mb": 1.0, "honest_failures": 0}
    found = summary([one, other], ["the run with a token did not survive: reason"])
    assert found["step_rate_ratio"] == pytest.approx(70 / 80)
    assert found["memory_growth_mb"] == pytest.approx(30)
    assert (found["honest_requests"], found["honest_failures"]) == (6, 1)
    assert found["runs_lost"] == ["the run with a token did not survive: reason"]


def test_the_tables_have_a_line_per_attack_and_the_headlines() -> None:
    rows = [{"mode": mode} | row_of(an_assault(outcome), evidence()) for mode, outcome in (("without a token", Outcome(opened=7)), ("with a token", None))]
    attacks, short = siege_tables(summary(rows, []) | {"rows": rows, "machine": MACHINE})
    assert attacks.title == "A live run under attack (2 cores, 2026-01-02)"
    assert [line[:3] for line in attacks.rows[1:]] == [["without a token", "idle", "7"], ["with a token", "idle", "–"]]
    assert ["step rate, attacked to quiet", "0.500", "above 0.95"] in [list(line) for line in short.rows]
    assert {len(line) for line in attacks.rows} == {len(attacks.rows[0])}

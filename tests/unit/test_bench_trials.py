import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ftb_llm.bench.spec import TrialResult, TrialSpec
from ftb_llm.bench.trials import ROWS, grid, measure, remaining
from ftb_llm.errors import InvalidConfig, SetupError
from tests.bench_results import a_result

LINES: list[str] = []


class Trials:
    """Results without training; what was asked for is kept. Interrupted after `limit`."""

    def __init__(self, limit: int = 1000) -> None:
        self.asked: list[TrialSpec] = []
        self._limit = limit

    def __call__(self, specs: Sequence[TrialSpec]) -> Iterator[TrialResult]:
        for spec in specs:
            if len(self.asked) == self._limit:
                raise KeyboardInterrupt
            self.asked.append(spec)
            yield replace(a_result(spec.objective), spec=spec, error="step 3: bad" if spec.objective == "tv" else None)


def specs() -> list[TrialSpec]:
    return grid(tasks=["sums"], objectives=["js", "tv"], lags=[0, 4], seeds=[0, 1], settings=lambda name: [f"objective.beta={len(name)}"])


def test_the_grid_is_every_combination() -> None:
    assert [(spec.objective, spec.lag, spec.seed) for spec in specs()] == [(name, lag, seed) for name in ("js", "tv") for lag in (0, 4) for seed in (0, 1)]
    assert {spec.settings for spec in specs()} == {("objective.beta=2",)}


def test_a_wrong_setting_is_found_before_anything_runs() -> None:
    with pytest.raises(InvalidConfig, match=r"^objective\.beta: "):
        grid(tasks=["sums"], objectives=["js"], lags=[0], seeds=[0], settings=lambda name: ["objective.beta=-1"])


def test_a_trial_rejects_no_groups() -> None:
    with pytest.raises(InvalidConfig, match=r"^objective\.truncated: reject is for runs, .*; in trials it should be keep or mask$"):
        grid(tasks=["sums"], objectives=["js"], lags=[0], seeds=[0], settings=lambda name: ["objective.truncated=reject"])


def test_rows_come_in_the_order_of_the_grid_whatever_the_order_of_the_runs(tmp_path: Path) -> None:
    trials, lines = Trials(), list[str]()
    rows = measure(specs(), folder=tmp_path, run=trials, say=lines.append)
    assert [spec.seed for spec in trials.asked] == [0] * 4 + [1] * 4  # a whole table with one seed comes first
    assert [row["key"] for row in rows] == [spec.key() for spec in specs()]
    assert lines[0] == f"8 trials to run, 0 found in {tmp_path / ROWS}"
    assert lines[1].startswith("1/8 sums js lag 0 seed 0: exact TV 0.0300, 45 s; about 0 min left")
    assert lines[-1] == "8/8 sums tv lag 4 seed 1: exact TV 0.0300, 45 s, broke off: step 3: bad; done"


def test_an_interrupted_bench_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(specs(), folder=tmp_path, run=Trials(limit=3), say=LINES.append)
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"key": "torn')
    trials = Trials()
    rows = measure(specs(), folder=tmp_path, run=trials, say=LINES.append)
    assert len(trials.asked) == 5
    assert [row["key"] for row in rows] == [spec.key() for spec in specs()]
    kept = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert sorted(row["key"] for row in kept) == sorted(spec.key() for spec in specs())


def test_other_settings_are_other_trials(tmp_path: Path) -> None:
    measure(specs(), folder=tmp_path, run=Trials(), say=LINES.append)
    trials = Trials()
    others = [replace(spec, settings=("objective.beta=0.3",)) for spec in specs()]
    assert len(measure(others, folder=tmp_path, run=trials, say=LINES.append)) == len(trials.asked) == 8


def test_a_folder_that_can_not_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=f"^--out: {tmp_path / 'file'} can't be written: File exists$"):
        measure(specs(), folder=tmp_path / "file", run=Trials(), say=LINES.append)


@pytest.mark.parametrize(
    ("seconds", "done", "total", "told"), [(60, 1, 3, "about 2 min left"), (3600, 1, 4, "about 3.0 h left"), (5, 4, 4, "done"), (100, 2, 2, "done")]
)
def test_the_time_left_is_at_the_pace_so_far(seconds: float, done: int, total: int, told: str) -> None:
    assert remaining(seconds, done, total) == told

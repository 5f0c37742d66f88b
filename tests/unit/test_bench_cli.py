import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ftb_llm import inputs, launch
from ftb_llm.bench.spec import TrialResult, TrialSpec
from ftb_llm.cli.main import main
from tests.bench_results import a_result

SMALL = ["--tasks", "sums", "--objectives", "js,tv", "--lags", "0,4", "--seeds", "0,1"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrialSpec]:
    """The trials that were asked for; they are not run, and no base model is built."""
    specs: list[TrialSpec] = []

    def run_trials(some: Sequence[TrialSpec], *, jobs: int) -> Iterator[TrialResult]:
        for spec in some:
            specs.append(spec)
            yield replace(a_result(spec.objective), spec=spec)

    monkeypatch.setattr(launch, "run_trials", run_trials)
    monkeypatch.setattr(inputs, "built", lambda task, progress: None)
    return specs


@pytest.mark.parametrize("name", ["staleness", "divergences"])
def test_a_bench_of_trials_prints_tables_and_writes_its_files(name: str, asked: list[TrialSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["bench", name, *SMALL, "--out", str(out)]) == 0
    assert len(asked) == 8
    printed = capsys.readouterr().out
    assert "objective" in printed
    assert "0.030 ± 0.000" in printed
    assert sorted(path.name for path in out.iterdir()) == ["plot.svg", "rows.json", "rows.jsonl", "table.md"]
    rows = json.loads((out / "rows.json").read_text())
    assert [(row["name"], row["lag"], row["seed"]) for row in rows] == [(member, lag, seed) for member in ("js", "tv") for lag in (0, 4) for seed in (0, 1)]


def test_json_is_the_list_of_rows(asked: list[TrialSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "staleness", *SMALL, "--json", "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert json.loads(first) == json.loads((tmp_path / "rows.json").read_text())
    asked.clear()
    assert main(["bench", "divergences", *SMALL, "--json", "--out", str(tmp_path)]) == 0
    assert asked == []  # the rows are there
    assert capsys.readouterr().out == first


def test_settings_go_to_all_or_to_one_objective(asked: list[TrialSpec], tmp_path: Path) -> None:
    words = ["--steps", "7", "objective.beta=0.3", "--set", "tv:learner.learning_rate=0.001", "--out", str(tmp_path)]
    assert main(["bench", "staleness", *SMALL, *words]) == 0
    assert {spec.settings for spec in asked if spec.objective == "js"} == {("objective.beta=0.3", "run.max_steps=7")}
    assert {spec.settings for spec in asked if spec.objective == "tv"} == {("objective.beta=0.3", "run.max_steps=7", "learner.learning_rate=0.001")}


def test_ctrl_c_keeps_the_rows_and_exits_with_130(asked: list[TrialSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(run: Callable[..., Iterator[TrialResult]]) -> Callable[..., Iterator[TrialResult]]:
        def run_some(some: Sequence[TrialSpec], *, jobs: int) -> Iterator[TrialResult]:
            yield from run(some[:3], jobs=jobs)
            raise KeyboardInterrupt

        return run_some

    monkeypatch.setattr(launch, "run_trials", interrupted(launch.run_trials))
    assert main(["bench", "staleness", *SMALL, "--out", str(tmp_path)]) == 130
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("words", "code"), [(["bench"], 2), (["bench", "--help"], 0), (["bench", "-h"], 0)])
def test_bench_alone_lists_its_commands(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "usage: ftb-llm bench COMMAND [ARGUMENTS]"
    assert [" ".join(line.split()[:2]) for line in lines if line.startswith("  ")] == [
        "bench staleness",
        "bench divergences",
        "bench losses",
        "bench quickstart",
        "bench learner",
        "bench ranks",
        "bench gpu",
        "bench siege",
        "bench families",
    ]
    assert printed.err == ""


def test_a_custom_member_is_loaded_before_any_trial_starts(asked: list[TrialSpec], tmp_path: Path) -> None:
    assert main(["bench", "staleness", *SMALL, "objective.custom=nope:x", "--out", str(tmp_path)]) == 2
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_tables_follow_the_request_and_lags_rise(asked: list[TrialSpec], tmp_path: Path) -> None:
    words = ["--tasks", "sums", "--objectives", "tv,grpo,js", "--lags", "50,0,4", "--seeds", "0", "--out", str(tmp_path)]
    assert main(["bench", "staleness", *words]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert lines[0] == ["objective", "lag 0", "lag 4", "lag 50"]
    assert [line[0] for line in lines[2:5]] == ["tv", "grpo", "js"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "chess"], "no command 'bench chess'; see ftb-llm bench --help"),
        (["bench", "siege", "--attacks", "flood"], "argument --attacks: flood is no attack; the attacks are headers, one-header, idle, slow"),
        (["bench", "siege", "objective.bet=1"], "objective.bet: unknown setting; did you mean objective.beta?"),
        (["bench", "ranks", "--size", "huge"], "argument --size: huge is no size; the sizes are tiny, small, large"),
        (["bench", "ranks", "--ranks", "1,9"], "argument --ranks: 9 is wrong: a step has 8 groups to share, so it should be 1 to 8"),
        (["bench", "ranks", "--ranks", "0"], "argument --ranks: 0 is wrong: a step has 8 groups to share, so it should be 1 to 8"),
        (["bench", "staleness", "--tasks", "chess"], "argument --tasks: chess is no task; the tasks are hypergrid, sums"),
        (["bench", "staleness", "--objectives", "js,hel"], "--objectives: hel: 'hel' is no objective; the objectives are reverse_kl, forward_kl,"),
        (["bench", "staleness", "--lags", "0,x"], "argument --lags: '0,x' is wrong: it should be different whole numbers from 0, separated by commas"),
        (["bench", "staleness", "--seeds", "1,1"], "argument --seeds: '1,1' is wrong: it should be different whole numbers from 0, separated by commas"),
        (["bench", "divergences", "--jobs", "0"], "argument --jobs: 0 is wrong: it should be a whole number from 1"),
        (["bench", "staleness", "--objectives", "js", "--set", "tv:a=1"], "argument --set: tv:a=1 is wrong: it should be NAME:KEY=VALUE with a NAME among js"),
        (["bench", "staleness", "--set", "js:run.seed=1"], "run.seed: can't be set here; it is set by --seeds"),
        (["bench", "staleness", "learner.cpu=1"], "learner.cpu: unknown setting; did you mean learner.cpus?"),
        (["bench", "staleness", "--objectives", "custom", "objective.custom=nope:x"], "objective.custom: nope:x can't be imported: ModuleNotFoundError"),
        (["bench", "staleness", "--objectives", "grpo+tempered"], "--objectives: grpo+tempered: grpo goes with no +tempered; only a divergence does"),
        (["bench", "quickstart", "--config", "configs/quickstart.yaml", "--out", "/dev/null/x"], "--out: /dev/null/x/runs can't be written: Not a directory"),
        (["bench", "learner", "--sizes", "huge"], "argument --sizes: huge is no size; the sizes are tiny, small, large, vocabulary"),
        (["bench", "quickstart", "--config", "no.yaml"], "config file no.yaml can't be read: No such file or directory"),
    ],
)
def test_the_users_mistakes_are_one_clear_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ftb-llm: error: {message}")

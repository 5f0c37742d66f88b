from dataclasses import replace
from pathlib import Path

import pytest

from ftb_llm.bench.spec import BASELINES, MEMBERS, SET_IN_RUNS, SET_IN_TRIALS, TASK_SETTINGS, TrialSpec, check_words, objective_settings
from ftb_llm.config import load_config
from ftb_llm.config.schema import DIVERGENCES, OBJECTIVES
from ftb_llm.errors import InvalidConfig
from tests.bench_results import a_result

CONFIGS = {"hypergrid": "quickstart.yaml", "sums": "sums.yaml"}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("task", TASK_SETTINGS)
def test_a_trial_has_the_settings_of_the_shipped_config(task: str) -> None:
    """Those of the engine and of the pushes don't matter to it, and how often it is judged changes nothing."""
    shipped = load_config([ROOT / "configs" / CONFIGS[task]])
    config = TrialSpec(task=task, objective=shipped.objective.divergence.name).config()
    for section in ("model", "data", "rewards", "objective", "sampling", "learner", "run"):
        assert getattr(config, section) == getattr(shipped, section), section


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hellinger", {"kind": "ftb", "divergence": {"name": "hellinger"}}),
        ("alpha:0.75", {"kind": "ftb", "divergence": {"name": "alpha", "alpha": 0.75}}),
        ("tv:0.1", {"kind": "ftb", "divergence": {"name": "tv", "width": 0.1}}),
        ("grpo", {"kind": "grpo", "divergence": {"name": "reverse_kl"}}),
        ("importance", {"kind": "importance", "divergence": {"name": "reverse_kl"}}),
        ("importance:forward_kl", {"kind": "importance", "divergence": {"name": "forward_kl"}}),
        ("importance:alpha:0.5", {"kind": "importance", "divergence": {"name": "alpha", "alpha": 0.5}}),
        ("hellinger+tempered", {"kind": "ftb", "divergence": {"name": "hellinger"}, "tempered": True}),
        ("reverse_kl+learned", {"kind": "ftb", "divergence": {"name": "reverse_kl"}, "log_z": "learned"}),
    ],
)
def test_a_name_stands_for_an_objective(name: str, settings: dict[str, object]) -> None:
    assert objective_settings(name) == settings
    assert TrialSpec(task="sums", objective=name).config().objective.kind == settings["kind"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helinger", "'helinger' is no objective; the objectives are reverse_kl, forward_kl"),
        ("alpha:much", "'much' is no number"),
        ("hellinger:2", "hellinger takes no number; write alpha:0.75 or tv:0.1"),
        ("grpo:tv", "grpo goes with no divergence"),
        ("tv+fast", "'fast' is no form; the forms are +tempered, +learned"),
        ("grpo+tempered", "grpo goes with no +tempered; only a divergence does"),
        ("importance:js+learned", "importance goes with no +learned; only a divergence does"),
    ],
)
def test_a_wrong_name_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        objective_settings(name)
    assert str(caught.value).startswith(f"--objectives: {name}: {message}")


def test_every_objective_is_in_the_bench() -> None:
    assert {name.split(":")[0] for name in MEMBERS} == set(DIVERGENCES)
    assert {"ftb", *BASELINES} == set(OBJECTIVES)


def test_the_key_is_that_of_the_settings() -> None:
    spec = TrialSpec(task="sums", objective="js", lag=1, seed=1)
    assert spec.key() == replace(spec).key()
    changes = [{"task": "hypergrid"}, {"objective": "tv"}, {"lag": 4}, {"seed": 2}, {"settings": ("run.max_steps=9",)}]
    assert len({spec.key(), *(replace(spec, **change).key() for change in changes)}) == 6


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("run.seed=1", "run.seed"),
        ("run={seed: 1}", "run.seed"),
        ("objective.divergence.name=tv", "objective.divergence.name"),
        ("objective.divergence={name: tv}", "objective.divergence.name"),
        ("objective.kind=grpo", "objective.kind"),
        ("data.path=x.jsonl", "data.path"),
        ("staleness.max_steps=3", "staleness.max_steps"),
    ],
)
def test_what_the_bench_varies_can_not_be_set(word: str, key: str) -> None:
    with pytest.raises(InvalidConfig, match=f"^{key}: can't be set here; it is set by "):
        check_words(["learner.learning_rate=0.1", word], SET_IN_TRIALS)


def test_a_run_may_have_any_seed_but_its_name_is_the_benchs() -> None:
    check_words(["run.seed=1", "staleness.max_steps=3"], SET_IN_RUNS)
    with pytest.raises(InvalidConfig, match=r"^run\.name: can't be set here; it is set by --out$"):
        check_words(["run.name=mine"], SET_IN_RUNS)


def test_a_row_begins_with_the_agreed_columns() -> None:
    row = a_result("alpha:0.75").row()
    agreed = ["task", "objective", "divergence", "alpha", "lag", "seed", "steps", "exact_tv", "exact_jsd", "reward", "modes_found", "coverage"]
    assert list(row)[:12] == agreed
    assert [row[name] for name in agreed] == ["hypergrid", "ftb", "alpha", 0.75, 4, 2, 400, 0.03, 0.002, 2.0, 15, 33.5]
    assert row["name"] == "alpha:0.75"
    assert [point["step"] for point in row["curve"]] == [0, 400]


@pytest.mark.parametrize(("name", "divergence"), [("grpo", None), ("importance:forward_kl", "forward_kl"), ("hellinger+tempered", "hellinger")])
def test_a_row_names_the_divergence_that_was_minimised(name: str, divergence: str | None) -> None:
    row = a_result(name).row()
    assert (row["objective"], row["divergence"], row["alpha"]) == (name.split(":")[0] if name[:1] in "gi" else "ftb", divergence, None)

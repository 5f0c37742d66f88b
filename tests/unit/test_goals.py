"""Goals are for the built-in tasks as they are shipped."""

from pathlib import Path

import pytest
import yaml

from ftb_llm.config import build_config, load_config
from ftb_llm.goals import SHIPPED, is_as_shipped

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {"hypergrid": CONFIGS / "quickstart.yaml", "sums": CONFIGS / "sums.yaml"}


@pytest.mark.parametrize("task", SHIPPED)
def test_the_shipped_settings_are_those_of_the_files(task: str) -> None:
    assert SHIPPED[task] == yaml.safe_load(FILES[task].read_text(encoding="utf-8"))
    assert is_as_shipped(load_config([FILES[task]]))


@pytest.mark.parametrize(
    "word", ["run.name=mine", "run.seed=7", "control.port=9000", "objective.divergence=js", "checkpoint.every_steps=5", "eval.every_steps=50"]
)
def test_what_changes_no_goal(word: str) -> None:
    assert is_as_shipped(load_config([FILES["hypergrid"]], [word]))


@pytest.mark.parametrize(
    "word",
    [
        "run.max_steps=30",
        "objective.beta=0.1",
        "model.path=/models/mine",
        "data.path=mine.jsonl",
        "objective.kind=grpo",
        "learner.learning_rate=0.1",
        "actors.count=2",
    ],
)
def test_what_makes_it_a_run_of_ones_own(word: str) -> None:
    assert not is_as_shipped(load_config([FILES["hypergrid"]], [word]))


def test_the_defaults_are_no_shipped_task() -> None:
    assert not is_as_shipped(build_config({}))

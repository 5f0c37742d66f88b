from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftb_llm.tasks import get_task
from learner.learner import Learner
from tests import tiny_llama


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def make(path: Path, run_dir: Path, task_name: str | None) -> Learner:
    return Learner(tiny_llama.tiny_config(), model_path=path, run_dir=run_dir, prompts=tiny_llama.PROMPTS, task_name=task_name)


def test_without_an_oracle_there_is_no_report(path: Path, tmp_path: Path) -> None:
    assert make(path, tmp_path, None).evaluate(0, 0.5) is None


def test_the_policy_is_the_models_own_distribution(path: Path, tmp_path: Path) -> None:
    learner = make(path, tmp_path, "hypergrid")
    report = learner.evaluate(0, 0.5)
    assert report is not None
    task, tokenizer = get_task("hypergrid"), AutoTokenizer.from_pretrained(path)
    prompt = task.prompts()[1]
    completion = task.completions(prompt)[77]
    prompt_ids, ids = tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eos_token_id]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path)(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids).unsqueeze(-1)).sum().exp().item()
    assert report.policy[prompt][77] == pytest.approx(expected, rel=1e-3)
    assert report.step == 0
    assert report.metrics["eval/exact_tv"] > 0


def test_the_reference_stays_when_the_policy_moves(path: Path, tmp_path: Path) -> None:
    learner = make(path, tmp_path, "hypergrid")
    before = learner.evaluate(0, 0.5)
    for step in (1, 2, 3):
        learner.step(tiny_llama.step_request(step))
    after = learner.evaluate(3, 0.5)
    assert before is not None
    assert after is not None
    assert after.target == before.target
    assert after.policy != before.policy


def test_the_first_evaluation_may_come_after_training(path: Path, tmp_path: Path) -> None:
    """As in a resumed run: the reference is still the bare model."""
    early, late = make(path, tmp_path, "hypergrid"), make(path, tmp_path, "hypergrid")
    expected = early.evaluate(0, 0.5)
    late.step(tiny_llama.step_request(1))
    report = late.evaluate(1, 0.5)
    assert report is not None
    assert expected is not None
    assert report.target == expected.target

from pathlib import Path

import pytest
import torch

from ftb_llm.errors import WrongState
from learner.learner import Learner
from tests import tiny_llama


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    path = tiny_llama.build(tmp_path / "model")
    return Learner(tiny_llama.tiny_config(), model_path=path, run_dir=tmp_path, prompts=tiny_llama.PROMPTS, task_name=None)


def test_steps_are_taken_in_order_and_once(learner: Learner) -> None:
    assert learner.step(tiny_llama.step_request(1)).step == 1
    for wrong in (1, 3):
        with pytest.raises(WrongState, match=f"step {wrong} was asked for, but the last one taken is 1"):
            learner.step(tiny_llama.step_request(wrong))
    assert learner.step(tiny_llama.step_request(2)).step == 2


def test_a_version_is_the_step_it_was_taken_after(learner: Learner) -> None:
    learner.step(tiny_llama.step_request(1))
    with pytest.raises(WrongState, match="version 2 can't be published after step 1"):
        learner.publish(2)
    with pytest.raises(WrongState, match="a checkpoint of step 0 was asked for"):
        learner.save_checkpoint(0)


def test_logprobs_are_those_the_next_step_trains_on(learner: Learner) -> None:
    learner.step(tiny_llama.step_request(1))
    request = tiny_llama.step_request(2)
    values = learner.logprobs([scored.group for scored in request.groups])
    torch.testing.assert_close(torch.tensor(values), torch.tensor(learner.step(request).logp_GK), rtol=1e-6, atol=1e-6)


def test_info(learner: Learner) -> None:
    facts = learner.info()
    assert facts["step"] == 0
    assert facts["trainable_parameters"] > 0
    assert facts["parameters"] > facts["trainable_parameters"]
    assert facts["rss_bytes"] > 1e6
    assert facts["threads"] == 1
    assert facts["device"] == "cpu"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from ftb_llm.config import Config
from ftb_llm.errors import ConfigError, WrongState
from learner.learner import Learner
from learner.ray_actor import LearnerActor
from tests import tiny_llama

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def actor(path: Path, tmp_path: Path) -> Iterator[Any]:
    handle = start(path, tmp_path, tiny_llama.tiny_config())
    yield handle
    ray.kill(handle)


def start(path: Path, run_dir: Path, config: Config) -> Any:
    options = LearnerActor.options(num_cpus=1)  # type: ignore[attr-defined]
    return options.remote(config, model_path=path, run_dir=run_dir, prompts=tiny_llama.PROMPTS, task_name=None)


def test_the_actor_does_what_the_plain_class_does(actor: Any, path: Path, tmp_path: Path) -> None:
    plain = Learner(tiny_llama.tiny_config(), model_path=path, run_dir=tmp_path / "plain", prompts=tiny_llama.PROMPTS, task_name=None)
    for step in (1, 2):
        request = tiny_llama.step_request(step)
        assert tiny_llama.untimed(ray.get(actor.step.remote(request))) == tiny_llama.untimed(plain.step(request))
    groups = [scored.group for scored in tiny_llama.step_request(3).groups]
    assert ray.get(actor.logprobs.remote(groups)) == plain.logprobs(groups)
    reference, payload = ray.get(list(actor.publish.options(num_returns=2).remote(2)))
    expected_reference, expected_payload = plain.publish(2)
    assert payload == expected_payload
    assert (reference.version, reference.sha256, reference.canary) == (2, expected_reference.sha256, expected_reference.canary)
    assert (Path(reference.path) / "adapter_model.safetensors").read_bytes() == payload
    assert ray.get(actor.load_checkpoint.remote(ray.get(actor.save_checkpoint.remote(2)))) == 2
    assert ray.get(actor.evaluate.remote(2, 0.5)) is None
    assert ray.get(actor.info.remote())["step"] == 2


def test_errors_cross_as_themselves(actor: Any) -> None:
    with pytest.raises(WrongState, match="step 5 was asked for, but the last one taken is 0"):
        ray.get(actor.step.remote(tiny_llama.step_request(5)))
    assert ray.get(actor.info.remote())["step"] == 0


def test_what_is_wrong_with_the_model_reaches_the_first_caller(path: Path, tmp_path: Path) -> None:
    config = tiny_llama.tiny_config(model={"lora": {"targets": ["no_such_layer"]}})
    handle = start(path, tmp_path, config)
    with pytest.raises(ConfigError, match=r"model\.lora.targets: 'no_such_layer' names no module"):
        ray.get(handle.info.remote())
    ray.kill(handle)

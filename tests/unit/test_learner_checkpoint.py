import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ftb_llm.errors import CheckpointError
from ftb_llm.types import StepReport
from learner import checkpoint
from learner.learner import Learner
from tests import tiny_llama


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def make(path: Path, run_dir: Path, rank: int = 4) -> Learner:
    config = tiny_llama.tiny_config(model={"lora": {"rank": rank, "alpha": 8.0}}, checkpoint={"keep": 2}, learner={"micro_batch_tokens": 45})
    return Learner(config, model_path=path, run_dir=run_dir, prompts=tiny_llama.PROMPTS, task_name=None)


def train(learner: Learner, first: int, last: int, log_z: str = "batch") -> list[StepReport]:
    objective = replace(tiny_llama.step_request(1).objective, log_z=log_z)
    requests = [tiny_llama.step_request(step, seeds=(step, step + 1, step + 2), objective=objective) for step in range(first, last + 1)]
    return [tiny_llama.untimed(learner.step(request)) for request in requests]


@pytest.mark.parametrize("log_z", ["batch", "learned"])
def test_a_resumed_learner_goes_on_bit_for_bit(path: Path, tmp_path: Path, log_z: str) -> None:
    learner = make(path, tmp_path)
    train(learner, 1, 3, log_z)
    saved = learner.save_checkpoint(3)
    expected = train(learner, 4, 7, log_z)
    resumed = make(path, tmp_path / "other")
    assert resumed.load_checkpoint(saved) == 3
    assert train(resumed, 4, 7, log_z) == expected
    assert resumed.publish(7)[1] == learner.publish(7)[1]


def test_random_numbers_go_on(path: Path, tmp_path: Path) -> None:
    learner = make(path, tmp_path)
    random.gauss(0, 1)
    saved = learner.save_checkpoint(0)

    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.random()), float(torch.rand(()))

    expected = draw()
    draw()
    learner.load_checkpoint(saved)
    assert draw() == expected


def test_it_is_whole_named_and_pruned(path: Path, tmp_path: Path) -> None:
    learner = make(path, tmp_path)
    for step in (1, 2, 3):
        train(learner, step, step)
        assert learner.save_checkpoint(step) == str(tmp_path / "checkpoints" / f"step_{step:06d}")
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]


@pytest.mark.parametrize("name", [checkpoint.ADAPTER, checkpoint.OPTIMIZER, checkpoint.TORCH_RNG, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing"])
def test_a_torn_checkpoint_is_refused_and_changes_nothing(path: Path, tmp_path: Path, name: str, damage: str) -> None:
    learner = make(path, tmp_path)
    train(learner, 1, 1)
    file = Path(learner.save_checkpoint(1)) / name
    train(learner, 2, 2)
    before = learner.publish(2)[1]
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(data[:-1] if name != checkpoint.MANIFEST else data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint file .*/step_000001/.*(torn|can't be read)"):
        learner.load_checkpoint(str(file.parent))
    assert learner.publish(2)[1] == before


def test_a_checkpoint_of_another_shape_is_refused(path: Path, tmp_path: Path) -> None:
    saved = make(path, tmp_path, rank=2).save_checkpoint(0)
    with pytest.raises(CheckpointError, match="is of another run"):
        make(path, tmp_path).load_checkpoint(saved)


def test_another_format_is_refused(path: Path, tmp_path: Path) -> None:
    learner = make(path, tmp_path)
    manifest = Path(learner.save_checkpoint(0)) / checkpoint.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads format 1"):
        learner.load_checkpoint(str(manifest.parent))


def test_a_folder_that_is_not_there_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json can't be read: No such file"):
        make(path, tmp_path).load_checkpoint(str(tmp_path / "nowhere"))

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.merge import check_adapter, merged_weights
from ftb_llm.adapter_folder import open_adapter
from ftb_llm.types import AdapterRef
from learner import adapters
from learner.learner import Learner
from learner.logprobs import Scorer
from learner.packing import pack
from tests import tiny_llama

BATCH = pack([[5, 6], [9, 8, 7]], [[[4, 2, 0], [7, 0]], [[1], [60, 61]]])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def trained(path: Path, run_dir: Path, steps: int = 3, *, keep: int = 3, **lora: Any) -> Learner:
    config = tiny_llama.tiny_config(model={"lora": {"rank": 4, "alpha": 8.0} | lora}, checkpoint={"keep": keep})
    learner = Learner(config, model_path=path, run_dir=run_dir, prompts=tiny_llama.PROMPTS, task_name=None)
    for step in range(1, steps + 1):
        learner.step(tiny_llama.step_request(step))
    return learner


def base(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def scores(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return Scorer(model, longest=128).completion_logprobs(BATCH)


def merged_by_hand(path: Path, reference: AdapterRef, payload: bytes) -> PreTrainedModel:
    """W0 + scale * B A for every pair in the payload, by its name alone."""
    model = base(path)
    tensors = safetensors.torch.load(payload)
    for name in [name for name in tensors if ".lora_A." in name]:
        weight = model.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight"))
        weight.data += reference.scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return model


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        ({}, 2.0),
        ({"rslora": True}, 8.0 / math.sqrt(4)),
        ({"rank": 3, "alpha": 0.7}, 0.7 / 3),
        ({"targets": ["q_proj", "down_proj"]}, 2.0),
        ({"targets": ["lm_head"]}, 2.0),
        ({"targets": ["q_proj", "lm_head"], "rslora": True}, 4.0),
        ({"targets": ["all-linear", "lm_head"]}, 2.0),
        ({"targets": ["all-linear"]}, 2.0),
    ],
)
def test_peft_and_every_merge_give_the_learners_log_probs(path: Path, tmp_path: Path, lora: dict[str, Any], scale: float) -> None:
    learner = trained(path, tmp_path, **lora)
    reference, payload = learner.publish(3)
    own = scores(learner._model.module)
    file = Path(reference.path) / "adapter_model.safetensors"
    assert (own - scores(base(path))).abs().max().item() > 0.01
    torch.testing.assert_close(scores(PeftModel.from_pretrained(base(path), reference.path).eval()), own, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scores(merged_by_hand(path, reference, payload)), own, rtol=1e-6, atol=1e-5)
    check_adapter(path, file)
    pushed = base(path)
    pushed.load_state_dict(dict(merged_weights(path, file, reference.scale)))
    torch.testing.assert_close(scores(pushed), own, rtol=1e-6, atol=1e-5)
    assert reference.scale == pytest.approx(scale)
    assert open_adapter(Path(reference.path)).scale == reference.scale


def test_an_adapted_head_goes_through_canary_and_checkpoint(path: Path, tmp_path: Path) -> None:
    learner = trained(path, tmp_path, targets=["all-linear", "lm_head"])
    adapted, saved = learner.publish(3), learner.save_checkpoint(3)
    names = set(safetensors.torch.load(adapted[1]))
    assert {name for name in names if "lm_head" in name} == {f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"}
    assert len(names) == 2 * (14 + 1)  # seven linear layers in each of two blocks, and the head: no weight of the base is among them
    canary = adapted[0].canary
    batch = pack([canary.prompt_ids], [[canary.completion_ids]])
    with torch.no_grad():
        assert canary.adapted == pytest.approx(Scorer(merged_by_hand(path, *adapted), longest=128).completion_logprobs(batch).item(), abs=1e-4)
        assert canary.base == pytest.approx(Scorer(base(path), longest=128).completion_logprobs(batch).item(), abs=1e-4)
    learner.step(tiny_llama.step_request(4))
    learner.load_checkpoint(saved)
    assert learner.publish(3)[1] == adapted[1]


def test_the_folder_is_whole_and_says_what_it_is(path: Path, tmp_path: Path) -> None:
    reference, payload = trained(path, tmp_path).publish(3)
    folder = Path(reference.path)
    assert folder == tmp_path / "adapters" / "v000003"
    assert {file.name for file in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md", "ftb_llm.json"}
    assert (folder / "adapter_model.safetensors").read_bytes() == payload
    assert reference.sha256 == hashlib.sha256(payload).hexdigest()
    assert reference.byte_count == len(payload)
    facts = json.loads((folder / "ftb_llm.json").read_text())
    assert facts == {"version": 3, "sha256": reference.sha256, "scale": 2.0, "byte_count": len(payload)}
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"], settings["inference_mode"]) == ("LORA", 4, 8, True)
    assert "base + 2 * B A" in (folder / "README.md").read_text()


def test_the_canary_is_the_summed_log_prob_of_its_sequence(path: Path, tmp_path: Path) -> None:
    learner = trained(path, tmp_path)
    reference, payload = learner.publish(3)
    canary = reference.canary
    batch = pack([canary.prompt_ids], [[canary.completion_ids]])
    assert canary.prompt_ids == tiny_llama.PROMPTS[0].token_ids
    assert len(canary.completion_ids) == adapters.CANARY_TOKENS
    with torch.no_grad():
        assert canary.adapted == pytest.approx(Scorer(merged_by_hand(path, reference, payload), longest=128).completion_logprobs(batch).item(), abs=1e-4)
        assert canary.base == pytest.approx(Scorer(base(path), longest=128).completion_logprobs(batch).item(), abs=1e-4)
    assert abs(canary.adapted - canary.base) > 0.01


def test_version_zero_is_the_base(path: Path, tmp_path: Path) -> None:
    canary = trained(path, tmp_path, steps=0).publish(0)[0].canary
    assert canary.adapted == canary.base


@pytest.mark.parametrize("max_model_len", [8, 33, 512])
def test_the_canary_leaves_the_engine_room_for_one_token(path: Path, tmp_path: Path, max_model_len: int) -> None:
    model = trained(path, tmp_path, steps=0)._model
    value = adapters.Canary(model, range(1, 60), max_model_len).value(model)
    assert len(value.prompt_ids) >= 1
    assert 1 <= len(value.completion_ids) <= adapters.CANARY_TOKENS
    assert len(value.prompt_ids) + len(value.completion_ids) < max_model_len


def test_publishing_prunes_and_replaces(path: Path, tmp_path: Path) -> None:
    learner = trained(path, tmp_path, steps=0, keep=2)
    for step in range(1, 5):
        learner.step(tiny_llama.step_request(step))
        learner.publish(step)
    first = learner.publish(4)
    assert [folder.name for folder in sorted((tmp_path / "adapters").iterdir())] == ["v000003", "v000004"]
    assert (Path(first[0].path) / "adapter_model.safetensors").read_bytes() == first[1]


def test_a_resumed_run_forgets_the_versions_of_its_lost_future(path: Path, tmp_path: Path) -> None:
    learner = trained(path, tmp_path, steps=1)
    saved = learner.save_checkpoint(1)
    learner.step(tiny_llama.step_request(2))
    learner.publish(2)
    learner.load_checkpoint(saved)
    learner.publish(1)
    assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == ["v000001"]


def test_the_model_card_names_what_trained_it() -> None:
    divergence = {"name": "forward_kl", "schedule": [{"step": 200, "name": "tv", "width": 0.1}]}
    card = adapters.model_card(tiny_llama.tiny_config(objective={"divergence": divergence}), 3, 2.0)
    assert "trained by f-Trajectory Balance towards the reward-tilted base model `pi_ref e^(r / 0.5) / Z`" in card
    assert "with the divergence `forward_kl, then tv of width 0.1 from step 200`, as it was after step 3." in card


@pytest.mark.parametrize(("kind", "text"), [("grpo", "grpo"), ("importance", "importance of reverse_kl")])
def test_a_baselines_model_card_does_not_speak_of_trajectory_balance(kind: str, text: str) -> None:
    card = adapters.model_card(tiny_llama.tiny_config(objective={"kind": kind}), 3, 2.0)
    assert f"trained by the baseline `{text}` with beta 0.5, as it was after step 3." in card
    assert "Trajectory Balance" not in card

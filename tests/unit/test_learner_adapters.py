import hashlib
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

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


def trained(path: Path, run_dir: Path, steps: int = 3, *, rslora: bool = False, keep: int = 3) -> Learner:
    config = tiny_llama.tiny_config(model={"lora": {"rank": 4, "alpha": 8.0, "rslora": rslora}}, checkpoint={"keep": keep})
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


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_and_a_merge_by_hand_give_the_learners_log_probs(path: Path, tmp_path: Path, rslora: bool) -> None:
    learner = trained(path, tmp_path, rslora=rslora)
    reference, payload = learner.publish(3)
    own = scores(learner._model.module)
    assert (own - scores(base(path))).abs().max().item() > 0.01
    torch.testing.assert_close(scores(PeftModel.from_pretrained(base(path), reference.path).eval()), own, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scores(merged_by_hand(path, reference, payload)), own, rtol=1e-6, atol=1e-5)
    assert reference.scale == (8.0 / math.sqrt(4) if rslora else 2.0)


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

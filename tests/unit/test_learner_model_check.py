"""What can't be adapted, pushed or scored right is refused before anything starts, in one line that names the setting."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.merge import check_adapter
from ftb_llm.config import Config
from ftb_llm.errors import ConfigError
from learner.model import AdaptedModel, load_base
from learner.model_check import check_model
from learner.targets import linear_names, pushable_names, stored_shapes
from tests import tiny_families, tiny_llama
from tests.fakes import FakeProgress
from tests.tiny_families import EXPERTS

GPU = {"gpus_each": 1}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    "glm4_moe": ("glm4_moe", EXPERTS | {"head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "llama4": ("llama4_text", {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}),
    "hy_v3": ("hy_v3", EXPERTS | {"head_dim": 8}),
}


def config_of(path: Path, actors: dict[str, Any] | None = None, **lora: Any) -> Config:
    model = {"path": str(path), "lora": {"rank": 4, "alpha": 8.0} | lora}
    return tiny_llama.tiny_config(model=model, actors=actors or {}, sampling={"max_tokens": 16})


def refusal(path: Path, actors: dict[str, Any] | None = None, **lora: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_model(config_of(path, actors, **lora), path)
    assert "\n" not in str(caught.value)
    return caught.value


def built(mixture: str, folder: Path) -> Path:
    kind, changes = MIXTURES[mixture]
    return tiny_families.build(folder, kind, **changes)


def gemma3_with_vision(folder: Path) -> Path:
    text = {**tiny_families.SHAPE, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_peft_refuses_is_refused_before(kind: str, tmp_path: Path) -> None:
    shape = {"state_size": 4} if kind == "mamba" else {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2}
    error = refusal(tiny_families.build(tmp_path, kind, **shape))
    assert error.key == "model.lora.targets"
    assert "'out_proj' is incompatible with Mamba-based models" in error.message


def test_weights_that_are_named_otherwise_on_disk_are_refused(tmp_path: Path) -> None:
    error = refusal(gemma3_with_vision(tmp_path))
    assert error.key == "model.path"
    assert "its adapter could not be pushed: its files hold no linear layer as it is in memory, such as model." in error.message


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    """GPT-2's are transposed."""
    error = refusal(tiny_families.build(tmp_path, "gpt2", n_embd=32, n_layer=2, n_head=4))
    assert str(error) == "model.path: GPT2LMHeadModel can't be trained, since its adapter could not be pushed: it has no linear layers"


def test_a_target_that_is_named_otherwise_on_disk_is_refused(tmp_path: Path) -> None:
    path = built("hy_v3", tmp_path)
    error = refusal(path, GPU, targets=["q_proj", "shared_experts.up_proj"])
    assert error.key == "model.lora.targets"
    assert "'shared_experts.up_proj' can't be pushed, since the model's files don't hold model.layers.1.mlp.shared_experts.up_proj.weight" in error.message


def test_a_target_that_peft_takes_for_experts_is_refused(tmp_path: Path) -> None:
    path = built("glm4_moe", tmp_path)
    assert "'down_proj' can't be pushed" in refusal(path, GPU, targets=["q_proj", "down_proj"]).message


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_on_a_cpu_engine_are_refused(name: str, tmp_path: Path) -> None:
    path = built(name, tmp_path)
    error = refusal(path)
    assert error.key == "model.path"
    assert "vLLM's CPU backend spoils at every push; it must be a model without one, or actors.gpus_each must be above 0" in error.message


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_leaves_experts_alone_and_says_so(name: str, tmp_path: Path) -> None:
    """What it adapts can be pushed, and trained."""
    path, progress = built(name, tmp_path / "model"), FakeProgress()
    check_model(config_of(path, GPU), path, progress)
    (line,) = progress.lines
    assert line.startswith("model.lora.targets: all-linear leaves ")
    assert "% of the weights between embeddings and head unadapted, model.layers." in line
    model = AdaptedModel(config_of(path), path)
    payload = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file(model.adapter_state(), payload)
    check_adapter(path, payload)
    assert not model.peft_model.peft_config["default"].target_parameters


def test_a_dense_model_is_adapted_as_a_whole(tmp_path: Path) -> None:
    path, progress = tiny_llama.build(tmp_path), FakeProgress()
    check_model(config_of(path), path, progress)
    assert not progress.lines


@pytest.mark.parametrize(("rope", "original"), [(LONGROPE, 64), (DYNAMIC, 128), (DYNAMIC | {"original_max_position_embeddings": 64}, 64)])
def test_a_rope_that_follows_the_batch_is_refused_beyond_its_original_length(rope: dict[str, Any], original: int, tmp_path: Path) -> None:
    path = tiny_families.build(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=128)
    error = refusal(path, {"max_model_len": original + 1})
    assert error.key == "actors.max_model_len"
    assert f"{original + 1} is too long" in error.message
    assert error.message.endswith(f"it must be at most {original}")
    with pytest.raises(ConfigError, match=r"actors\.max_model_len"):
        load_base(config_of(path, {"max_model_len": original + 1}), path)
    check_model(config_of(path, {"max_model_len": original}), path)


def test_another_rope_is_as_long_as_it_likes(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    path = tiny_families.build(tmp_path, "llama", rope_parameters=yarn, max_position_embeddings=128)
    check_model(config_of(path, {"max_model_len": 128}), path)


def test_attention_that_keeps_the_tokens_that_count_most_is_refused_where_it_leaves_some_out(tmp_path: Path) -> None:
    path = tiny_families.build(tmp_path, "doge", keep_window_size=48)
    error = refusal(path, {"max_model_len": 49})
    assert error.key == "actors.max_model_len"
    assert error.message.endswith("it must be at most 48")
    check_model(config_of(path, {"max_model_len": 48}), path)


def test_a_linear_layer_with_a_way_of_its_own_is_adapted(tmp_path: Path) -> None:
    path = tiny_families.build(tmp_path, "falcon", new_decoder_architecture=True)
    model = load_base(config_of(path), path)
    assert set(pushable_names(model, stored_shapes(path))) == {name for name, module in model.named_modules() if type(module).__name__ == "FalconLinear"} - {
        "lm_head"
    }


def test_a_weight_that_two_layers_share_is_left_alone(tmp_path: Path) -> None:
    """Merged into the one, an adapter would change the other as well."""
    model = tiny_families.make("llama")
    first, second = (model.get_decoder().layers[index].self_attn for index in (0, 1))
    second.q_proj.weight = first.q_proj.weight
    stored = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    left = {name for name in linear_names(model) if name not in pushable_names(model, stored)}
    assert left == {f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)}

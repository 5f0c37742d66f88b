"""Adapters merged into a base checkpoint: every pair lands, or an error names the one that does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from actors.merge import AdapterMerger, check_adapter, merged_weights, read_adapter
from ftb_llm.errors import CheckpointError
from tests.tiny_llama import build

Q = "model.layers.0.self_attn.q_proj"


def peft_key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT itself saves, with both factors random."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def shard(base: Path, folder: Path) -> Path:
    """The same checkpoint in two files with an index."""
    weights = load_file(base / "model.safetensors")
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_merged_weights_are_those_that_peft_merges(base: Path, adapter: Path) -> None:
    merged = dict(merged_weights(base, adapter / "adapter_model.safetensors", 2.0))
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    assert set(merged) == set(reference)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-6, atol=1e-6)
    changed = [name for name, weight in load_file(base / "model.safetensors").items() if not torch.equal(weight, merged[name])]
    assert len(changed) == 14  # seven linear layers in each of two blocks, and nothing else


def test_sharded_checkpoint_gives_the_same_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    check_adapter(shard(base, tmp_path), file)
    whole, parts = dict(merged_weights(base, file, 2.0)), dict(merged_weights(tmp_path, file, 2.0))
    assert set(whole) == set(parts)
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def test_merging_is_done_in_float32_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    weight = torch.full((2, 2), 256.0, dtype=torch.bfloat16)  # the next bfloat16 is 258
    save_file({f"{Q}.weight": weight}, tmp_path / "model.safetensors")
    factors = {peft_key(Q, "A"): torch.full((3, 2), 1.0, dtype=torch.bfloat16), peft_key(Q, "B"): torch.full((2, 3), 0.5, dtype=torch.bfloat16)}
    save_file(factors, tmp_path / "adapter.safetensors")
    ((name, merged),) = merged_weights(tmp_path, tmp_path / "adapter.safetensors", 1.0)
    assert name == f"{Q}.weight"
    assert merged.dtype == torch.bfloat16
    assert merged.tolist() == [[258.0, 258.0], [258.0, 258.0]]  # 257.5 rounded once; adding three times 0.5 in bfloat16 would leave 256


def test_unchanged_weights_keep_their_bits(base: Path, adapter: Path) -> None:
    original = load_file(base / "model.safetensors")
    merged = dict(merged_weights(base, adapter / "adapter_model.safetensors", 2.0))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(original[name], merged[name])


A, B = torch.zeros(4, 16), torch.zeros(16, 4)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({peft_key("model.layers.7.self_attn.q_proj", "A"): A, peft_key("model.layers.7.self_attn.q_proj", "B"): B}, "model.layers.7.self_attn.q_proj.weight"),
        ({peft_key(Q, "A"): A}, f"only lora_A for {Q}.weight"),
        ({peft_key(Q, "B"): B}, f"only lora_B for {Q}.weight"),
        ({peft_key(Q, "A"): A, peft_key(Q, "B"): torch.zeros(16, 3)}, "don't fit together"),
        ({peft_key(Q, "A"): A, peft_key(Q, "B"): torch.zeros(8, 4)}, "[8, 16], the base weight is [16, 16]"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": torch.zeros(16)}, "lora_magnitude_vector"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": A}, "lora_embedding_A"),
        ({"base_model.model.lm_head.weight": A}, "lm_head.weight"),
        ({}, "is empty"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_by_name(base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], named: str) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        check_adapter(base, file)
    assert named in str(caught.value)
    with pytest.raises(CheckpointError):  # and the merge itself lets none of them pass either
        list(merged_weights(base, file, 1.0))


def test_an_adapted_head_is_merged_as_peft_merges_it(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    merged = dict(merged_weights(base, tmp_path / "adapter_model.safetensors", 2.0))
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path).merge_and_unload().state_dict()
    assert not torch.equal(merged["lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"])
    assert set(merged) == set(reference)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-6, atol=1e-6)


def test_a_variant_that_stores_plain_pairs_is_refused_by_the_settings_beside_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"q_proj": 2}}))
    with pytest.raises(CheckpointError, match=r'rank_pattern is {"q_proj": 2}; it must be off'):
        check_adapter(base, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="rank_pattern"):
        list(merged_weights(base, tmp_path / "adapter_model.safetensors", 2.0))


@pytest.mark.parametrize("left", [None, 100])
def test_a_base_file_that_is_gone_or_torn_is_named(base: Path, adapter: Path, tmp_path: Path, left: int | None) -> None:
    file = shard(base, tmp_path) / "model-1.safetensors"
    file.unlink() if left is None else file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"base model file .*model-1\.safetensors can't be read"):
        list(merged_weights(tmp_path, adapter / "adapter_model.safetensors", 2.0))


def test_torn_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "torn.safetensors"
    file.write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"torn\.safetensors can't be read"):
        read_adapter(file)


def test_base_without_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable model\.safetensors"):
        check_adapter(tmp_path, adapter / "adapter_model.safetensors")


def test_worker_extension_takes_no_name_that_the_worker_may_have() -> None:
    public = [name for name in dir(AdapterMerger) if not name.startswith("__")]
    assert public == ["merge_adapter"]

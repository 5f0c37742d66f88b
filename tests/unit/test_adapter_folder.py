"""What an adapter's folder says of itself: believed when it is whole and plain, one clear line otherwise."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from ftb_llm.adapter_folder import check_plain, find_adapter, open_adapter
from ftb_llm.config import load_config
from ftb_llm.errors import CheckpointError, InvalidConfig, SetupError

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False, "target_modules": ["q_proj"]}


def write_adapter(folder: Path, *, scale: float = 2.0, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    payload = b"weights"
    (folder / "adapter_model.safetensors").write_bytes(payload)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    facts = {"version": int(folder.name[1:]), "sha256": hashlib.sha256(payload).hexdigest(), "scale": scale, "byte_count": len(payload)}
    (folder / "ftb_llm.json").write_text(json.dumps(facts))
    return folder


def test_the_newest_or_the_named_version_is_found(tmp_path: Path) -> None:
    for version in (2, 30, 1000000):  # one digit more than the names are wide
        write_adapter(tmp_path / "adapters" / f"v{version:06d}")
    (tmp_path / "adapters" / ".tmp-v000040-x").mkdir()
    assert find_adapter(tmp_path, None).name == "v1000000"
    assert find_adapter(tmp_path, 2).name == "v000002"
    with pytest.raises(SetupError, match=r"--version: 3 is not there; .* has 2, 30, 1000000"):
        find_adapter(tmp_path, 3)


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="has no adapters"):
        find_adapter(tmp_path, None)


def test_a_whole_folder_is_read(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path / "v000003", scale=4.0, use_rslora=True))
    assert (adapter.version, adapter.scale, adapter.weights) == (3, 4.0, tmp_path / "v000003" / "adapter_model.safetensors")


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "v000003")
    (folder / "adapter_model.safetensors").write_bytes(b"weight")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is torn: its sha256 is [0-9a-f]{64}, [0-9a-f]{64} was published"):
        open_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors can't be read: No such file"):
        open_adapter(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 3, "sha256": "", "scale": null}'])
def test_torn_facts_are_refused(tmp_path: Path, text: str) -> None:
    folder = write_adapter(tmp_path / "v000003")
    (folder / "ftb_llm.json").write_text(text)
    with pytest.raises(CheckpointError, match="is torn"):
        open_adapter(folder)


def test_two_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the scale is 3 in ftb_llm\.json and 2 by alpha and rank"):
        open_adapter(write_adapter(tmp_path / "v000003", scale=3.0))


def test_every_setting_of_a_plain_adapter_is_at_rest() -> None:
    settings = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.1).to_dict()
    check_plain(json.loads(json.dumps(settings, default=sorted)), Path("adapter_config.json"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "use_dora is true; it must be off"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\]; it must be off'),
        ({"bias": "all"}, 'bias is "all"; it must be "none"'),
        ({"lora_bias": True}, "lora_bias is true; it must be off"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true; it must be off"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is {"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"; it must be true'),
        ({"use_qalora": True}, "use_qalora is true"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is"),
        ({"peft_type": "IA3"}, 'peft_type is "IA3"; it must be "LORA"'),
        ({"some_variant_to_come": {"rank": 3}}, "some_variant_to_come is"),
    ],
)
def test_a_variant_is_refused(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    folder = write_adapter(tmp_path / "v000003", **settings)
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_adapter(folder)
    assert str(caught.value).startswith(f"adapter {folder / 'adapter_config.json'}: ")
    assert str(caught.value).endswith("since only plain LoRA is merged right by base + scale * B A")


@pytest.mark.parametrize("word", ["dora=true", "use_dora=true", "modules_to_save=[lm_head]", "bias=all"])
def test_a_config_that_asks_for_a_variant_hears_why_not(word: str) -> None:
    with pytest.raises(InvalidConfig, match=r"model\.lora\.\w+: .* is not supported; leave it out: only plain LoRA, model\.lora\.rslora included, merges"):
        load_config(overrides=[f"model.lora.{word}"])

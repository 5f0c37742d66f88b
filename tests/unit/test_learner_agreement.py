"""The trial tells models that may be packed from those that may not, whatever their size, windows and precision."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from learner.agreement import copy_agrees, take_packed
from learner.attention import NAME
from learner.logprobs import Scorer
from learner.model import AdaptedModel, load_base
from learner.packing import pack
from learner.reference import Reference
from tests import tiny_families, tiny_llama

PROMPTS = [[5, 6], [9, 8, 7, 6, 5, 4, 3, 2, 1, 60, 61, 62]]
COMPLETIONS = [[[4, 2, 0], [7, 0]], [[1], [60, 61, 62, 63, 64, 9, 8]]]
MLA: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
SINKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("granite_swa", {"sliding_window": 128}),
}
DEPARTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **SINKS,
    "capped scores": ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}),
    "capped logits": ("nanochat", {}),
    "a mask of its own": ("doge", {}),
    "scaled logits": ("granite", {"logits_scaling": 8.0}),
    "other widths of keys and values": ("deepseek_v3", MLA | {"first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "an attention of its own": ("nemotron", {}),
    "a decoder that is a head": ("modernbert-decoder", {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 256}),
    "chunks": ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 9}),
    "a short window": ("mistral", {"sliding_window": 4}),
}
CONFORMING: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 8}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma3, every kind of layer": ("gemma3_text", {"head_dim": 8, "sliding_window": 512, "num_hidden_layers": 7}),
    "layers without positions": ("smollm3", {"num_hidden_layers": 5}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}}),
    "scores scaled by position": ("ministral3", {"head_dim": 8}),
    "clipped projections": ("olmo", {"clip_qkv": 0.5}),
    "experts": ("mixtral", {"num_local_experts": 4}),
}


def exact(model: PreTrainedModel) -> Tensor:
    """Each completion alone, eager attention, float64."""
    model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), attn_implementation="eager").double()
    rows = []
    for prompt, completions in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in completions:
            logp = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].double().log_softmax(-1)
            rows.append(sum(logp[len(prompt) - 1 + place, token] for place, token in enumerate(completion)))
    return torch.stack(rows).view(len(PROMPTS), -1)


@pytest.mark.parametrize("name", DEPARTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_departure_is_found_out_and_the_model_keeps_its_own_attention(name: str, dtype: torch.dtype) -> None:
    """Logits of a spread below one, where the coarse tolerance of bfloat16 hides everything."""
    kind, changes = DEPARTURES[name]
    model = tiny_families.make(kind, **changes).to(dtype)
    own = model.config._attn_implementation
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    assert not take_packed(model, longest=128)
    assert model.config._attn_implementation == own != NAME


@pytest.mark.parametrize("name", CONFORMING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_keeps_to_the_conventions_is_packed(name: str, dtype: torch.dtype) -> None:
    kind, changes = CONFORMING[name]
    model = tiny_families.make(kind, **changes).to(dtype)
    assert take_packed(model, longest=128)
    assert model.config._attn_implementation == NAME
    assert take_packed(model, longest=128)  # asked again, it says so again


@pytest.mark.parametrize("name", [*SINKS, "capped scores"])
def test_what_is_scored_is_the_model(name: str, tmp_path: Path) -> None:
    """By learner and reference actor alike, as they load it: sinks and caps are part of it."""
    kind, changes = DEPARTURES[name]
    path = tiny_families.build(tmp_path, kind, **changes)
    config = tiny_llama.tiny_config()
    base = load_base(config, path)
    if name in SINKS:
        for parameter_name, parameter in base.named_parameters():
            if "sinks" in parameter_name:
                parameter.data.add_(1.0)
    expected = exact(base)
    got = Scorer(base, longest=128).completion_logprobs(pack(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert not AdaptedModel(config, path).scorer.packed
    assert not Reference(config, path).packed


def test_capped_scores_are_capped(tmp_path: Path) -> None:
    path = tiny_families.build(tmp_path, "gemma2", head_dim=8, attn_logit_softcapping=0.1, query_pre_attn_scalar=0.1)
    assert load_base(tiny_llama.tiny_config(), path).config._attn_implementation == "eager"


def test_a_window_counts_where_sequences_exceed_it() -> None:
    """Thousands of tokens long, yet the trial's few dozen go beyond it."""
    model = tiny_families.make("mistral", sliding_window=4096)
    assert copy_agrees(model, longest=4096)
    assert not copy_agrees(model, longest=4097)


def test_random_numbers_are_not_disturbed() -> None:
    model = tiny_families.make("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert take_packed(model, longest=64)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("longest", [2, 3, 8])
def test_sequences_may_be_short(longest: int) -> None:
    assert take_packed(tiny_families.make("llama", max_position_embeddings=8), longest=longest)


def test_a_large_model_is_tried_on_a_small_copy() -> None:
    """Of 135 M parameters, of which none is there: only class and config count."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shape))
    began = time.process_time()
    assert copy_agrees(model, longest=8192)
    assert time.process_time() - began < 2


def test_the_learner_tells_how_long_the_trial_took(tmp_path: Path) -> None:
    seconds = AdaptedModel(tiny_llama.tiny_config(), tiny_llama.build(tmp_path)).scorer.trial_seconds
    assert math.isfinite(seconds) and seconds > 0

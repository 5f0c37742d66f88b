import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from ftb_llm.errors import CheckpointError, ConfigError, FtbError
from learner.head import chosen_logprobs
from learner.model import AdaptedModel
from learner.model_check import check_model
from learner.step import take_step
from tests import tiny_llama


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def adapted(path: Path, **lora: Any) -> AdaptedModel:
    return AdaptedModel(tiny_llama.tiny_config(model={"lora": {"rank": 4, "alpha": 8.0} | lora}), path)


def test_all_linear_layers_but_the_head_are_adapted(path: Path) -> None:
    model = adapted(path)
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in model.adapter_state()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trainable = sum(tensor.numel() for tensor in model.adapter_state().values())
    assert model.parameter_counts()["trainable_parameters"] == trainable
    assert all("lora_" in name for name, parameter in model.module.named_parameters() if parameter.requires_grad)
    assert not model.module.training


@tiny_llama.needs_compiler
def test_compiled_norms_take_the_same_steps(path: Path) -> None:
    """Steps of different sizes, so that what was compiled is not for one size alone."""
    plain, compiled = (AdaptedModel(tiny_llama.tiny_config(learner={"compile": compile}), path) for compile in (False, True))
    assert [hasattr(module.forward, "_torchdynamo_orig_callable") for module in compiled.module.modules() if isinstance(module, LlamaRMSNorm)] == [True] * 5
    for step, seeds in ((1, (0, 1, 2, 3)), (2, (4, 5)), (3, (6, 7, 8))):
        request = tiny_llama.step_request(step, seeds=seeds)
        expected, got = (take_step(model, request, micro_batch_tokens=1000) for model in (plain, compiled))
        torch.testing.assert_close(torch.tensor(got.logp_GK), torch.tensor(expected.logp_GK), rtol=1e-5, atol=1e-5)
        assert got.metrics["optim/grad_norm"] == pytest.approx(expected.metrics["optim/grad_norm"], rel=1e-4)


def test_the_settings_of_the_passes_reach_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def recording(*args: Any, float32: bool, **kwargs: Any) -> torch.Tensor:
        asked.append(float32)
        return chosen_logprobs(*args, float32=float32, **kwargs)

    monkeypatch.setattr("learner.ways.chosen_logprobs", recording)
    for chosen in (False, True):
        model = AdaptedModel(tiny_llama.tiny_config(learner={"float32_head": chosen, "recompute_activations": chosen}), path)
        take_step(model, tiny_llama.step_request(1), micro_batch_tokens=1000)
        layers = [module for module in model.module.modules() if isinstance(module, LlamaDecoderLayer)]
        assert [isinstance(layer.forward, partial) for layer in layers] == [chosen] * 2
        assert set(asked) == {chosen}
        asked.clear()


def test_a_bfloat16_base_has_a_float32_adapter_which_moves_by_less_than_bfloat16_can_tell(path: Path) -> None:
    model, exact = (AdaptedModel(tiny_llama.tiny_config(model={"dtype": dtype, "lora": {"rank": 4, "alpha": 8.0}}), path) for dtype in ("bfloat16", "float32"))
    before = model.adapter_state()
    for step in (1, 2):  # A has no gradient as long as B is zero
        request = tiny_llama.step_request(step, learning_rate=1e-6)
        report, expected = (take_step(one, request, micro_batch_tokens=1000) for one in (model, exact))
        assert report.loss == pytest.approx(expected.loss, rel=0.05)
    after = model.adapter_state()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(0 < (after[name] - before[name]).abs().max() < 1e-5 for name in after)
    assert {state["exp_avg"].dtype for state in model.optimizer.state.values()} == {torch.float32}
    assert {part.dtype for part in model.module.parameters() if not part.requires_grad} == {torch.bfloat16}


def test_where_nothing_can_be_compiled_the_setting_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with inductor.patch(fx_graph_cache=False), pytest.raises(ConfigError, match=r"learner.compile: torch.compile does not work here \(.*\); it must be false"):
        AdaptedModel(tiny_llama.tiny_config(learner={"compile": True}), path)


def test_scale_follows_alpha_and_rslora(path: Path) -> None:
    assert adapted(path).scale == 2.0
    assert adapted(path, rslora=True).scale == 8.0 / math.sqrt(4)


def test_targets_may_be_a_list(path: Path) -> None:
    assert {name.split(".")[-3] for name in adapted(path, targets=["q_proj", "v_proj"]).adapter_state()} == {"q_proj", "v_proj"}


def test_a_list_may_hold_all_linear_beside_the_head(path: Path) -> None:
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapted(path, targets=["all-linear", "lm_head"]).adapter_state()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["all-linear", "qkv"], "model.lora.targets: 'qkv' names no module"),
        (["q_proj", "qkv"], "model.lora.targets: 'qkv' names no module of the model: it should be all-linear, or a list of names among .*q_proj"),
        (["embed_tokens"], "model.lora.targets: 'embed_tokens' is not a linear layer"),
        ("q_proj", "model.lora.targets: 'q_proj' is wrong"),
        ([], r"model.lora.targets: \[\] is wrong"),
    ],
)
def test_wrong_targets_are_refused(path: Path, targets: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        adapted(path, targets=targets)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    tied = tiny_llama.build(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="'lm_head' shares its weight"):
        adapted(tied, targets=["lm_head"])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .* can't be loaded"):
        adapted(tmp_path)


def test_the_check_finds_what_loading_would(path: Path) -> None:
    check_model(tiny_llama.tiny_config(), path)
    check_model(tiny_llama.tiny_config(model={"lora": {"targets": ["q_proj"]}}), path)


@pytest.mark.parametrize("targets", [["q_proj", "qkv"], ["embed_tokens"], []])
def test_the_check_refuses_wrong_targets(path: Path, targets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: .* it should be all-linear"):
        check_model(tiny_llama.tiny_config(model={"lora": {"targets": targets}}), path)


def test_the_check_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    tiny_llama.build(tmp_path)
    config = tiny_llama.tiny_config(model={"path": str(tmp_path)})
    (tmp_path / "model.safetensors").rename(tmp_path / "part-1.safetensors")
    with pytest.raises(ConfigError, match=r"model\.path: .* holds no model\.safetensors"):
        check_model(config, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    check_model(config, tmp_path)
    index.write_text('{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}')
    with pytest.raises(ConfigError, match=r"holds no part-2\.safetensors"):
        check_model(config, tmp_path)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is no index"):
        check_model(config, tmp_path)


def test_the_check_refuses_a_config_that_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ConfigError, match=r"model\.path: .* can't be loaded") as caught:
        check_model(tiny_llama.tiny_config(), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_reference_is_the_model_without_its_adapter(path: Path) -> None:
    model = adapted(path)
    ids = torch.tensor([[5, 6, 7]])
    fresh = model.module(ids).logits
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    with model.as_reference():
        torch.testing.assert_close(model.module(ids).logits, fresh)
    assert not torch.allclose(model.module(ids).logits, fresh, atol=1e-2)


def test_the_seed_decides_the_initial_adapter(path: Path) -> None:
    first, second = adapted(path).adapter_state(), adapted(path).adapter_state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = AdaptedModel(tiny_llama.tiny_config(run={"seed": 4}), path).adapter_state()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_update_clips_and_reports_the_norm_before(path: Path) -> None:
    model = adapted(path)
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = model.adapter_state()
    norm = model.update(step=1, learning_rate=1e-3, max_grad_norm=0.5)
    assert norm == pytest.approx(math.sqrt(sum(parameter.numel() for parameter in parameters)), rel=1e-5)
    for name, tensor in model.adapter_state().items():  # Adam's first step is the learning rate, whatever the gradient
        torch.testing.assert_close(before[name] - tensor, torch.full_like(tensor, 1e-3), rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights(path: Path, value: float) -> None:
    model = adapted(path)
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, value)
    before = model.adapter_state()
    with pytest.raises(FtbError, match=r"step 7: the gradient's norm is (nan|inf); the weights are those of step 6"):
        model.update(step=7, learning_rate=1e-3, max_grad_norm=1.0)
    after = model.adapter_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.optimizer.state_dict()["state"]


def test_an_adapter_of_another_shape_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="is of another run"):
        adapted(path).load_adapter_state(adapted(path, rank=2).adapter_state())


def test_bfloat16_keeps_the_adapter_in_float32(path: Path) -> None:
    model = AdaptedModel(tiny_llama.tiny_config(model={"dtype": "bfloat16"}), path)
    assert {tensor.dtype for tensor in model.adapter_state().values()} == {torch.float32}
    assert model.peft_model.get_output_embeddings().weight.dtype == torch.bfloat16

"""Whether a model can be trained at all, found from its description before anything starts."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ftb_llm.config import Config
from ftb_llm.errors import ConfigError
from ftb_llm.ports import Progress
from learner.sharding import decoder_layers
from learner.targets import ALL_LINEAR, KEY, adapt, stored_shapes, unadapted, weight_files

WORTH_SAYING = 0.01  # share of the weights that all-linear leaves as they are


def check_model(config: Config, model_path: Path, progress: Progress | None = None) -> None:
    """Raise what loading, adapting and pushing the model would: no weight is read, no memory taken. Says what all-linear leaves out."""
    if missing := next((name for name in weight_files(model_path) if not (model_path / name).is_file()), None):
        raise ConfigError("model.path", f"{config.model.path} holds no {missing}; the weights must be there as safetensors")
    try:
        described = AutoConfig.from_pretrained(model_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", f"{config.model.path} can't be loaded: {' '.join(str(error).split())}") from None
    check_rope(config, described)
    check_kept(config, described)
    check_experts(config, model)
    if config.learner.sharding == "fsdp2":
        decoder_layers(model)
    stored = stored_shapes(model_path)
    line = left_out(config, model, stored)
    with torch.device("meta"):
        adapt(model, config.model.lora, stored)
    if line is not None and progress is not None:
        progress.line(line)


def check_rope(config: Config, described: PreTrainedConfig) -> None:
    """Some ropes follow the longest sequence in the batch: beyond their original length, a completion's score would depend on its company."""
    text, longest = described.get_text_config(), config.actors.max_model_len
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(part.get("rope_type", "default"))
        if kind != "longrope" and "dynamic" not in kind:
            continue
        whole = text.max_position_embeddings
        original = part.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None) or whole
        if kind != "longrope":
            original = min(original, whole)
        if longest > original:
            fault = f"{config.model.path} has a {kind} rope, which beyond {original} tokens depends on the longest sequence in a batch"
            raise ConfigError("actors.max_model_len", f"{longest} is too long: {fault}; it must be at most {original}")


def check_kept(config: Config, described: PreTrainedConfig) -> None:
    """Beyond some length, Doge's attention keeps the tokens that count most: which of equals those are depends on the padding."""
    kept, longest = getattr(described.get_text_config(), "keep_window_size", None), config.actors.max_model_len
    if kept is not None and longest > kept:
        fault = f"{config.model.path} keeps keep_window_size = {kept} tokens in its attention, and which of equal ones depends on the padding"
        raise ConfigError("actors.max_model_len", f"{longest} is too long: {fault}; it must be at most {kept}")


def check_experts(config: Config, model: PreTrainedModel) -> None:
    """vLLM's CPU backend repacks the weights of experts when it loads them, and a reload does not undo that."""
    if config.actors.gpus_each:
        return
    if (experts := next((name for name, module in model.named_modules() if is_experts(name, module)), None)) is not None:
        fault = f"{config.model.path} has a mixture of experts ({experts}), whose weights vLLM's CPU backend spoils at every push"
        raise ConfigError("model.path", f"{fault}; it must be a model without one, or actors.gpus_each must be above 0")


def is_experts(name: str, module: nn.Module) -> bool:
    named = name.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
    return named and next(module.parameters(), None) is not None


def left_out(config: Config, model: PreTrainedModel, stored: Any) -> str | None:
    """The line for a model of which all-linear adapts noticeably less than everything."""
    lora = config.model.lora
    if ALL_LINEAR not in ([lora.targets] if isinstance(lora.targets, str) else lora.targets):
        return None
    share, largest = unadapted(model, lora, stored)
    if share < WORTH_SAYING:
        return None
    return f"{KEY}: {ALL_LINEAR} leaves {share:.0%} of the weights between embeddings and head unadapted, {largest} among them"

"""Which layers are adapted: plain linear ones that an engine can be given, so those that stand in the model's files as in memory.

A push merges by weight: `base + scale * B A` under the weight's name. transformers renames, fuses or turns some weights as it
loads them; an adapter of such a layer trains, and then fits no weight of the checkpoint. `all-linear` leaves them out, a list
that names one is refused.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftb_llm.config.schema import Lora
from ftb_llm.errors import ConfigError

ALL_LINEAR = "all-linear"
KEY = "model.lora.targets"
_WEIGHTS = "model.safetensors"

Shapes = Mapping[str, tuple[int, ...]]


def weight_files(model_path: Path) -> list[str]:
    """The names of the files that hold the weights: one, or those that an index lists."""
    index = model_path / f"{_WEIGHTS}.index.json"
    if not index.is_file():
        return [_WEIGHTS]
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("model.path", f"{index} is no index of safetensors files") from None


def stored_shapes(model_path: Path) -> Shapes:
    """Name and shape of every weight on disk; only the files' headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(model_path):
        try:
            with safe_open(model_path / name, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  no dict
        except (OSError, SafetensorError) as error:
            raise ConfigError("model.path", f"{model_path / name} can't be read: {' '.join(str(error).split())}") from None
    return shapes


def adapt(model: PreTrainedModel, lora: Lora, stored: Shapes) -> PeftModel:
    """The model with a fresh adapter on its targets, or the line that says why there can be none."""
    check_targets(model, lora, stored)
    try:
        return get_peft_model(model, lora_config(model, lora, stored))
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(KEY, f"{lora.targets!r} can't be adapted in {type(model).__name__}: {reason}") from None


def lora_config(model: PreTrainedModel, lora: Lora, stored: Shapes) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # readers expect an integer where it is one
        use_rslora=lora.rslora,
        target_modules=target_modules(model, lora, stored),
        lora_dropout=0.0,
    )


def target_modules(model: PreTrainedModel, lora: Lora, stored: Shapes) -> list[str]:
    """For PEFT, whose own all-linear takes in what can't be pushed, and whose lists don't know the word."""
    targets = _as_list(lora.targets)
    if ALL_LINEAR not in targets:
        return targets
    return [*pushable_names(model, stored), *(target for target in targets if target != ALL_LINEAR)]


def check_targets(model: PreTrainedModel, lora: Lora, stored: Shapes) -> None:
    """Each target must name linear layers that can be pushed; PEFT itself overlooks one wrong name among right ones."""
    modules, pushable = dict(model.named_modules()), pushable_names(model, stored)
    targets = _as_list(lora.targets)
    if ALL_LINEAR in targets and not pushable:
        raise ConfigError("model.path", _nothing_to_push(model))
    wanted = f"it should be {ALL_LINEAR}, or a list of names among {', '.join(sorted({name.rpartition('.')[2] for name in pushable}))}"
    if not targets or (isinstance(lora.targets, str) and lora.targets != ALL_LINEAR):
        raise ConfigError(KEY, f"{lora.targets!r} is wrong: {wanted}")
    head: Any = model.get_output_embeddings()
    for target in (target for target in targets if target != ALL_LINEAR):
        matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matched:
            raise ConfigError(KEY, f"{target!r} names no module of the model: {wanted}")
        if not all(is_linear(modules[name]) for name in matched):
            raise ConfigError(KEY, f"{target!r} is not a linear layer: {wanted}")
        if head in map(modules.get, matched) and model.config.tie_word_embeddings:
            raise ConfigError(KEY, f"{target!r} shares its weight with the input embeddings and can't be adapted: {wanted}")
        if lost := [name for name in matched if name not in pushable and not (modules[name] is head and _is_stored(name, head, stored))]:
            fault = f"{target!r} can't be pushed, since the model's files don't hold {lost[0]}.weight as it is in memory"
            raise ConfigError(KEY, f"{fault}: {wanted}")


def linear_names(model: PreTrainedModel) -> Iterator[str]:
    """Every linear layer but the head."""
    head: Any = model.get_output_embeddings()
    return (name for name, module in model.named_modules() if is_linear(module) and module is not head)


def is_linear(module: nn.Module) -> bool:
    """And no more than that: routers of experts are made of it, and give more than one tensor."""
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or _gives_one_product(module))


@torch.no_grad()
def _gives_one_product(module: nn.Linear) -> bool:
    """A layer with a way of its own, such as Falcon's: does it give what a linear one gives?"""
    try:
        out = module(module.weight.new_zeros(1, module.in_features))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(out, Tensor) and out.shape == (1, module.out_features)


def pushable_names(model: PreTrainedModel, stored: Shapes) -> list[str]:
    """The linear layers but the head whose weight is on disk under the same name and in the same shape, and theirs alone."""
    modules = dict(model.named_modules())
    users = Counter(id(module.weight) for module in modules.values() if isinstance(module, nn.Linear))
    alone = [name for name in linear_names(model) if users[id(modules[name].weight)] == 1]  # merged, a shared one would change elsewhere too
    return [name for name in _left_alone(model, alone) if _is_stored(name, modules[name], stored)]


def unadapted(model: PreTrainedModel, lora: Lora, stored: Shapes) -> tuple[float, str]:
    """Which share of the weights between embeddings and head, norms and biases aside, has no adapter, and the largest of them."""
    outside = {id(weight) for module in model.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()}
    head: Any = model.get_output_embeddings()
    outside |= {id(weight) for weight in head.parameters()}
    blocks = {name: math.prod(weight.shape) for name, weight in model.named_parameters() if weight.ndim > 1 and id(weight) not in outside}
    targets = tuple(target_modules(model, lora, stored))
    ends = tuple(f".{target}" for target in targets)
    rest = {name: count for name, count in blocks.items() if not _is_target(name, targets, ends)}
    return sum(rest.values()) / max(1, sum(blocks.values())), max(rest, key=rest.__getitem__, default="")


def _is_target(parameter: str, targets: Sequence[str], ends: tuple[str, ...]) -> bool:
    module, _, kind = parameter.rpartition(".")
    return kind == "weight" and (module in targets or module.endswith(ends))


def _as_list(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def _is_stored(name: str, module: Any, stored: Shapes) -> bool:
    return stored.get(f"{name}.weight") == tuple(module.weight.shape)


def _left_alone(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Without those that PEFT takes for the experts of older checkpoints: it would adapt the fused experts in their stead."""
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, None)
    kept = set(config.target_modules or ())
    return [name for name in names if name in kept]


def _nothing_to_push(model: PreTrainedModel) -> str:
    first = next(linear_names(model), None)
    what = "it has no linear layers" if first is None else f"its files hold no linear layer as it is in memory, such as {first}.weight"
    return f"{type(model).__name__} can't be trained, since its adapter could not be pushed: {what}"

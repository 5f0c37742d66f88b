"""From files and `dotted.key=value` words to one checked `Config`, and from a bad value to one clear line."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ftb_llm.config.schema import ALTERNATIVES, Config
from ftb_llm.config.words import shown, typed_tree, typed_value
from ftb_llm.config.yaml_text import parse_yaml, read_text
from ftb_llm.errors import ConfigError, InvalidConfig

# Settings that PEFT has under these names, and that no push could merge.
_VARIANTS = (
    "dora",
    "use_dora",
    "bias",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_qalora",
    "layer_replication",
    "init_lora_weights",
)


def load_config(files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Merge YAML files left to right over the defaults, then the `dotted.key=value` words, and check the result."""
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, read_yaml(file))
    return build_config(merge_overrides(tree, overrides))


def build_config(tree: Mapping[str, Any]) -> Config:
    """Check a whole tree; raises `InvalidConfig` with one line per problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InvalidConfig([explain(details) for details in error.errors()]) from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    source = f"config file {file}"
    tree = parse_yaml(read_text(file), source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InvalidConfig([ConfigError("", f"{source} holds a {type(tree).__name__}; it must hold sections such as run: and model:")])
    return typed_tree(_spelled_out(tree), {key: field.annotation for key, field in settings()})


def parse_override(word: str) -> dict[str, Any]:
    """`a.b=1` becomes `{"a": {"b": 1}}`; the value is read as the setting's type, or as YAML where that is no single value."""
    key, equals, text = word.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InvalidConfig([ConfigError("", f"{word!r} is not a setting; write it section.key=value, for example objective.beta=0.1")])
    key = ".".join(parts)
    field = dict(all_settings()).get(key)
    value = typed_value(key, text, None if field is None else field.annotation)
    for part in reversed(parts):
        value = {part: value}
    return _spelled_out(value)


def merge_overrides(tree: Mapping[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Lay `dotted.key=value` words, as one person gave them together, over `tree`; a key that is given twice is a mistake."""
    given: dict[str, str] = {}
    merged = dict(tree)
    for word in words:
        patch = parse_override(word)
        for key in _leaf_keys(patch):
            if key in given:
                raise InvalidConfig([ConfigError(key, f"is given more than once: {given[key]} and {word}; give it once")])
            given[key] = word
        merged = merge(merged, patch)
    return merged


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `patch` over `base`: mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in patch.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _leaf_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf setting as (dotted key, pydantic field info), in the order of the schema."""
    for name, field in model.model_fields.items():
        section = section_type(field.annotation)
        if section is not None:
            yield from settings(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def all_settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The same, and what lies inside a setting: `rewards.functions[].weight`, `objective.divergence.alpha.from`."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        section = section_type(field.annotation)
        if section is None:
            yield key, field
        else:
            yield from all_settings(section, f"{key}.")
        for inner, is_member in _sections_within(field.annotation):
            yield from all_settings(inner, f"{key}[]." if is_member else f"{key}.")


def section_type(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _sections_within(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Each section that is an alternative or a member of a setting, and whether it is a member of a list."""
    arguments = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    for argument in arguments:
        section, is_list = section_type(argument), get_origin(annotation) is list
        if section is not None:
            yield section, is_list
        else:
            yield from ((inner, is_list or is_member) for inner, is_member in _sections_within(argument))


def is_live(key: str) -> bool:
    """True when the setting may change while the run is alive."""
    extra = dict(settings())[key].json_schema_extra
    return bool(extra["live"])


def explain(details: ErrorDetails) -> ConfigError:
    """One pydantic error as one line that names the key, the value and what would be right."""
    key = ".".join(str(part) or '""' for part in details["loc"] if part not in ("str", "list[str]", *ALTERNATIVES))
    if details["type"] == "extra_forbidden":
        section, _, leaf = key.rpartition(".")
        if section == "model.lora" and leaf in _VARIANTS:
            return ConfigError(
                key,
                f"{shown(details['input'])} is not supported; leave it out: only plain LoRA, model.lora.rslora included, merges as base + scale * B A",
            )
        return ConfigError(key, f"unknown setting{_nearest(key)}")
    if details["type"] == "model_type":
        return ConfigError(key, f"{shown(details['input'])} is wrong: {_what_belongs_there(key)}")
    if details["type"] == "missing":
        return ConfigError(key, "is required")
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith("Input") else message
    if details["type"] == "value_error":
        return ConfigError(key, message)
    return ConfigError(key, f"{shown(details['input'])} is wrong: {message.replace('input should', 'it should')}")


def _what_belongs_there(key: str) -> str:
    """A section is a mapping; the first setting in it says what that looks like."""
    inner = next((name for name, _ in all_settings() if name.startswith(f"{key}.")), "run.name")
    return f"it should be a mapping of settings, such as {inner}"


def _nearest(key: str) -> str:
    known = [name for name, _ in all_settings()]
    key = re.sub(r"\.\d+(?=\.)", "[]", key)
    sections = {".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)}
    near = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.6)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    guess = same_leaf if len(same_leaf) == 1 else near
    return f"; did you mean {guess[0]}?" if guess else ""


def _spelled_out(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with `objective.divergence: hellinger` written as what it is short for, `objective.divergence.name: hellinger`."""
    objective = tree.get("objective")
    if not isinstance(objective, Mapping) or not isinstance(objective.get("divergence"), str):
        return tree
    return {**tree, "objective": {**objective, "divergence": {"name": objective["divergence"]}}}

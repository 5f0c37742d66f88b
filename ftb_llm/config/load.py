"""From files and `dotted.key=value` words to one checked `Config`, and from a bad value to one clear line."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ftb_llm.config.schema import ALTERNATIVES, Config
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
    for word in overrides:
        tree = merge(tree, parse_override(word))
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> Config:
    """Check a whole tree; raises `InvalidConfig` with one line per problem."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InvalidConfig([explain(details) for details in error.errors()]) from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfig([ConfigError("", f"config file {file} can't be read: {error.strerror}")]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidConfig([ConfigError("", f"config file {file} is not YAML: {reason}")]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InvalidConfig([ConfigError("", f"config file {file} holds a {type(tree).__name__}; it must hold sections such as run: and model:")])
    return tree


def parse_override(word: str) -> dict[str, Any]:
    """`a.b=1` becomes `{"a": {"b": 1}}`; the value is read as YAML, so numbers, booleans, null and lists work."""
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InvalidConfig([ConfigError("", f"{word!r} is not a setting; write it section.key=value, for example objective.beta=0.1")])
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    value = _scientific(value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `patch` over `base`: mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in patch.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


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
    key = ".".join(str(part) for part in details["loc"] if part not in ("str", "list[str]", *ALTERNATIVES))
    if details["type"] == "extra_forbidden":
        section, _, leaf = key.rpartition(".")
        if section == "model.lora" and leaf in _VARIANTS:
            return ConfigError(
                key,
                f"{_shown(details['input'])} is not supported; leave it out: only plain LoRA, model.lora.rslora included, merges as base + scale * B A",
            )
        return ConfigError(key, f"unknown setting{_nearest(key)}")
    if details["type"] == "missing":
        return ConfigError(key, "is required")
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith("Input") else message
    if details["type"] == "value_error":
        return ConfigError(key, message)
    return ConfigError(key, f"{_shown(details['input'])} is wrong: {message.replace('input should', 'it should')}")


def _nearest(key: str) -> str:
    known = [name for name, _ in all_settings()]
    key = re.sub(r"\.\d+(?=\.)", "[]", key)
    sections = {".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)}
    near = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.5)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    guess = same_leaf if len(same_leaf) == 1 else near
    return f"; did you mean {guess[0]}?" if guess else ""


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text, also inside a list or a mapping; a person means the number."""
    if isinstance(value, dict):
        return {key: _scientific(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_scientific(inner) for inner in value]
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)

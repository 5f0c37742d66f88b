"""The value of a `section.key=value` word, read as what the setting is: text as it stands, a number as a number."""

import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ftb_llm.config.yaml_text import NotYaml, parse_yaml
from ftb_llm.errors import ConfigError, InvalidConfig

LONGEST_SHOWN = 200  # characters of a wrong value
_NULL = ("null", "~")


def typed_value(key: str, text: str, annotation: Any) -> Any:
    """The value that `text` says for the setting `key`.

    Args:
        annotation: the setting's type; None for a section or an unknown key, whose value is read as YAML.

    Raises:
        InvalidConfig: there is no value, as after a shell variable that is not set, or it is no finite number.
    """
    try:
        value = parse_yaml(text, key)
    except NotYaml:
        value = text
    kinds = set(_kinds(annotation)) if annotation is not None else set()
    if not text.strip() or (value is None and str not in kinds and text.strip().lower() not in _NULL):
        raise InvalidConfig([ConfigError(key, f"has no value after the =, as when a shell variable is not set; write {key}=null where none is meant")])
    if str in kinds:
        value = _as_text(value, text, is_list_fine=list in kinds)
    elif kinds & {int, float}:
        value = _as_number(value, text, is_whole=float not in kinds)
    value = _numbers(value) if str not in kinds else value
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidConfig([ConfigError(key, f"{shown(text)} is wrong: it should be a finite number")])
    return value


def typed_tree(tree: Mapping[str, Any], annotations: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A whole tree with its numbers as numbers: YAML 1.1 reads `1e-4` as text.

    Args:
        annotations: the type of each setting by its dotted key.
    """
    typed = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in annotations:
            typed[name] = _typed_leaf(value, annotations[key])
        else:
            typed[name] = typed_tree(value, annotations, f"{key}.") if isinstance(value, dict) else value
    return typed


def _typed_leaf(value: Any, annotation: Any) -> Any:
    kinds = set(_kinds(annotation))
    if str in kinds:
        return value
    value = _numbers(value)
    return int(value) if float not in kinds and isinstance(value, float) and value.is_integer() else value


def _kinds(annotation: Any) -> list[Any]:
    """The plain types that a setting takes: `str | None` is str and NoneType, a choice of names is str."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin is Literal:
        return [type(choice) for choice in arguments]
    if origin in (Union, UnionType):
        return [kind for argument in arguments for kind in _kinds(argument)]
    return [origin or annotation]


def _as_text(value: Any, text: str, *, is_list_fine: bool) -> Any:
    """What YAML would take for a number, a comment or a mapping is the name that somebody wrote; quotes and null mean what they mean."""
    bare = text.strip()
    is_quoted = isinstance(value, str) and bare[0] in "'\""
    return value if is_quoted or bare.lower() in _NULL or (is_list_fine and isinstance(value, list)) else bare


def _as_number(value: Any, text: str, *, is_whole: bool) -> Any:
    """`1e6` is a number, and a whole one where the setting is; `010` is ten, not eight."""
    if isinstance(value, bool | list | dict) or value is None:
        return value
    try:
        return int(text)
    except ValueError:
        value = _number(text, otherwise=value)
    is_integer = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and is_integer else value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text, also inside a list or a mapping; a person means the number."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return _number(value, otherwise=value) if isinstance(value, str) else value


def _number(text: str, *, otherwise: Any) -> Any:
    if text.strip()[:1] not in tuple("+-.0123456789"):
        return otherwise
    try:
        return float(text)
    except ValueError:
        return otherwise


def shown(value: Any) -> str:
    """A value in a line that says what is wrong with it."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"

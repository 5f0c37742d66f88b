"""What a merge patch of the config may hold, as JSON Schema: for OpenAPI, and for clients that make a form of it."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from ftb_llm.config.schema import Config

_ABOUT = (
    "A merge patch of the settings. Each has its default and limits; `live` tells whether it may change while the run is alive. "
    "One that is fixed (`readOnly`) may be named with the value that it has. null puts a setting back to its default."
)


@cache
def settings_schema() -> dict[str, Any]:
    """Self-contained: no `$ref`. What no schema can say (which settings go together) is answered with 422."""
    schema = Config.model_json_schema(by_alias=True)
    patch = _patch(_inlined(schema, schema["$defs"]))
    return patch | {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ConfigPatch", "description": _ABOUT}


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """`node` with each reference replaced by what it refers to."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    own = {name: _inlined(value, definitions) for name, value in node.items() if name not in ("$ref", "$defs", "title")}
    name = node.get("$ref", "").rpartition("/")[2]
    return _inlined(definitions[name], definitions) | own if name else own


def _patch(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of a patch of what `node` describes: nothing is required. What stands in a list is replaced whole, and stays as it is."""
    node = {name: value for name, value in node.items() if name != "required"}
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in node:
            node[alternatives] = [_patch(item) for item in node[alternatives]]
    if "properties" in node:
        node["properties"] = {name: _setting(value) for name, value in node["properties"].items()}
    return node


def _setting(node: dict[str, Any]) -> dict[str, Any]:
    node = _patch(node)
    if node.get("live") is False:
        node["readOnly"] = True
    if "default" in node or "properties" in node:
        node = _or_null(node)
    return node


def _or_null(node: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in node:
        null = {"type": "null"}
        return node if null in node["anyOf"] else node | {"anyOf": [*node["anyOf"], null]}
    nullable = node | {"type": [node["type"], "null"]}
    return nullable | {"enum": [*node["enum"], None]} if "enum" in node else nullable

"""The schema of a patch, held to the settings that it describes and to the ledger that takes patches."""

from typing import Any

import pytest

from ftb_llm.api.settings_schema import settings_schema
from ftb_llm.config import build_config
from ftb_llm.config.ledger import KEYS
from ftb_llm.config.load import is_live


def setting(key: str) -> dict[str, Any]:
    node = settings_schema()
    for part in key.split("."):
        node = node["properties"][part]
    return node


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_is_there_with_its_default_and_whether_it_is_live(key: str) -> None:
    default: Any = build_config({}).model_dump(mode="json")
    for part in key.split("."):
        default = default[part]
    node = setting(key)
    assert node["default"] == default
    assert node["description"]
    assert (node["live"], node.get("readOnly", False)) == (is_live(key), not is_live(key))


def test_limits_and_nulls() -> None:
    beta, decay, alpha = (setting(f"{key}") for key in ("objective.beta", "learner.decay", "objective.divergence.alpha"))
    assert (beta["type"], beta["minimum"]) == (["number", "null"], 1e-6)
    assert decay["enum"] == ["constant", "linear", "cosine", None]
    assert alpha["anyOf"][1] == {"type": "null"}
    assert alpha["anyOf"][0]["oneOf"][1]["properties"]["from"]["minimum"] == -10


def test_a_patch_requires_nothing_and_knows_no_other_key() -> None:
    def objects(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, list):
            return [found for item in node for found in objects(item)]
        if not isinstance(node, dict):
            return []
        below = [found for name, value in node.items() if name not in ("default", "items") for found in objects(value)]
        return [node, *below] if "additionalProperties" in node else below

    found = objects(settings_schema())
    assert len(found) > 14
    assert all(node["additionalProperties"] is False and "required" not in node for node in found)
    assert setting("objective.divergence.schedule")["items"]["required"] == ["name", "step"], "what a list holds is replaced whole"

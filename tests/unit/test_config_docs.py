"""How the configuration page says a type, a default and a range."""

import re
from typing import Literal

import pytest
import yaml
from pydantic.fields import FieldInfo

from ftb_llm.config import Config, build_config, docs
from ftb_llm.config.load import is_live, parse_override, settings
from ftb_llm.config.schema import Alpha, Divergence, Fixed, Reward


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (int | None, "integer or null"),
        (Literal["a", "b"], "one of `a`, `b`"),
        (str | list[str], "string or list of strings"),
        (list[Reward], "list of mappings"),
        (Alpha | None, "number or mapping or null"),
    ],
)
def test_a_type_is_said_as_a_person_would(annotation: object, text: str) -> None:
    assert docs.type_text(annotation) == text


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({}, ""),
        ({"ge": 1, "lt": 2**31}, "≥ 1, < 2147483648"),
        ({"gt": 0, "le": 1}, "> 0, ≤ 1"),
        ({"min_length": 1}, "not empty"),
        ({"pattern": "^a"}, "matches `^a`"),
    ],
)
def test_a_range_is_said_in_full(limits: dict[str, object], text: str) -> None:
    field = FieldInfo.from_annotated_attribute(str if {"pattern", "min_length"} & limits.keys() else int, Fixed(1, "A value.", **limits))
    assert docs.range_text(field) == text


def test_the_range_of_a_number_holds_beside_the_mapping() -> None:
    assert docs.range_text(Divergence.model_fields["alpha"]) == "≥ -10, ≤ 10"


def test_a_member_of_a_list_has_rows_of_its_own() -> None:
    assert "| `rewards.functions[].function` | string | required |" in docs.markdown()
    assert "| `objective.divergence.schedule[].step` | integer | required |" in docs.markdown()


def test_a_mapping_that_a_setting_may_be_has_rows_of_its_own() -> None:
    assert "| `objective.divergence.alpha.from` | number | required |" in docs.markdown()


def test_the_plan_of_the_page_is_a_config() -> None:
    page = docs.markdown()
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(build_config(yaml.safe_load(example)).objective.divergence.schedule) == 2
    [word] = re.findall(r"ftb-llm set '(.*?)'", page)
    build_config(parse_override(word))


def test_a_pipe_does_not_end_a_cell() -> None:
    field = FieldInfo.from_annotated_attribute(str, Fixed("a|b", "One | other."))
    assert docs.row("x", field) == '| `x` | string | `"a\\|b"` |  | fixed | One \\| other. |'


def test_live_and_fixed_are_told_apart() -> None:
    rows = {line.split("`")[1]: line for line in docs.markdown().splitlines() if line.startswith("| `")}
    assert all((" | live | " in rows[key]) == is_live(key) for key, _ in settings())
    assert {" | live | " in row for row in rows.values()} == {True, False}


def test_the_base_config_names_every_section_in_order() -> None:
    assert list(yaml.safe_load(docs.base_yaml())) == list(Config.model_fields)

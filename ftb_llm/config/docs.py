"""Writes `docs/configuration.md` and `configs/base.yaml` from the schema: `python -m ftb_llm.config.docs [ROOT]`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftb_llm.config.load import all_settings, section_type
from ftb_llm.config.schema import Config

HEAD = """\
# Configuration

Every setting, its default and its range. This page is written by `make docs` from `ftb_llm/config/schema.py`.

A config is made of YAML files, merged left to right over the defaults, and then of `section.key=value` words:

```
ftb-llm train configs/quickstart.yaml objective.beta=0.1 objective.divergence.name=hellinger
```

The value of a word is read as what the setting is: text as it stands (`run.name=007`, `control.host=::`), a whole number also as `1e6`,
anything else as YAML; `null` is none. A word without a value is refused, as after a shell variable that is not set. A key that stands
twice in one file, or in two words, is refused too. Files may write numbers as `1e-4` as well.
`objective.divergence: hellinger` is short for `objective.divergence.name`, in files and in words.
Files hold plain data: no tags, at most 50 levels, at most 1 MiB.

`--dry-run` prints the resolved config and exits. Unknown keys, wrong types and values out of range end the command with exit
code 2 and one line per problem, before anything starts.

A **live** setting may change while the run is alive, with `ftb-llm set` or `PATCH /v1/config`; it takes effect at a step
boundary. A **fixed** one is settled when the run starts. `configs/base.yaml` lists the defaults as YAML.
"""
BASE_HEAD = """\
# Every setting with its default; written by `make docs`. These values hold anyway: a config of your own needs only what differs.
# Settings marked live may change while the run is alive. docs/configuration.md has the ranges.
"""
NOTES = {
    "objective": """\
The divergence may change by plan. An `alpha` that is a ramp moves in equal steps and then stays; a `schedule` replaces the member
at the steps that it names:

```yaml
objective:
  divergence:
    name: alpha
    alpha: {from: 0.75, to: 1.2, over: 300}
    schedule:
      - {step: 500, name: hellinger}
      - {step: 800, name: tv, width: 0.1}
```

A ramp begins at the first step of its member: at the step of its entry in a schedule, otherwise at the step from which on this name
and alpha are in force without a break. A ramp set at step 150 begins at step 150, a change of the learning rate does not start it
anew, and a resumed run goes on where it was.

Both may be given to a live run, as in `ftb-llm set 'objective.divergence={name: alpha, alpha: {from: 0.75, to: 1.2, over: 300}}'`.
A live change of the member takes the place of the one in force: another `name` drops the old one's `alpha` and `width`, and
entries of the schedule that have begun leave it, while later ones stay. What the change itself names holds.
"""
}
ROW_HEAD = "| Setting | Type | Default | Range | | Meaning |\n|---|---|---|---|---|---|"


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, section in Config.model_fields.items():
        rows = [row(key, field) for key, field in all_settings(model_of(section), f"{name}.")]
        text = f"{section.description}\n\n" + (f"{NOTES[name]}\n" if name in NOTES else "")
        parts.append(f"\n## {name}\n\n{text}{ROW_HEAD}\n" + "".join(f"{line}\n" for line in rows))
    return "".join(parts)


def base_yaml() -> str:
    """The defaults as a config file, one comment per setting."""
    return BASE_HEAD + "".join(f"{line}\n" for line in yaml_lines(Config, ""))


def row(key: str, field: FieldInfo) -> str:
    live = "live" if extra(field)["live"] else "fixed"
    cells = [f"`{key}`", type_text(field.annotation), default_text(field), range_text(field), live, str(field.description)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def type_text(annotation: Any) -> str:
    """A type as a person would say it: `one of a, b`, `integer or null`, `list of strings`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}s"
    if section_type(annotation) is not None:
        return "mapping"
    return {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}[annotation]


def default_text(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{json.dumps(plain(field.default))}`"


def range_text(field: FieldInfo) -> str:
    """The limits in words; empty when every value of the type will do."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    texts = []
    for limit in [*field.metadata, *inner_limits(field.annotation)]:
        texts += [f"{sign} {getattr(limit, name)}" for name, sign in signs.items() if getattr(limit, name, None) is not None]
        texts += ["not empty"] if getattr(limit, "min_length", None) == 1 else []
        texts += [f"at most {limit.max_length} characters"] if getattr(limit, "max_length", None) is not None else []
        texts += [f"matches `{limit.pattern}`"] if getattr(limit, "pattern", None) is not None else []
    return ", ".join(texts)


def inner_limits(annotation: Any) -> Iterator[Any]:
    """The limits of the alternatives of a setting, for example of the number where a number or a mapping will do."""
    for argument in get_args(annotation) if get_origin(annotation) is not Literal else ():
        if isinstance(argument, FieldInfo):
            yield from argument.metadata
        yield from inner_limits(argument)


def yaml_lines(model: type[BaseModel], indent: str) -> Iterator[str]:
    """One section as YAML; values are written as JSON, which YAML includes."""
    for name, field in model.model_fields.items():
        section = section_type(field.annotation)
        if section is None:
            live = " (live)" if extra(field)["live"] else ""
            yield f"{indent}{name}: {json.dumps(plain(field.default))}  # {field.description}{live}"
        else:
            yield f"{indent}{name}:  # {field.description}" if indent else f"\n{name}:  # {field.description}"
            yield from yaml_lines(section, f"{indent}  ")


def model_of(field: FieldInfo) -> type[BaseModel]:
    model = section_type(field.annotation)
    assert model is not None, "every top-level field is a section"
    return model


def extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict), "every setting is made by Live or Fixed"
    return field.json_schema_extra


def plain(value: Any) -> Any:
    """Models inside a default as plain mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    return [plain(member) for member in value] if isinstance(value, list) else value


def main(root: Path) -> None:
    for path, text in ((root / "docs/configuration.md", markdown()), (root / "configs/base.yaml", base_yaml())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]))

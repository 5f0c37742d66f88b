"""Reads YAML that a person wrote: plain data, each key once, no deeper and no larger than a config can be."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.error import MarkedYAMLError

from ftb_llm.errors import ConfigError, InvalidConfig

LARGEST_BYTES = 2**20
DEEPEST = 50  # levels within levels; the schema has seven
MOST_VALUES = 100_000  # with each alias counted as what it stands for
_TAGS = (None, "!", "tag:yaml.org,2002:str")  # any other would name a type, and settings have theirs
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")  # what JSON has as well: no dates, no sets, no objects of Python


class NotYaml(InvalidConfig):
    """The text as a whole can't be read as YAML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """How many values a node holds, itself included, and how many levels."""

    values: int
    levels: int


class _Loader(yaml.SafeLoader):
    """Composes plain data and refuses what would take all memory or all of the stack, before it is built."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        self._extents: dict[yaml.Node, _Extent] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mark = event.start_mark
        if getattr(event, "tag", None) not in _TAGS:
            raise _refusal(f"{event.tag} names a type, which a config does not take", mark)
        if self._open == DEEPEST:
            raise _refusal(f"values lie deeper than {DEEPEST} levels", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        self._open += 1
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is None:
            return None
        if is_alias and node not in self._extents:
            raise _refusal("an alias stands within what it names", mark)
        extent = self._extents.setdefault(node, self._measure(node))
        if extent.values > MOST_VALUES:
            raise _refusal(f"there are more than {MOST_VALUES} values, each alias counted as what it stands for", mark)
        if extent.levels > DEEPEST:
            raise _refusal(f"values lie deeper than {DEEPEST} levels", mark)
        return node

    def _measure(self, node: yaml.Node) -> _Extent:
        inner = [self._extents[child] for child in _children(node)]
        return _Extent(
            values=1 + sum(extent.values for extent in inner),
            levels=1 + max((extent.levels for extent in inner), default=0),
        )


_Loader.yaml_constructors = {
    None: yaml.SafeLoader.yaml_constructors[None],
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"tag:yaml.org,2002:{name}" for name in _PLAIN)},
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 would take 010 for eight and 1:30 for ninety.
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def read_text(path: str | Path) -> str:
    """The text of a config file; raises `InvalidConfig` when it can't be read, is no text, or is far too large."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise InvalidConfig([ConfigError("", f"config file {path} can't be read: {error.strerror}")]) from None
    if len(content) > LARGEST_BYTES:
        raise InvalidConfig([ConfigError("", f"config file {path} is larger than {LARGEST_BYTES} bytes; it should be YAML")])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no text in UTF-8"
        raise InvalidConfig([ConfigError("", f"config file {path} is not YAML: {reason}")]) from None


def parse_yaml(text: str, source: str) -> Any:
    """What the YAML of a whole text says.

    Args:
        source: what the text is, for the line that says what is wrong with it: `config file my.yaml`.

    Raises:
        NotYaml: the text is not YAML, or holds more than plain data.
        InvalidConfig: a key stands in it twice.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if twice := list(_given_twice(node, source)):
                raise InvalidConfig(twice)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # the second, for a number with more digits than Python converts
        if isinstance(error, InvalidConfig):
            raise
        raise NotYaml([ConfigError("", f"{source} is not YAML: {_reason(error)}")]) from None


def _given_twice(node: yaml.Node | None, source: str, section: str = "") -> Iterator[ConfigError]:
    """Each key that stands more than once in a mapping; YAML would take the last one without a word."""
    if isinstance(node, yaml.SequenceNode):
        for place, member in enumerate(node.value):
            yield from _given_twice(member, source, f"{section}{place}.")
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, list[int]] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            lines.setdefault(key.value, []).append(key.start_mark.line + 1)
            yield from _given_twice(value, source, f"{section}{key.value}.")
    for name, places in lines.items():
        if len(places) > 1:
            yield ConfigError(f"{section}{name}", f"is given more than once in {source}, {_lines(places)}; write it once, with all that belongs to it")


def _lines(places: list[int]) -> str:
    *before, last = places
    return f"in line {last}" if {*before} == {last} else f"in lines {', '.join(map(str, before))} and {last}"


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _refusal(problem: str, mark: yaml.Mark) -> ComposerError:
    return ComposerError(None, None, problem, mark)


def _reason(error: Exception) -> str:
    """In one line: what is wrong, and where."""
    if not isinstance(error, yaml.YAMLError):
        return f"a number can't be read: {str(error).partition(';')[0]}"
    if not isinstance(error, MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return " ".join(str(error).split())
    context = f"{error.context}, " if error.context else ""
    return f"{context}{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"

"""YAML that a person wrote: what is refused, with its place, and that nothing of it is a traceback."""

from pathlib import Path

import pytest

from ftb_llm.cli.main import main
from ftb_llm.config import load_config
from ftb_llm.config.yaml_text import DEEPEST, LARGEST_BYTES, MOST_VALUES, NotYaml, parse_yaml
from ftb_llm.errors import InvalidConfig

ALIAS_BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{place}: &a{place} [{', '.join([f'*a{place - 1}'] * 9)}]" for place in range(1, 12))])
ALIAS_CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{place}: &a{place} [*a{place - 1}]" for place in range(1, 5000))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objective: {beta: 0.25}\nrun: {seed: 1}\nobjective: {tempered: true}", "objective: is given more than once in my.yaml, in lines 1 and 3"),
        ("objective:\n  beta: 0.25\n  tempered: true\n  beta: 0.5", "objective.beta: is given more than once in my.yaml, in lines 2 and 4"),
        ("run: {seed: 1, seed: 2}", "run.seed: is given more than once in my.yaml, in line 1"),
        ("a: 1\na: 2\na: 3", "a: is given more than once in my.yaml, in lines 1, 2 and 3"),
        ("rewards:\n  functions:\n  - weight: 1\n    weight: 2", "rewards.functions.0.weight: is given more than once in my.yaml, in lines 3 and 4"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_its_lines(text: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value) == f"{message}; write it once, with all that belongs to it"


def test_each_key_that_is_given_twice_is_a_line() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_yaml("run: {seed: 1, seed: 2}\nobjective: {beta: 1, beta: 2}", "my.yaml")
    assert [problem.key for problem in caught.value.problems] == ["run.seed", "objective.beta"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 5000, f"values lie deeper than {DEEPEST} levels in line 1"),
        ("{a: " * 5000, f"values lie deeper than {DEEPEST} levels in line 1"),
        ("- " * 5000, f"values lie deeper than {DEEPEST} levels in line 1"),
        (ALIAS_BOMB, f"there are more than {MOST_VALUES} values"),
        (ALIAS_CHAIN, f"values lie deeper than {DEEPEST} levels in line {DEEPEST}"),
        ("&a [*a]", "an alias stands within what it names in line 1, column 5"),
        ("run:\n\tseed: 1", r"found character '\t' that cannot start any token in line 2, column 1"),
        ("a\x00b", "unacceptable character #x0000"),
        ("a: !!python/object/apply:os.getpid []", "names a type"),
        ("a: !!int ''", "names a type"),
        ("a: " + "9" * 5000, "a number can't be read: Exceeds the limit"),
        ("? [a]\n: 1", "found unhashable key"),
        ("a: 1\n---\na: 2", "found another document in line 2"),
    ],
)
def test_what_is_no_config_is_refused_in_a_line(text: str, reason: str) -> None:
    with pytest.raises(NotYaml) as caught:
        parse_yaml(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml is not YAML: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_plain_data_is_read() -> None:
    assert parse_yaml("d: &d {x: 1.5, y: null}\ne: {<<: *d, x: true}\nf: [*d, 'no', a]\ng: !!str 7", "my.yaml") == {
        "d": {"x": 1.5, "y": None},
        "e": {"x": True, "y": None},
        "f": [{"x": 1.5, "y": None}, "no", "a"],
        "g": "7",
    }
    assert parse_yaml("", "my.yaml") is None
    assert parse_yaml("2026-01-01", "my.yaml") == "2026-01-01"


@pytest.mark.parametrize("content", [b"[" * 5000, ALIAS_BOMB.encode(), b"run:\n\tseed: 1\n", b"\x89PNG\r\n\x1a\n", b"\x00" * (LARGEST_BYTES + 1)])
def test_a_file_that_is_no_config_ends_the_command_in_one_line(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert main(["train", str(path), "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ftb-llm: error: config file {path} is ")


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="can't be read: Is a directory"):
        load_config([tmp_path])

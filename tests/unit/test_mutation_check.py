import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools.mutation_check import MUTATIONS, ROOT, Mutation, Verdict, main, mutated, table

BREAK = Mutation(name="twice becomes thrice", file="ftb_llm/toy.py", old="2 * x", new="3 * x", tests=("tests/test_toy.py",))
HARMLESS = replace(BREAK, name="order of the factors", new="x * 2")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package with one formula and its test."""
    for name, text in {
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\n',
        "ftb_llm/__init__.py": "",
        "ftb_llm/toy.py": "def twice(x):\n    return 2 * x\n",
        "tests/test_toy.py": "from ftb_llm.toy import twice\n\n\ndef test_zero():\n    assert twice(0) == 0\n\n\ndef test_twice():\n    assert twice(4) == 8\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_every_mutation_changes_one_place_of_the_present_tree() -> None:
    for mutation in MUTATIONS:
        assert mutated(mutation, ROOT) != (ROOT / mutation.file).read_text(encoding="utf-8"), mutation.name
        assert all((ROOT / test).is_file() for test in mutation.tests), mutation.name
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_first_failing_test_is_named_a_survivor_is_an_error_and_the_tree_untouched(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"], mutations=[HARMLESS, BREAK], root=project) == 1
    assert [verdict | {"seconds": 0} for verdict in json.loads(capsys.readouterr().out)] == [
        {"mutation": "order of the factors", "file": "ftb_llm/toy.py", "killed_by": None, "seconds": 0},
        {"mutation": "twice becomes thrice", "file": "ftb_llm/toy.py", "killed_by": "tests/test_toy.py::test_twice", "seconds": 0},
    ]
    assert "2 * x" in (project / "ftb_llm/toy.py").read_text(encoding="utf-8")


def test_table() -> None:
    killed = Verdict(mutation="one", file="a.py", killed_by="tests/test_a.py::test_b[c-d]", seconds=1.0)
    assert table([killed, replace(killed, mutation="another", killed_by=None)]).splitlines() == [
        "one     -> tests/test_a.py::test_b[c-d]",
        "another -> SURVIVED",
    ]


@pytest.mark.parametrize(
    ("mutation", "problem"),
    [
        (replace(BREAK, old="4 * x"), "'4 * x' must be in ftb_llm/toy.py exactly once, and is there 0 times"),
        (replace(BREAK, old="x"), "exactly once, and is there 2 times"),
        (replace(BREAK, new="2 *"), "twice becomes thrice: the tests could not run (exit status 2)"),
        (replace(BREAK, tests=("tests/test_none.py",)), "the tests don't pass before anything is broken"),
    ],
)
def test_what_can_not_be_judged_says_why(project: Path, capsys: pytest.CaptureFixture[str], mutation: Mutation, problem: str) -> None:
    assert main([], mutations=[mutation], root=project) == 2
    assert problem in capsys.readouterr().err


def test_a_name_that_fits_nothing_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nonsense"], mutations=[BREAK]) == 2
    assert capsys.readouterr().err == "mutation_check: --only nonsense fits none of: twice becomes thrice\n"

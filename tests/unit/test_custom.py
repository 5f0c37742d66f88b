"""The user's own divergence is found by its import path."""

from pathlib import Path

import pytest

from ftb_llm.custom import load_custom
from ftb_llm.divergences import AlphaDivergence
from ftb_llm.errors import InvalidConfig

MODULE = """
from ftb_llm.divergences import AlphaDivergence

class Third(AlphaDivergence):
    def __init__(self):
        super().__init__(1 / 3)

member = AlphaDivergence(0.25)
number = 5

def make():
    return AlphaDivergence(0.75)

def make_nothing():
    pass

def fail():
    raise LookupError("no table")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "members_of_this_test.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    load_custom.cache_clear()


@pytest.mark.parametrize(("name", "alpha"), [("member", 0.25), ("make", 0.75), ("Third", 1 / 3)])
def test_a_member_a_function_or_a_class(module: None, name: str, alpha: float) -> None:
    found = load_custom(f"members_of_this_test:{name}")
    assert isinstance(found, AlphaDivergence)
    assert found.alpha == alpha
    assert load_custom(f"members_of_this_test:{name}") is found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("members_of_this_test:absent", "can't be imported: AttributeError"),
        ("no_such_module_here:member", "can't be imported: ModuleNotFoundError"),
        ("members_of_this_test:number", "is a int; it must be a Divergence"),
        ("members_of_this_test:make_nothing", "is a NoneType; it must be a Divergence"),
        ("members_of_this_test:fail", "made no divergence: LookupError: no table"),
    ],
)
def test_what_is_no_divergence_is_one_line(module: None, path: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_custom(path)
    assert str(caught.value).startswith(f"objective.custom: {path} {message}")
    assert "\n" not in str(caught.value)

"""What make setup says of a machine that lacks something outside Python's packages."""

import sys

import pytest

from tools.check_machine import NEEDS, Need, problem, python_package


def need(what: str, package: str, *, present: bool, extras: tuple[str, ...] = ("cpu", "gpu")) -> Need:
    return Need(what=what, why="somebody needs it", package=package, extras=extras, present=lambda: present)


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_machine_that_runs_these_tests_lacks_nothing(extra: str) -> None:
    assert problem(extra) is None


def test_all_that_is_missing_stands_in_one_line_with_the_command_that_brings_it() -> None:
    needs = (need("Python.h", "python3.11-dev", present=False), need("make", "make", present=True), need("a C++ compiler", "g++", present=False))
    assert problem("cpu", needs) == (
        "this machine lacks Python.h (somebody needs it), a C++ compiler (somebody needs it); on Debian and Ubuntu: apt-get install python3.11-dev g++"
    )


def test_a_gpu_environment_is_not_asked_for_what_the_cpu_build_alone_loads() -> None:
    assert problem("gpu", (need("libnuma.so.1", "libnuma1", present=False, extras=("cpu",)),)) is None


def test_packages_are_named_for_the_python_that_asks() -> None:
    assert python_package("dev") == f"python3.{sys.version_info.minor}-dev"


def test_a_compiler_is_looked_for_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    line = problem("cpu", NEEDS)
    assert line is not None
    assert "a C++ compiler" in line
    assert line.endswith("apt-get install g++")

"""Has this machine what the environment needs beside Python packages? `python tools/check_machine.py cpu|gpu`.

Asked before anything is installed, with the Python that the environment will be built from; one line names all that is missing.
"""

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True, frozen=True, kw_only=True)
class Need:
    """Something outside Python's packages, who needs it, and Debian's and Ubuntu's name for it."""

    what: str
    why: str
    package: str
    extras: tuple[str, ...]
    present: Callable[[], bool]


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def has_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def has_libnuma() -> bool:
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def python_package(suffix: str) -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}-{suffix}"


NEEDS = (
    Need(
        what="the module ensurepip",
        why="python -m venv needs it",
        package=python_package("venv"),
        extras=("cpu", "gpu"),
        present=lambda: importlib.util.find_spec("ensurepip") is not None,
    ),
    Need(
        what="Python.h",
        why="vLLM compiles its kernels at the start",
        package=python_package("dev"),
        extras=("cpu", "gpu"),
        present=has_headers,
    ),
    Need(
        what="a C++ compiler",
        why="vLLM compiles its kernels at the start",
        package="g++",
        extras=("cpu", "gpu"),
        present=has_compiler,
    ),
    Need(what="libnuma.so.1", why="vLLM's CPU build loads it", package="libnuma1", extras=("cpu",), present=has_libnuma),
)


def problem(extra: str, needs: tuple[Need, ...] = NEEDS) -> str | None:
    """All that is missing as one line; None when nothing is."""
    missing = [need for need in needs if extra in need.extras and not need.present()]
    if not missing:
        return None
    named = ", ".join(f"{need.what} ({need.why})" for need in missing)
    packages = " ".join(need.package for need in missing)
    return f"this machine lacks {named}; on Debian and Ubuntu: apt-get install {packages}"


def main(extra: str) -> int:
    line = problem(extra)
    if line is not None:
        print(f"make setup: {line}", file=sys.stderr)
    return 0 if line is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""What a command is, and the few things that all of them share."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ftb_llm.errors import FtbError, SetupError


class UsageError(FtbError, ValueError):
    """The command line itself is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: `configure` declares its arguments, `run` does the work and returns the exit code."""

    name: str
    help: str  # one line
    description: str = ""
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting, and takes options and words in any order."""

    def __init__(self, command: Command) -> None:
        super().__init__(prog=f"ftb-llm {command.name}", description=command.description or command.help, allow_abbrev=False)
        command.configure(self)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Left-aligned columns, two spaces apart."""
    table = [tuple(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_error(message: str) -> None:
    print(f"ftb-llm: error: {message}", file=sys.stderr)


def find_run(word: str) -> Path:
    """A run folder, given as its path or as its name under `runs/`."""
    for path in (Path(word), Path("runs") / word):
        if path.is_dir():
            return path
    raise SetupError(f"run {word} not found: neither {word} nor {Path('runs') / word} is a folder")


def inside_submitted_job() -> bool:
    """True in the process that a cluster started for a submitted job."""
    return os.environ.get("FTB_LLM_IN_JOB") == "1"

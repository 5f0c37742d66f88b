import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.engine_output import EngineOutput

FAILED = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


@pytest.fixture
def stderr_file(tmp_path: Path) -> Iterator[Path]:
    """This process's stderr as Ray leaves an actor's: a file."""
    kept = os.dup(2)
    path = tmp_path / "worker.err"
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield path
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def child(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=False)


def test_what_a_child_wrote_after_the_beginning_is_the_reason(stderr_file: Path) -> None:
    child("raise KeyError('of an earlier start')")
    output = EngineOutput.begin()
    child("raise ValueError('no room for one block')")
    assert output.reason(FAILED) == "ValueError: no room for one block"


def test_a_silent_child_leaves_the_error_as_it_is(stderr_file: Path) -> None:
    child("raise KeyError('of an earlier start')")
    assert EngineOutput.begin().reason(FAILED).startswith("RuntimeError: Engine core initialization failed")


def test_an_error_of_this_process_speaks_for_itself(stderr_file: Path) -> None:
    output = EngineOutput.begin()
    child("raise ValueError('something else')")
    assert output.reason(ValueError("1 validation error\n  max_model_len")) == "ValueError: 1 validation error max_model_len"

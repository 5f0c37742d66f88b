"""What the engine process wrote while it started: the only place where vLLM says why it did not.

The engine process inherits this process's stdout and stderr, which Ray points at log files. Nothing is redirected: the ends
of both files are noted before the start, and when it fails what came later is read.
"""

import os
import stat
from pathlib import Path
from typing import Self

from ftb_llm.tracebacks import last_exception, one_line

STREAMS = (1, 2)
MOST_BYTES = 2**20


class EngineOutput:
    """What stdout and stderr got since `begin`; where they are no files (a terminal, a pipe), nothing can be read again."""

    def __init__(self, ends: dict[int, int]) -> None:
        self._ends = ends

    @classmethod
    def begin(cls) -> Self:
        return cls({stream: os.fstat(stream).st_size for stream in STREAMS if stat.S_ISREG(os.fstat(stream).st_mode)})

    def reason(self, error: BaseException) -> str:
        """Why the engine did not start, in one line: what its process said last, or else `error`."""
        said = f"{type(error).__name__}: {error}"
        if "Engine core initialization failed" not in said:
            return one_line(said)  # it happened in this process
        return last_exception("\n".join(self._read(stream) for stream in self._ends)) or one_line(said)

    def _read(self, stream: int) -> str:
        with Path(f"/proc/self/fd/{stream}").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._ends[stream], size - MOST_BYTES))
            return file.read(MOST_BYTES).decode(errors="replace")

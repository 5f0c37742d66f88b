"""What a process wrote before it failed, cut to the one exception that a person has to know."""

import re

MOST_CHARACTERS = 600
# vLLM's prefixes: "(EngineCore pid=17) ERROR 11-26 11:44:00 [core.py:99] ".
_PREFIX = re.compile(r"^(?:\([^()]*\) ?)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Exceeded|Unavailable|Refused|Died)\b(?::|$)")
# Only consequences: they say that something else went wrong.
_EMPTY_WORDS = ("Engine core initialization failed", "SystemExit", "KeyboardInterrupt", "asyncio.CancelledError", "CancelledError")


def last_exception(text: str) -> str | None:
    """The last exception of a text with tracebacks, with its whole message in one line; None where there is none."""
    lines = [_PREFIX.sub("", _COLOR.sub("", line)).rstrip() for line in text.splitlines()]
    for start in range(len(lines) - 1, -1, -1):
        if _EXCEPTION.match(lines[start]) and not any(words in lines[start] for words in _EMPTY_WORDS):
            return one_line("\n".join(_message(lines, start)))
    return None


def one_line(text: str) -> str:
    """White space as single spaces, and not too long for a line of a terminal's error."""
    words = " ".join(text.split())
    return words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS].rstrip()} …"


def _message(lines: list[str], start: int) -> list[str]:
    """The exception's line and those of its message below: up to an empty line, another traceback or another exception."""
    end = start + 1
    while end < len(lines) and lines[end] and not lines[end].startswith(("Traceback", "Process ")) and not _EXCEPTION.match(lines[end]):
        end += 1
    return lines[start:end]

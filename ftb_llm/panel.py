"""The live panel's lines, fitted to the terminal: events are kept and facts give way, since events are shown nowhere else."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NEWEST_EVENT_LINES = 3
EVENT_LINES = 2
EVENTS_SHOWN = 6
# What is left out of a panel without room, the first one first; what isn't named stays as long as anything does.
_GIVE_WAY = ("run folder", "versions", "groups", "modes", "queue", "tokens/s", "staleness", "generators", "reward", "exact TV", "training")
_IN_THE_HEAD = ("run", "state", "step", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelLine:
    """One line: a label, which is dimmed, and its text."""

    label: str = ""
    text: str = ""
    is_event: bool = False
    is_error: bool = False


def panel_lines(facts: Sequence[tuple[str, str]], events: Sequence[str], *, width: int, height: int) -> list[PanelLine]:
    """At most `height` lines of at most `width` characters: facts, then events, whose newest one is the last line.

    Args:
        facts: label and text, in the order in which they are shown; those of generators have labels of their own.
        events: oldest first.
    """
    shown = [fact for fact in facts if fact[0] not in _IN_THE_HEAD]
    wanted = min(sum(len(lines) for lines in _wrapped_events(events, width)), EVENTS_SHOWN)
    room = height - (wanted + 1 if wanted else 0)
    while shown and len(_fact_lines(shown, width)) > room:
        shown.remove(min(shown, key=lambda fact: _rank(fact[0], shown)))
    above = _fact_lines(shown, width)
    left = height - len(above) - (1 if above else 0)
    below = _newest_that_fit(_wrapped_events(events, width), left)
    return [*above, *([PanelLine()] if above and below else []), *below]


def elapsed_text(status: Mapping[str, Any], now: float) -> str:
    """`1:02`: how long the run has gone on at the time `now`."""
    started = status.get("started_time")
    return "" if started is None else duration(max(0.0, now - started))


def duration(seconds: float) -> str:
    """75 becomes 1:15, 3700 becomes 1:01:40."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _rank(label: str, shown: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """The smallest gives way first; of equal ones the last."""
    name = "generators" if label.startswith("generator-") else label
    place = [key for key, _ in shown].index(label)
    return (_GIVE_WAY.index(name) if name in _GIVE_WAY else len(_GIVE_WAY), -place)


def _fact_lines(facts: Sequence[tuple[str, str]], width: int) -> list[PanelLine]:
    margin = max((len(label) for label, _ in facts), default=0)
    lines = []
    for label, text in facts:
        first, *others = textwrap.wrap(text, max(10, width - margin - 2), break_on_hyphens=False) or [""]
        is_error = label == "last error"
        lines.append(PanelLine(label=label.ljust(margin), text=first, is_error=is_error))
        lines += [PanelLine(label=" " * margin, text=text, is_error=is_error) for text in others]
    return lines


def _wrapped_events(events: Sequence[str], width: int) -> list[list[str]]:
    newest = len(events) - 1
    return [
        textwrap.wrap(
            event,
            max(10, width),
            subsequent_indent="  ",
            break_on_hyphens=False,
            max_lines=NEWEST_EVENT_LINES if place == newest else EVENT_LINES,
            placeholder=" …",
        )
        for place, event in enumerate(events)
    ]


def _newest_that_fit(events: Sequence[Sequence[str]], room: int) -> list[PanelLine]:
    def taken() -> Iterator[Sequence[str]]:
        left = room
        for lines in reversed(events):
            if len(lines) > left:
                return
            left -= len(lines)
            yield lines

    return [PanelLine(text=text, is_event=True) for lines in reversed(list(taken())) for text in lines]

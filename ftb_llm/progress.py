"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere. Fed with status dicts (`GET /v1/status`)."""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TextIO

from ftb_llm.panel import EVENTS_SHOWN, duration, elapsed_text, panel_lines
from ftb_llm.types import ObjectiveSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

ENDED = ("finished", "stopped", "failed")
Status = Mapping[str, Any]
Arguments = ParamSpec("Arguments")


def make_progress(mode: str, max_steps: int, stream: TextIO, *, every_steps: int = 10) -> "Progress":
    """`mode` is `logging.progress`: auto, live, plain or off; or json, which prints each status as one line."""
    if mode == "auto":
        mode = "live" if stream.isatty() else "plain"
    match mode:
        case "live":
            return LiveProgress(stream, max_steps)
        case "plain":
            return PlainProgress(stream, every_steps)
        case "json":
            return JsonProgress(stream)
        case "off":
            return Progress()
    raise ValueError(f"progress mode {mode!r} is wrong: it should be auto, live, plain, json or off")


class Progress:
    """Shows nothing; remembers the newest status."""

    def __init__(self) -> None:
        self.status: Status = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def update(self, status: Status) -> None:
        self.status = status

    def line(self, text: str) -> None:
        """One remark, such as a config change."""


def outlived(tell: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Whoever watches may have gone, or their disk be full: that ends no run, whose own files say the same."""

    @wraps(tell)
    def telling(*args: Arguments.args, **named: Arguments.kwargs) -> None:
        with suppress(OSError):
            tell(*args, **named)

    return telling


class JsonProgress(Progress):
    """Every status as one line of JSON."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @outlived
    def update(self, status: Status) -> None:
        super().update(status)
        print(json.dumps(status), file=self._stream, flush=True)


class PlainProgress(Progress):
    """One line every `every_steps` steps, and whenever the run's state changes."""

    def __init__(self, stream: TextIO, every_steps: int) -> None:
        super().__init__()
        self._stream = stream
        self._every_steps = every_steps

    def update(self, status: Status) -> None:
        last, self.status = self.status, status
        if not last or status["state"] != last["state"] or self._due(last["step"], status["step"], status["max_steps"]):
            self.line(plain_line(status))

    @outlived
    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _due(self, last_step: int, step: int, max_steps: int) -> bool:
        return step // self._every_steps > last_step // self._every_steps or (step != last_step and step == max_steps)


class LiveProgress(Progress):
    """A panel that is redrawn in place; whatever else is printed meanwhile scrolls by above it.

    It begins with the first status. Until then lines are printed as they come: what other programs write to the terminal
    while everything starts would break a panel.
    """

    def __init__(self, stream: TextIO, max_steps: int) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self._max_steps = max_steps
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._seen = time.time()
        self._marks: deque[tuple[float, int]] = deque(maxlen=50)  # (time, step) while training, for the time that remains
        self._console = Console(file=stream)
        self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=4)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    @outlived
    def update(self, status: Status) -> None:
        super().update(status)
        self._seen = time.time()
        self._max_steps = status["max_steps"]
        if status["state"] == "training" and (not self._marks or status["step"] != self._marks[-1][1]):
            self._marks.append((time.monotonic(), status["step"]))
        if not self._live.is_started:
            self._live.start()

    @outlived
    def line(self, text: str) -> None:
        if self._live.is_started:
            self._events.append(text)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _panel(self) -> "RenderableType":
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.status:
            return ""  # asked for once before the panel is shown
        width, height = self._console.size
        step = self.status.get("step", 0)
        head = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None):
            head.add_column(no_wrap=True, ratio=ratio)
        bar = ProgressBar(total=self._max_steps, completed=step)
        head.add_row(Text(f"step {step}/{self._max_steps}", style="bold"), bar, self._times())
        lines = panel_lines(status_rows(self.status), self._events, width=width - 4, height=height - 5)
        styles = {True: "dim", False: ""}
        body = [
            Text.assemble((line.label, "dim"), "  " if line.label else "", (line.text, "red" if line.is_error else styles[line.is_event])) for line in lines
        ]
        title = Text(f"{self.status['run']} · {self.status['state']}")
        return Panel(Group(head, Text(), *body), title=title, title_align="left")

    def _times(self) -> str:
        """Time goes on between two looks at a run that is alive, and stands still when it has ended."""
        elapsed = elapsed_text(self.status, self._seen if self.status["state"] in ENDED else time.time())
        return ", ".join(text for text in (f"{elapsed} elapsed" if elapsed else "", self._remaining()) if text)

    def _remaining(self) -> str:
        if len(self._marks) < 2 or self.status["state"] != "training":
            return ""
        (then, first), (now, last) = self._marks[0], self._marks[-1]
        seconds = (self._max_steps - last) * (now - then) / (last - first) if last > first else 0.0
        return f"{duration(seconds)} left"


def plain_line(status: Status) -> str:
    """`step 120/400  reward 1.93 (target 2.02)  exact_tv 0.081  staleness 4.2 steps  queue 12/32 groups  gen 3.1k tok/s  ...`"""
    parts = [f"step {status['step']}/{status['max_steps']}"]
    if status["state"] != "training":
        parts.append(status["state"])
    if (reward := status["reward"].get("mean")) is not None:
        parts.append(f"reward {reward:.3g}{_target(status)}")
    if (exact_tv := status["eval"].get("exact_tv")) is not None:
        parts.append(f"exact_tv {exact_tv:.3f}")
    if (staleness := status["staleness"]["mean"]) is not None:
        parts.append(f"staleness {staleness:.1f} steps")
    parts.append(f"queue {status['buffer']['groups']}/{status['buffer']['capacity']} groups")
    parts.append(f"gen {compact(status['throughput']['generate_tokens_per_second'])} tok/s")
    parts.append(f"learn {compact(status['throughput']['learn_tokens_per_second'])} tok/s")
    return "  ".join(parts)


def status_rows(status: Status) -> list[tuple[str, str]]:
    """The whole status as label and text, for a person."""
    speed, queue, groups = status["throughput"], status["buffer"], status["accounting"]
    rows = [
        ("run", status["run"]),
        ("state", status["state"]),
        ("step", f"{status['step']}/{status['max_steps']}"),
        ("time", elapsed_text(status, time.time())),
        ("objective", objective_text(status["objective"])),
        ("training", _training_text(status.get("optim", {}))),
        ("reward", _reward_text(status)),
        ("exact TV", _number(status["eval"].get("exact_tv"), ".4f")),
        ("modes", _modes_text(status["eval"])),
        ("staleness", _staleness_text(status["staleness"])),
        ("queue", f"{queue['groups']}/{queue['capacity']} groups"),
        ("tokens/s", f"generate {compact(speed['generate_tokens_per_second'])}, learn {compact(speed['learn_tokens_per_second'])}"),
        ("versions", f"policy {status['policy_version']}, config {status['config_version']}"),
        *((actor["name"], _actor_text(actor)) for actor in status["actors"]),
        ("groups", ", ".join(f"{groups[name]} {name}" for name in ("generated", "trained", "buffered", "leased", "dropped_stale", "rejected"))),
        ("control", status["url"] or ""),
        ("run folder", status["run_dir"]),
        ("last error", status["last_error"] or ""),
    ]
    return [(label, text) for label, text in rows if text]


def objective_text(objective: Mapping[str, Any]) -> str:
    return f"{ObjectiveSpec(**objective).text}, beta {objective['beta']:g}"


def compact(value: float | None) -> str:
    """3120 becomes 3.1k."""
    if value is None:
        return "-"
    if value >= 999_950:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.1f}k" if value >= 1000 else f"{value:.0f}"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _target(status: Status) -> str:
    target = status["eval"].get("target_reward")
    return "" if target is None else f" (target {target:.3g})"


def _reward_text(status: Status) -> str:
    mean = status["reward"].get("mean")
    return "" if mean is None else f"{mean:.4g}{_target(status)}"


def _training_text(optim: Mapping[str, Any]) -> str:
    """`loss 0.0123, gradient norm 0.45, learning rate 0.003`"""
    named = (("loss", "loss", ".4g"), ("gradient norm", "grad_norm", ".3g"), ("learning rate", "learning_rate", ".3g"))
    return ", ".join(f"{label} {optim[name]:{style}}" for label, name, style in named if optim.get(name) is not None)


def _modes_text(exact: Mapping[str, Any]) -> str:
    return f"{exact['modes_found']:g} of {exact['modes_total']:g} found" if exact.get("modes_total") else ""


def _staleness_text(staleness: Mapping[str, Any]) -> str:
    if staleness["mean"] is None:
        return ""
    limit = staleness["limit"]
    return f"mean {staleness['mean']:.1f}, max {staleness['max']:g} steps{'' if limit is None else f' (limit {limit})'}"


def _actor_text(actor: Mapping[str, Any]) -> str:
    version = "no version" if actor["version"] is None else f"version {actor['version']}"
    text = f"{actor['state']}, {version}, {actor['groups_in_flight']} groups in flight, {compact(actor['tokens_per_second'])} tok/s"
    pause = actor["push_pause_ms"]
    return text if pause is None else f"{text}, last push paused {pause:.0f} ms"

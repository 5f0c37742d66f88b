"""`summary.json` as rows for a person, each beside the number it should reach where there is one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftb_llm.panel import duration

Summary = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One number of the run. `met` is None where there is no goal, or no number."""

    label: str
    value: str
    goal: str = ""
    met: bool | None = None


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The short table printed at the end of a run."""
    return [(row.label, f"{row.value} (goal: {row.goal}{'' if row.met else '; missed'})" if row.goal else row.value) for row in judged_rows(summary)]


def judged_rows(summary: Summary) -> list[SummaryRow]:
    """Every number that the summary has, in the order in which a person asks for it."""
    return [row for row in (*_learning_rows(summary), *_loop_rows(summary), *_cost_rows(summary)) if row is not None]


def _learning_rows(summary: Summary) -> list[SummaryRow | None]:
    return [
        _text("state", summary.get("state")),
        _text("steps", summary.get("steps")),
        _exact_tv(summary),
        _reward(summary),
        _modes(summary),
    ]


def _loop_rows(summary: Summary) -> list[SummaryRow | None]:
    return [
        _judged("mean staleness", summary.get("mean_staleness_steps"), "{:.2f} steps", "at least 1 step", lambda value: value >= 1),
        _judged("push pause, median", summary.get("push_pause_ms_p50"), "{:.0f} ms", "below 200 ms", lambda value: value < 200),
        _judged("speed after a push / before", summary.get("speed_after_push_ratio"), "{:.3f}", "at least 0.97", lambda value: value >= 0.97),
        _judged("engine vs learner log-prob, max", summary.get("logprob_max_abs_diff"), "{:.1e}", "within 1e-4", lambda value: value <= 1e-4),
        _text("adapter on the wire", _bytes(summary.get("push_bytes"))),
        _text("groups", _accounting(summary.get("accounting"))),
    ]


def _cost_rows(summary: Summary) -> list[SummaryRow | None]:
    train, total = summary.get("train_seconds"), summary.get("total_seconds")
    training = _text("training time", None if train is None else duration(train))
    if _has_known_goals(summary) and train is not None:
        training = SummaryRow(label="training time", value=duration(train), goal="below 5:00", met=train < 300)
    return [
        training,
        _text("whole time", None if total is None else duration(total)),
        _judged("peak memory", summary.get("peak_rss_gib"), "{:.2f} GiB", "below 8 GiB", lambda value: value < 8),
        _text("cores", summary.get("cores")),
    ]


def _has_known_goals(summary: Summary) -> bool:
    """The embedded task is the one whose end is known in advance."""
    return summary.get("task") == "hypergrid"


def _text(label: str, value: Any) -> SummaryRow | None:
    return None if value is None else SummaryRow(label=label, value=str(value))


def _judged(label: str, value: float | None, style: str, goal: str, test: Callable[[float], bool]) -> SummaryRow | None:
    return None if value is None else SummaryRow(label=label, value=style.format(value), goal=goal, met=test(value))


def _exact_tv(summary: Summary) -> SummaryRow | None:
    start, end = summary.get("exact_tv_start"), summary.get("exact_tv_end")
    if end is None:
        return None
    value = f"{'' if start is None else f'{start:.3f} → '}{end:.4f}"
    if not _has_known_goals(summary):
        return SummaryRow(label="exact TV to the target", value=value)
    return SummaryRow(label="exact TV to the target", value=value, goal="below 0.05", met=end < 0.05)


def _reward(summary: Summary) -> SummaryRow | None:
    start, end, target = (summary.get(name) for name in ("reward_start", "reward_end", "target_reward"))
    if end is None:
        return None
    value = f"{'' if start is None else f'{start:.3f} → '}{end:.4f}"
    if target is None:
        return SummaryRow(label="reward", value=value)
    return SummaryRow(label="reward", value=value, goal=f"{target:.4f} ± 3%", met=abs(end - target) <= 0.03 * abs(target))


def _modes(summary: Summary) -> SummaryRow | None:
    found, total = summary.get("modes_found"), summary.get("modes_total")
    if found is None or total is None:
        return None
    return SummaryRow(label="modes found", value=f"{found:g}", goal=f"all {total:g}", met=found == total)


def _bytes(count: int | None) -> str | None:
    if count is None:
        return None
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _accounting(accounting: Mapping[str, Any] | None) -> str | None:
    if not accounting:
        return None
    rest = ", ".join(f"{accounting[name]} {name.replace('_', ' ')}" for name in ("dropped_stale", "rejected", "buffered", "leased") if accounting.get(name))
    return f"{accounting['generated']} generated, {accounting['trained']} trained{f', {rest}' if rest else ''}"

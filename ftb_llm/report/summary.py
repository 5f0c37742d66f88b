"""`summary.json` as rows for a person, each beside the number it should reach where there is one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftb_llm.panel import duration

Summary = Mapping[str, Any]
# Largest mean difference per token of one completion; a term in bfloat16 is only good to a few percent.
LOGPROB_LIMITS = {"float32": 5e-5, "bfloat16": 0.05}


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
        _judged(summary, "mean staleness", "mean_staleness_steps", "{:.2f} steps", "at least 1 step", lambda value: value >= 1),
        _judged(summary, "push pause, median", "push_pause_ms_p50", "{:.0f} ms", "below 200 ms", lambda value: value < 200),
        _judged(summary, "speed after a push / before", "speed_after_push_ratio", "{:.3f}", "at least 0.97", lambda value: value >= 0.97),
        _logprobs(summary),
        _text("adapter on the wire", _bytes(summary.get("push_bytes"))),
        _text("groups", _accounting(summary.get("accounting"))),
    ]


def _cost_rows(summary: Summary) -> list[SummaryRow | None]:
    train, total = summary.get("train_seconds"), summary.get("total_seconds")
    training = _text("training time", None if train is None else duration(train))
    if _has_known_end(summary) and train is not None:
        training = SummaryRow(label="training time", value=duration(train), goal="below 5:00", met=train < 300)
    return [
        training,
        _text("whole time", None if total is None else duration(total)),
        _judged(summary, "peak memory", "peak_rss_gib", "{:.2f} GiB", "below 8 GiB", lambda value: value < 8),
        _text("cores", summary.get("cores")),
    ]


def _has_goals(summary: Summary) -> bool:
    """Goals are for a built-in task as it is shipped, at its end: not for anybody's own run, nor for one that was ended early."""
    return bool(summary.get("as_shipped")) and summary.get("state") == "finished"


def _has_known_end(summary: Summary) -> bool:
    """The embedded task is the one whose end is known in advance."""
    return _has_goals(summary) and summary.get("task") == "hypergrid"


def _text(label: str, value: Any) -> SummaryRow | None:
    return None if value is None else SummaryRow(label=label, value=str(value))


def _judged(summary: Summary, label: str, name: str, style: str, goal: str, test: Callable[[float], bool]) -> SummaryRow | None:
    value: float | None = summary.get(name)
    if value is None:
        return None
    if not _has_goals(summary):
        return SummaryRow(label=label, value=style.format(value))
    return SummaryRow(label=label, value=style.format(value), goal=goal, met=test(value))


def _logprobs(summary: Summary) -> SummaryRow | None:
    """Whether engine and learner are one policy: judged in every run, by what its precision allows."""
    value, dtype = summary.get("logprob_max_abs_diff_per_token"), summary.get("dtype")
    if value is None or dtype not in LOGPROB_LIMITS:
        return None
    limit = LOGPROB_LIMITS[dtype]
    goal = f"within {limit:g} in {dtype}"
    return SummaryRow(label="engine vs learner log-prob per token, max", value=f"{value:.1e}", goal=goal, met=value <= limit)


def _exact_tv(summary: Summary) -> SummaryRow | None:
    start, end = summary.get("exact_tv_start"), summary.get("exact_tv_end")
    if end is None:
        return None
    value = f"{'' if start is None else f'{start:.3f} → '}{end:.4f}"
    if not _has_known_end(summary):
        return SummaryRow(label="exact TV to the target", value=value)
    return SummaryRow(label="exact TV to the target", value=value, goal="below 0.05", met=end < 0.05)


def _reward(summary: Summary) -> SummaryRow | None:
    start, end, target = (summary.get(name) for name in ("reward_start", "reward_end", "target_reward"))
    if end is None:
        return None
    value = f"{'' if start is None else f'{start:.3f} → '}{end:.4f}"
    if target is None or not _has_goals(summary):
        beside = "" if target is None else f" (target {target:.4f})"
        return SummaryRow(label="reward", value=f"{value}{beside}")
    return SummaryRow(label="reward", value=value, goal=f"{target:.4f} ± 3%", met=abs(end - target) <= 0.03 * abs(target))


def _modes(summary: Summary) -> SummaryRow | None:
    found, total = summary.get("modes_found"), summary.get("modes_total")
    if found is None or total is None:
        return None
    if not _has_goals(summary):
        return SummaryRow(label="modes found", value=f"{found:g} of {total:g}")
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

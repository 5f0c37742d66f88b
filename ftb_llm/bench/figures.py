"""Rows as pictures."""

import statistics
from collections.abc import Callable, Sequence

from ftb_llm.bench.plot import Panel, Point, picture
from ftb_llm.bench.tables import policy_of
from ftb_llm.bench.trials import Row, grouped, lags_of, names_of


def staleness_picture(rows: Sequence[Row], objectives: Sequence[str] = ()) -> str:
    """Final exact TV against the lag, and the share of the target's coverage below it: one column per task.

    `objectives` is the order in which they were asked for.
    """
    tasks = grouped(_in_order(rows, objectives), "task")
    tv = [_by_lag(f"Final exact TV, {task}", own, lambda row: row["exact_tv"], log=True) for (task,), own in tasks.items()]
    shares = [_shares(f"Distinct correct answers / the target's, {task}", own) for (task,), own in tasks.items()]
    return picture("Staleness: how close the policy comes to its target when it trains on old samples", [tv, shares])


def divergences_picture(rows: Sequence[Row], objectives: Sequence[str] = ()) -> str:
    """Exact TV, JSD and the share of the modes found against the completions seen, for each task: one column per lag.

    `objectives` is the order in which they were asked for.
    """
    quantities = [("Exact TV", "exact_tv", True), ("JSD in nats", "exact_jsd", True), ("Modes found (share)", "modes_found", False)]
    panels = [
        [_over_time(f"{label}, {task}, {policy_of(lag)}", [row for row in own if row["lag"] == lag], key, log=log) for lag in lags_of(own)]
        for (task,), own in grouped(_in_order(rows, objectives), "task").items()
        for label, key, log in quantities
    ]
    return picture("Divergences: exact TV, Jensen-Shannon divergence and modes found while training", panels)


def _in_order(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """Rows of one objective side by side, each with its lags rising."""
    names = names_of(rows, objectives)
    return sorted(rows, key=lambda row: (names.index(row["name"]), row["lag"]))


def _shares(title: str, rows: Sequence[Row]) -> Panel:
    """A target that covers nothing has no shares: those rows are left out."""
    return _by_lag(title, [row for row in rows if row["coverage_target"] > 0], lambda row: row["coverage"] / row["coverage_target"], log=False)


def _by_lag(title: str, rows: Sequence[Row], value: Callable[[Row], float], *, log: bool) -> Panel:
    lags = lags_of(rows)
    lines: dict[str, Sequence[Point]] = {
        name: [_point(lags.index(lag), [value(row) for row in some]) for (lag,), some in grouped(own, "lag").items()]
        for (name,), own in grouped(rows, "name").items()
    }
    return Panel(title=title, lines=lines, x_label="age of the samples, in steps", log=log, categories=[str(lag) for lag in lags])


def _over_time(title: str, rows: Sequence[Row], key: str, *, log: bool) -> Panel:
    """Means over the seeds that came so far; on a linear axis as the share of the most there can be."""
    most = 1.0 if log else max(1.0, rows[0]["modes_total"])
    lines: dict[str, Sequence[Point]] = {}
    for (name,), own in grouped(rows, "name").items():
        seen = grouped((point for row in own for point in row["curve"]), "completions")
        lines[name] = [_point(completions, [point[key] / most for point in some]) for (completions,), some in sorted(seen.items())]
    return Panel(title=title, lines=lines, x_label="completions seen", log=log)


def _point(x: float, values: Sequence[float]) -> Point:
    return Point(x=x, y=statistics.fmean(values), low=min(values), high=max(values))

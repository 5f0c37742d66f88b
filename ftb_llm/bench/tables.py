"""Rows as tables: cells are means over the seeds, with their standard deviation."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ftb_llm.bench.coverage import SAMPLES
from ftb_llm.bench.trials import Row, grouped, lags_of, names_of

NONE = "–"  # where there is no such number


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text, the first row being the header."""

    title: str
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        header, *body = self.rows
        lines = [header, ["---"] * len(header), *body]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(rows: Sequence[Row], key: str, digits: int) -> str:
    """Mean and spread, and how many trials broke off; a dash for no trial."""
    if not rows:
        return NONE
    values = [row[key] for row in rows]
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    broken = sum(row["error"] is not None for row in rows)
    return f"{text} ({broken} broke off)" if broken else text


def staleness_tables(rows: Sequence[Row], objectives: Sequence[str] = ()) -> list[Table]:
    """Objectives down, as they were asked for, and lags across: exact TV and coverage of each task."""
    tables = []
    for (task,), own in grouped(rows, "task").items():
        ideal = statistics.fmean(row["coverage_target"] for row in own)
        names = names_of(own, objectives)
        tables.append(_by_lag(f"Final exact TV, {task}", own, names, "exact_tv", 3))
        tables.append(_by_lag(f"Distinct correct answers in {SAMPLES} samples, {task} (the target: {ideal:.1f})", own, names, "coverage", 1))
    return tables


def divergences_tables(rows: Sequence[Row], objectives: Sequence[str] = ()) -> list[Table]:
    """One table per task and lag: every final number of each member, in the order in which they were asked for."""
    columns = [("exact TV", "exact_tv", 3), ("JSD", "exact_jsd", 4), ("reward", "reward", 3), ("modes", "modes_found", 1), ("coverage", "coverage", 1)]
    tables = []
    for (task,), own in grouped(rows, "task").items():
        cells = grouped(own, "name", "lag")
        for lag in lags_of(own):
            body = [[name, *(cell(cells.get((name, lag), []), key, digits) for _, key, digits in columns)] for name in names_of(own, objectives)]
            ideal = next(row for row in own if row["lag"] == lag)
            target = f"reward {ideal['target_reward']:.3f}, {ideal['modes_total']} modes, coverage {ideal['coverage_target']:.1f}"
            title = f"{task}, {policy_of(lag)} (target: {target})"
            tables.append(Table(title=title, rows=[["objective", *(label for label, _, _ in columns)], *body]))
    return tables


def policy_of(lag: int) -> str:
    return "on-policy" if lag == 0 else f"{lag} steps off-policy"


def _by_lag(title: str, rows: Sequence[Row], names: Sequence[str], key: str, digits: int) -> Table:
    lags = lags_of(rows)
    cells = grouped(rows, "name", "lag")
    body = [[name, *(cell(cells.get((name, lag), []), key, digits) for lag in lags)] for name in names]
    return Table(title=title, rows=[["objective", *(f"lag {lag}" for lag in lags)], *body])

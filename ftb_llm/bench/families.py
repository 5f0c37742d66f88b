"""`ftb-llm bench families`: which model families the learner scores right, which it refuses, and whether any is scored wrongly.

    family -> its task -> a process that builds, checks, loads and compares -> what was found -> verdict -> table

Right is what is as near to the naive loop in float64 as the naive loop in the learner's own dtype is, up to a factor.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from enum import StrEnum
from importlib.metadata import version
from typing import Any

from ftb_llm.bench.family_configs_dense import DENSE
from ftb_llm.bench.family_configs_experts import EXPERTS
from ftb_llm.bench.family_configs_other import OTHER
from ftb_llm.bench.family_spec import Errors, Family, Found, Task
from ftb_llm.bench.tables import NONE, Table
from ftb_llm.bench.workers import Late, Worker
from ftb_llm.errors import ProcessDied

FAMILIES: tuple[Family, ...] = tuple(sorted((*DENSE, *OTHER, *EXPERTS), key=lambda one: one.name))
DTYPES = ("float32", "bfloat16")
TRIAL_GOAL = 2.0  # seconds, of a model of 135 M parameters in float32
SECONDS = 120.0  # for one family, of which most take two
VERSIONS = ("torch", "transformers", "peft")

FLOAT32_FACTOR = 10.0
BFLOAT16_FACTOR, EXPERTS_FACTOR = 3.0, 10.0  # a router that rounding tips over sends a token elsewhere
# Of rounding: how far what is right may be, however near the naive loop came. A clipped value's gradient is one or nothing.
LEAST = {"float32": Errors(value=1e-5, reference=1e-5, gradient=1e-3), "bfloat16": Errors(value=1e-3, reference=1e-3, gradient=1e-2)}
LEAST_MERGED = 1e-5


class Verdict(StrEnum):
    """How a family came out."""

    RIGHT = "right"
    REFUSED = "refused"  # before anything was loaded, with a reason
    WRONG = "wrong"
    FAILED = "failed"  # after the check had said ok


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One family in one dtype."""

    name: str
    model_type: str
    dtype: str
    verdict: Verdict
    why: str  # empty for what is right
    found: Found

    def document(self) -> dict[str, Any]:
        return asdict(self)


def measure(families: Sequence[Family], *, dtype: str, judge: Callable[[Task], Found], say: Callable[[str], None]) -> list[Row]:
    """Every family in turn, in a process that is begun anew where it dies or takes too long."""
    rows = []
    with Worker(judge) as worker:
        for family in families:
            task = Task(family=family, dtype=dtype)
            try:
                found = worker.call(task, seconds=SECONDS)
            except Late:
                found = Found(failed=f"took over {SECONDS:.0f} s")
            except ProcessDied as error:
                found = Found(failed=str(error))
            rows.append(row_of(task, found))
            say(told(rows[-1], len(rows), len(families)))
    return rows


def row_of(task: Task, found: Found) -> Row:
    verdict, why = judged(task, found)
    return Row(name=task.family.name, model_type=task.family.model_type, dtype=task.dtype, verdict=verdict, why=why, found=found)


def judged(task: Task, found: Found) -> tuple[Verdict, str]:
    """The verdict and its reason."""
    if found.refused is not None:
        return Verdict.REFUSED, found.refused
    if found.failed is not None:
        return Verdict.FAILED, found.failed
    assert found.ours is not None and found.naive is not None, "numbers, since there is no reason why not"
    far = [f"{name} {ours:.1e}, at most {limit:.1e}" for name, ours, limit in compared(task, found.ours, found.naive) if not ours <= limit]
    if found.merged is not None and not found.merged <= LEAST_MERGED:
        far.append(f"merged export {found.merged:.1e}, at most {LEAST_MERGED:.1e}")
    return (Verdict.WRONG, "; ".join(far)) if far else (Verdict.RIGHT, "")


def compared(task: Task, ours: Errors, naive: Errors) -> Iterable[tuple[str, float, float]]:
    """Each of our errors, and the largest that is still right."""
    factor = FLOAT32_FACTOR if task.dtype == "float32" else EXPERTS_FACTOR if task.family.experts else BFLOAT16_FACTOR
    for name in ("value", "reference", "gradient"):
        limit = max(getattr(LEAST[task.dtype], name), factor * getattr(naive, name))
        yield name, getattr(ours, name), limit if math.isfinite(limit) else 0.0


def told(row: Row, index: int, count: int) -> str:
    return f"{index}/{count} {row.name}: {row.verdict}{f' ({row.why})' if row.why else ''}"


def counts(rows: Sequence[Row]) -> dict[str, int]:
    found = Counter(row.verdict for row in rows)
    return {verdict.value: found[verdict] for verdict in Verdict}


def headline(rows: Sequence[Row]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts(rows).items())


def families_table(rows: Sequence[Row]) -> Table:
    """One line per family: the learner's errors beside the naive loop's own in the same dtype."""
    header = ["family", "type", "verdict", "packed", "adapted", "value", "gradient", "merged", "why"]
    dtype = rows[0].dtype if rows else DTYPES[0]
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    title = f"{headline(rows)} ({dtype}, {versions}, {date.today().isoformat()})"
    return Table(title=title, rows=[header, *map(_cells, rows)])


def _cells(row: Row) -> list[str]:
    found = row.found
    if found.ours is None or found.naive is None:
        return [row.name, row.model_type, row.verdict, *[NONE] * 5, row.why]
    ours, naive = found.ours, found.naive
    merged = NONE if found.merged is None else f"{found.merged:.0e}"
    pairs = [f"{mine:.0e} ({its:.0e})" for mine, its in ((ours.value, naive.value), (ours.gradient, naive.gradient))]
    return [row.name, row.model_type, row.verdict, "yes" if found.packed else "no", f"{found.adapted:.0%}", *pairs, merged, row.why]


def documents(rows: Sequence[Row]) -> dict[str, Any]:
    """For --json."""
    return {"counts": counts(rows), "versions": {name: version(name) for name in VERSIONS}, "rows": [row.document() for row in rows]}


def trial_told(seconds: float) -> str:
    verdict = "met" if seconds < TRIAL_GOAL else "missed"
    return f"trial at load of a 135 M model, float32: {seconds:.2f} s (goal: under {TRIAL_GOAL:g} s; {verdict})"

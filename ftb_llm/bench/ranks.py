"""The learner's step on several ranks of this machine: what they tell each other, as a share of the step, and what they come to.

    Case -> JSON spec per rank count and sharding -> a process that starts the ranks -> one JSON line -> row -> summary, table

One rank comes first and leaves its adapter, with which the others' is compared after as many steps on the same samples.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftb_llm.bench.learner import BUSY, Found, Row, in_a_process, machine_facts
from ftb_llm.bench.step_cases import Case, Shape
from ftb_llm.bench.step_report import number
from ftb_llm.bench.tables import Table
from ftb_llm.machine import core_count

WARMUP = 1  # steps that are not counted
SHARDINGS = ("replicated", "fsdp2")


def measure(
    case: Case,
    *,
    counts: Sequence[int],
    steps: int,
    call: Callable[[dict[str, Any]], Found],
    model: Callable[[Shape], Path],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that was measured, as it is written and printed."""
    cores = core_count()
    machine = machine_facts(cores)  # before the bench itself is the load
    model_path = str(model(case.shape))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count, sharding in pairs(counts):
            spec = case.spec(model_path=model_path, warmup=WARMUP, steps=steps, threads=max(1, cores // count))
            spec |= {"ranks": count, "sharding": sharding, "adapter": str(Path(folder) / "alone.safetensors")}
            rows.append(row_of(case, spec, call(spec)))
            say(told(rows[-1]))
    found = summary(rows, cores=cores) | {"rows": rows, "machine": machine}
    for note in found["notes"]:
        say(note)
    return found


def measure_in_a_process(spec: dict[str, Any]) -> Found:
    return in_a_process([sys.executable, "-m", "learner.rank_bench"], spec)


def pairs(counts: Sequence[int]) -> list[tuple[int, str]]:
    """Rank counts and shardings in the order in which they are measured; one rank has nothing to shard."""
    return [(1, SHARDINGS[0]), *((count, sharding) for count in sorted({*counts} - {1}) for sharding in SHARDINGS)]


def row_of(case: Case, spec: Mapping[str, Any], found: Found) -> Row:
    """Medians over the timed steps; of the ranks' seconds in a step the longest counts."""
    ranks = [one["steps"][WARMUP:] for one in found["ranks"]]

    def longest(name: str) -> list[float]:
        return [max(step.get(name, 0.0) for step in steps) for steps in zip(*ranks, strict=True)]

    each = longest("seconds")
    row: Row = case.facts() | {"ranks": spec["ranks"], "sharding": spec["sharding"], "threads": spec["threads"]}
    row |= {"seconds": statistics.median(each), "seconds_each": each, "tokens_per_second": case.tokens_per_step / statistics.median(each)}
    for name, metric in (("communication", "time/communication_seconds"), ("wait", "time/rank_wait_seconds")):
        spent = longest(metric)
        row[f"{name}_seconds"] = statistics.median(spent)
        row[f"{name}_share"] = statistics.median(part / whole for part, whole in zip(spent, each, strict=True))
    return row | {
        "gradient_bytes": found["gradient_bytes"] if spec["ranks"] > 1 else 0,
        "adapter_difference": max(one["adapter_difference"] for one in found["ranks"]),
        "others_cores": found["others_cores"],
    }


def summary(rows: Sequence[Row], *, cores: int) -> dict[str, Any]:
    """The headline numbers, and what to keep in mind about the others."""
    several = [row for row in rows if row["ranks"] > 1]
    crowded = sorted({row["ranks"] for row in several if row["ranks"] > cores})
    notes = []
    if crowded:
        notes.append(f"{' and '.join(map(str, crowded))} ranks on {cores} cores: the step's time says nothing about scaling, only the shares do")
    if any(row["others_cores"] >= BUSY for row in rows):
        notes.append("other programs used the machine meanwhile, so the times mean little")
    return {
        "communication_share": max((row["communication_share"] for row in several if row["sharding"] == "replicated"), default=None),
        "adapter_difference": max((row["adapter_difference"] for row in several), default=None),
        "notes": notes,
    }


def told(row: Row) -> str:
    """A row in one line."""
    shares = f"{row['communication_share']:.2%} communication, {row['wait_share']:.1%} wait"
    return f"{row['size']}, {row['ranks']} {row['sharding']}: {row['seconds']:.2f} s a step, {shares}"


def ranks_tables(found: Mapping[str, Any]) -> list[Table]:
    """One line per rank count and sharding, then the headline numbers."""
    rows: Sequence[Row] = found["rows"]
    machine, first = found["machine"], rows[0]
    columns = {
        "ranks": ("ranks", "d"),
        "sharding": ("sharding", "s"),
        "threads each": ("threads", "d"),
        "s a step": ("seconds", ".2f"),
        "tokens/s": ("tokens_per_second", ",.0f"),
        "communication, s": ("communication_seconds", ".4f"),
        "of the step": ("communication_share", ".2%"),
        "wait of the step": ("wait_share", ".1%"),
        "gradient bytes summed": ("gradient_bytes", ",d"),
        "adapter from one rank's": ("adapter_difference", ".1e"),
        "cores others used": ("others_cores", ".1f"),
    }
    shape = f"{first['size']} ({first['hidden']} x {first['layers']}), {first['groups']} groups of {first['group_size']}"
    title = f"One step of several ranks ({shape}; {machine['cores']} cores, torch {machine['torch']}, gloo, float32, {machine['date'][:10]})"
    body = [[format(row[key], form) for key, form in columns.values()] for row in rows]
    short = [["communication_share", number(found["communication_share"], ".2%")], ["adapter_difference", number(found["adapter_difference"], ".1e")]]
    return [
        Table(title="; ".join([title, *found["notes"]]), rows=[list(columns), *body]),
        Table(title="In short (the share is the largest of replicated ranks)", rows=[["number", "value"], *short]),
    ]

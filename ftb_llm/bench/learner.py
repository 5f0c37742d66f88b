"""The learner's step beside a loop with full logits and beside TRL, in one run on one machine.

    Case -> JSON spec -> a process per contender and turn -> one JSON line -> row -> summary, tables, picture

A process of its own gives each contender a peak memory of its own; turns (ours, full logits, TRL, ours, ...) spread what
else the machine does over all of them. Ours must succeed. What another contender can't do is a row with the reason and no number.
"""

import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from ftb_llm.bench.step_cases import CONTENDERS, HEADLINES, Case, Shape
from ftb_llm.bench.step_flops import case_flops
from ftb_llm.errors import FtbError
from ftb_llm.machine import core_count

WARMUP = 1  # steps of each turn that are not counted
TURNS = 2  # that `steps` is shared out over; a case may take fewer
PROCESS_SECONDS = 1200.0
BUSY = 0.2  # cores: where others use more, times say little
Row = dict[str, Any]
Found = dict[str, Any]  # a process's JSON line
Call = Callable[[str, dict[str, Any]], Found]  # a contender's name and its spec


class Failed(FtbError, RuntimeError):
    """A contender gave no numbers; the message says why."""


def measure(
    cases: Sequence[Case],
    *,
    steps: int,
    threads: int,
    call: Call,
    model: Callable[[Shape], Path],
    say: Callable[[str], None],
    names: Sequence[str] = CONTENDERS,
) -> dict[str, Any]:
    """Everything that was measured, as it is written and printed."""
    machine = machine_facts(threads)  # before the bench itself is the load
    rows: list[Row] = []
    for case in cases:
        rows += measure_case(case, names, steps=steps, threads=threads, call=call, model_path=model(case.shape), say=say)
    return summary(rows) | {"rows": rows, "machine": machine}


def measure_case(case: Case, names: Sequence[str], *, steps: int, threads: int, call: Call, model_path: Path, say: Callable[[str], None]) -> list[Row]:
    turns = min(case.turns, steps)
    spec = case.spec(model_path=str(model_path), warmup=WARMUP, steps=-(-steps // TURNS), threads=threads)
    found: dict[str, list[Found]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _ in range(turns):
        for name in names:
            if name in failed:
                continue
            try:
                check_memory(case, name)
                found[name].append(call(name, spec | {"contender": name}))
            except Failed as problem:
                if name == "ours":
                    raise
                failed[name] = str(problem)
    rows = [row_of(case, name, found[name], error=failed.get(name)) for name in names]
    for row in rows:
        row["speedup"] = ratio(row["seconds"], rows[0]["seconds"])
        say(told(row))
    return rows


def check_memory(case: Case, name: str) -> None:
    """The loop with full logits is not started where it would drive the machine out of memory."""
    free = psutil.virtual_memory().available
    if name == "full logits" and case.full_logits_bytes > free:
        raise Failed(f"needs about {case.full_logits_bytes / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free")


def row_of(case: Case, name: str, turns: Sequence[Found], *, error: str | None) -> Row:
    """A contender's numbers over all its turns; none of them where it failed."""
    row: Row = case.facts() | {"contender": name, "error": error}
    empty = ("seconds", "seconds_each", "tokens_per_second", "loaded_bytes", "peak_bytes", "step_bytes", "losses", "versions", "settings", "others_cores")
    row |= dict.fromkeys((*empty, "flops", "matmul_rates", "matmul_fraction"))
    if error is not None:
        return row
    if any(one["tokens_per_step"] != case.tokens_per_step for one in turns):
        raise FtbError(f"{name} took steps of {turns[0]['tokens_per_step']} tokens, not of the case's {case.tokens_per_step}")
    each = [seconds for one in turns for seconds in one["seconds"][WARMUP:]]
    widest = max(turns, key=lambda one: int(one["peak_bytes"] - one["loaded_bytes"]))
    seconds = statistics.median(each)
    row |= {
        "seconds": seconds,
        "seconds_each": each,
        "tokens_per_second": case.tokens_per_step / seconds,
        "loaded_bytes": widest["loaded_bytes"],
        "peak_bytes": widest["peak_bytes"],
        "step_bytes": widest["peak_bytes"] - widest["loaded_bytes"],
        "losses": turns[0]["losses"],
        "versions": turns[0]["versions"],
        "settings": turns[0].get("settings"),
        "others_cores": max(one["others_cores"] for one in turns),
    }
    if rates := [one["matmul"] for one in turns if "matmul" in one]:
        best = {shape: max(rate[shape] for rate in rates) for shape in rates[0]}
        flops = case_flops(case)
        row |= {"flops": flops, "matmul_rates": best, "matmul_fraction": flops / seconds / best["square"]}
    return row


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The headline numbers, each null where it was not measured."""
    at = {(row["size"], row["ratio"], row["contender"]): row for row in rows}
    size = next((name for name in HEADLINES if (name, "1:1", "ours") in at), None)

    def of(size: str | None, ratio: str, contender: str, column: str) -> Any:
        return at.get((str(size), ratio, contender), {}).get(column)

    memory = [[of("vocabulary", shape, name, "step_bytes") for name in CONTENDERS[:2]] for shape in dict.fromkeys(row["ratio"] for row in rows)]
    return {
        "speedup_vs_trl_1to1": of(size, "1:1", "TRL", "speedup"),
        "speedup_vs_trl_8to1": of(size, "8:1", "TRL", "speedup"),
        "speedup_vs_full_logits_1to1": of(size, "1:1", "full logits", "speedup"),
        "speedup_vs_full_logits_8to1": of(size, "8:1", "full logits", "speedup"),
        "peak_memory_ratio_vs_full_logits": max((ours / full for ours, full in memory if ours and full), default=None),
        "matmul_fraction": of("large", "1:1", "ours", "matmul_fraction"),
        "speedup_size": size,
        "loss_difference": loss_difference(rows),
    }


def loss_difference(rows: Sequence[Row]) -> float | None:
    """The largest relative difference between our losses and those of the loop with full logits, step by step: they do the same."""
    pairs: list[tuple[float, float]] = []
    for ours, full in itertools.pairwise(rows):
        if (ours["contender"], full["contender"]) == CONTENDERS[:2] and full["losses"]:
            pairs += zip(ours["losses"], full["losses"], strict=True)
    return max((abs(own - other) / abs(other) for own, other in pairs), default=None)


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def told(row: Row) -> str:
    """A row in one line."""
    head = f"{row['size']} {row['ratio']} {row['contender']}"
    if row["error"] is not None:
        return f"{head}: not measured: {row['error']}"
    line = f"{head}: {row['seconds']:.2f} s a step, {row['step_bytes'] / 2**30:.2f} GiB above the model"
    return line if row["others_cores"] < BUSY else f"{line}; others used {row['others_cores']:.1f} cores meanwhile, so the time means little"


def machine_facts(threads: int) -> dict[str, Any]:
    return {
        "cores": core_count(),
        "threads": threads,
        "processor": platform.processor() or platform.machine(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def caller(trl: Path | str) -> Call:
    """Contenders in processes. `trl` is the interpreter that has TRL, or why there is none."""

    def call(name: str, spec: dict[str, Any]) -> Found:
        if name != "TRL":
            return in_a_process([sys.executable, "-m", "learner.contenders"], spec)
        if isinstance(trl, str):
            raise Failed(trl)
        from ftb_llm.bench.trl import SCRIPT

        return in_a_process([str(trl), "-I", str(SCRIPT)], spec)

    return call


def in_a_process(command: Sequence[str], spec: Mapping[str, Any]) -> Found:
    """The JSON on the last line of what the command prints when it is given the spec's path."""
    threads = str(spec["threads"])
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        began, busy, own = time.monotonic(), busy_seconds(), children_seconds()
        try:
            done = subprocess.run([*command, str(path)], env=env, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise Failed(f"took more than {PROCESS_SECONDS:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise Failed(f"its process ended with exit code {done.returncode}: {lines[-1]}")
    others = (busy_seconds() - busy) - (children_seconds() - own)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found | {"others_cores": max(0.0, others) / (time.monotonic() - began)}


def busy_seconds() -> float:
    """Of all cores, since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def children_seconds() -> float:
    """Of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def built_model(shape: Shape) -> Path:
    """The folder of the random model, built in a process of its own."""
    command = [sys.executable, "-m", "ftb_llm.bench.random_model", json.dumps(asdict(shape))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FtbError(f"the random model can't be built: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Path(done.stdout.splitlines()[-1])

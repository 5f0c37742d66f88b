"""`ftb-llm bench gpu`: the learner's step on a CUDA device against that device's matrix products, and its parts beside others.

spec -> a process of its own (learner/gpu_bench.py) -> one JSON line -> shares of the device's rate, tables
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftb_llm.bench.learner import Found, in_a_process, machine_facts, ratio
from ftb_llm.bench.step_cases import Case, Shape
from ftb_llm.bench.step_flops import case_flops
from ftb_llm.bench.step_report import GIB, number
from ftb_llm.bench.tables import NONE, Table

WARMUP = 2
REPEATS = 10
SQUARE = 8192
CHUNK_MIB = (16, 32, 64, 128, 256, 512)

# Qwen2.5-1.5B's shape, with random weights; the vocabularies are compared on four of its layers.
SHAPE = Shape(hidden=1536, layers=28, vocabulary=151_936, head_width=128, key_value_heads=2, feed_forward=8960, tied=True, dtype="bfloat16")
CASE = Case(size="1.5B", shape=SHAPE, groups=4, group_size=4, prompt_tokens=1024, completion_tokens=1024)
VOCABULARIES = tuple(replace(CASE, size="4 layers", shape=replace(SHAPE, layers=4, vocabulary=vocabulary)) for vocabulary in (32_000, 151_936))

# Rated bf16 operations per second, dense, as the makers give them; the first name that the device's holds counts.
RATED = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def measure(
    case: Case,
    vocabularies: Sequence[Case],
    *,
    steps: int,
    threads: int,
    model: Callable[[Shape], Path],
    call: Callable[[dict[str, Any]], Found],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that was measured, as it is written and printed."""
    machine = machine_facts(threads)
    say("building the random models, where the cache folder lacks them")
    specs = [spec_of(one, model_path=model(one.shape), steps=steps, threads=threads) for one in (case, *vocabularies)]
    say("measuring; this takes a few minutes")
    found = call(specs[0] | {"vocabularies": specs[1:]})
    return summary(case, found) | {"rows": found["rows"], "machine": machine}


def spec_of(case: Case, *, model_path: Path, steps: int, threads: int) -> dict[str, Any]:
    """What the process is told, as JSON; each micro-batch is one group."""
    shape, length = case.shape, case.prompt_tokens + case.completion_tokens
    group = {"group_size": case.group_size, "prompt_tokens": case.prompt_tokens, "completion_tokens": case.completion_tokens}
    heads = {"heads": shape.heads, "key_value_heads": shape.key_value_width // shape.head_width, "head_width": shape.head_width}
    return case.spec(model_path=str(model_path), warmup=WARMUP, steps=steps, threads=threads) | {
        "name": f"{case.size}, vocabulary {shape.vocabulary:,}",
        "model": {"dtype": shape.dtype},
        "learner": {"gpus": 1, "micro_batch_tokens": case.prompt_tokens + case.group_size * case.completion_tokens},
        "actors": {"max_model_len": max(512, length)},
        "repeats": REPEATS,
        "square": SQUARE,
        "head": {"places": case.group_size * case.completion_tokens, "width": shape.hidden, "vocabulary": shape.vocabulary, "chunk_mib": list(CHUNK_MIB)},
        "attention": {"groups": 1, **group, **heads},
        "vocabularies": [],
    }


def in_its_process(spec: dict[str, Any]) -> Found:
    return in_a_process([sys.executable, "-m", "learner.gpu_bench"], spec)


def summary(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    """The headline numbers, each null where it was not measured or where the device is not in the table."""
    step, *others = (row for row in found["rows"] if row["part"] in ("step", "vocabulary"))
    seconds, rated = step["seconds"], rated_flops(found["device"]["name"])
    rate = ratio(case_flops(case), seconds)
    peaks = [row["peak_bytes"] for row in others]
    return {
        "mfu": ratio(rate, found["matmul_rate"]),
        "mfu_rated": ratio(rate, rated),
        "tokens_per_second": ratio(case.tokens_per_step, seconds),
        "step_seconds": seconds,
        "step_flops": case_flops(case),
        "matmul_rate": found["matmul_rate"],
        "rated_rate": rated,
        "loaded_bytes": step["loaded_bytes"],
        "step_bytes": step["peak_bytes"],
        "peak_memory_ratio_of_vocabularies": ratio(peaks[-1], peaks[0]) if peaks else None,
        "device": found["device"],
    }


def rated_flops(device: str) -> float | None:
    return next((rate for name, rate in RATED.items() if name in device), None)


def gpu_tables(found: Mapping[str, Any]) -> list[Table]:
    """The headline numbers, then every row."""
    facts = [
        ["s a step", number(found["step_seconds"], ".3f")],
        ["tokens/s", number(found["tokens_per_second"], ",.0f")],
        ["operations that a step needs, 1e12", f"{found['step_flops'] / 1e12:,.1f}"],
        ["measured rate of a square product, 1e12/s", f"{found['matmul_rate'] / 1e12:,.1f}"],
        ["rated, 1e12/s", number(found["rated_rate"] and found["rated_rate"] / 1e12, ",.0f")],
        ["step / measured rate", number(found["mfu"], ".3f")],
        ["step / rated", number(found["mfu_rated"], ".3f")],
        ["loaded, GiB", gib(found["loaded_bytes"])],
        ["peak above it, GiB", gib(found["step_bytes"])],
        ["peak above the model, large vocabulary / small", number(found["peak_memory_ratio_of_vocabularies"], ".3f")],
    ]
    body = [
        [row["part"], row["name"], number(row["seconds"] and 1e3 * row["seconds"], ",.2f"), gib(row["peak_bytes"]), row["error"] or ""] for row in found["rows"]
    ]
    device = found["device"]
    where = f"{device['name']}, torch {device['versions']['torch']}, {found['machine']['date'][:10]}"
    return [
        Table(title=f"The learner's step on a GPU ({where})", rows=[["number", "value"], *facts]),
        Table(title="The step and its parts, forward and backward", rows=[["part", "what", "ms", "peak above what was held, GiB", "why not"], *body]),
    ]


def gib(value: int | None) -> str:
    return NONE if value is None else f"{value / GIB:.2f}"

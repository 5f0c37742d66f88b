"""What `ftb-llm bench gpu` measures, in a process of its own: `python -m learner.gpu_bench SPEC` prints one JSON line.

Every function takes the device, so that the CPU can try it on small sizes; only memory is counted on CUDA alone.
"""

import gc
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftb_llm.errors import ConfigError
from learner.attention import attention_forward
from learner.contenders import ours
from learner.head import chosen_logprobs
from learner.packing import pack

Row = dict[str, Any]
Work = Callable[[], object]


def run(spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """All parts, one after the other. A row that runs out of the device's memory says so and has no numbers."""
    torch.manual_seed(spec["seed"])
    dtype = getattr(torch, spec["model"]["dtype"])
    square = spec["square"]
    found: dict[str, Any] = {"device": device_facts(device), "matmul_rate": matmul_rate(square, dtype=dtype, device=device, repeats=spec["repeats"])}
    head = head_rows(**spec["head"], dtype=dtype, device=device, repeats=spec["repeats"])
    attention = attention_rows(**spec["attention"], dtype=dtype, device=device, repeats=spec["repeats"])
    steps = [step_row("step", spec, device)]
    steps += [step_row("vocabulary", spec | other, device) for other in spec["vocabularies"]]
    steps += [step_row("compiled", spec | {"learner": spec["learner"] | {"compile": True}}, device)]  # last: what is compiled may stay in memory
    return found | {"rows": [*steps, *head, *attention]}


def step_row(part: str, spec: dict[str, Any], device: torch.device) -> Row:
    """The learner's whole step; its peak is what it takes above the loaded model."""

    def measure() -> Row:
        _, step = ours(spec)
        loaded = held(device)
        losses: list[float] = []
        numbers = measured(lambda: losses.append(step(len(losses) + 1)), device, repeats=spec["steps"], warmup=spec["warmup"])
        return numbers | {"loaded_bytes": loaded, "losses": losses}

    return attempt({"part": part, "name": spec["name"], "loaded_bytes": None, "losses": None}, measure)


def head_rows(*, places: int, width: int, vocabulary: int, chunk_mib: Sequence[int], dtype: torch.dtype, device: torch.device, repeats: int) -> list[Row]:
    """Log-probs of one token at each place and their gradient: ours by chunk, all logits at once, and Liger's kernel where it is installed."""
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device).requires_grad_(False)
    hidden_SD = torch.randn(places, width, dtype=dtype, device=device, requires_grad=True)
    source_S = torch.arange(places, device=device)
    target_S = torch.randint(vocabulary, (places,), device=device)

    def gradient(total: Tensor) -> Tensor:
        return torch.autograd.grad(total, hidden_SD)[0]

    def chunked(mib: int) -> Work:
        return lambda: gradient(chosen_logprobs(head, hidden_SD, source_S, target_S, chunk_bytes=mib * 2**20).sum())

    def naive() -> Tensor:
        return gradient(head(hidden_SD).float().log_softmax(-1).gather(-1, target_S.unsqueeze(-1)).sum())

    works: dict[str, Work] = {f"ours, {mib} MiB": chunked(mib) for mib in chunk_mib} | {"all logits": naive}
    rows = [attempt({"part": "head", "name": name}, partial(measured, work, device, repeats=repeats)) for name, work in works.items()]
    return [*rows, liger_row(head, hidden_SD, target_S, repeats=repeats)]


def liger_row(head: nn.Linear, hidden_SD: Tensor, target_S: Tensor, *, repeats: int) -> Row:
    """Its fused linear cross entropy, whose gradient of the hidden states is taken; the head is frozen there too."""
    row: Row = {"part": "head", "name": "Liger"}
    if importlib.util.find_spec("liger_kernel") is None:
        return row | nothing("liger_kernel is not installed")
    if hidden_SD.device.type != "cuda":
        return row | nothing("Liger's kernels need a CUDA device")
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return attempt(row, lambda: measured(lambda: torch.autograd.grad(loss(head.weight, hidden_SD, target_S), hidden_SD), hidden_SD.device, repeats=repeats))


def attention_rows(
    *,
    groups: int,
    group_size: int,
    prompt_tokens: int,
    completion_tokens: int,
    heads: int,
    key_value_heads: int,
    head_width: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> list[Row]:
    """One layer's attention, forward and backward, over the same samples: packed, and as whole rows of prompt and completion."""
    batch = pack([[0] * prompt_tokens] * groups, [[[0] * completion_tokens] * group_size] * groups, device)

    def parts(rows: int, tokens: int) -> list[Tensor]:
        sizes = (heads, key_value_heads, key_value_heads)
        return [torch.randn(rows, size, tokens, head_width, dtype=dtype, device=device, requires_grad=True) for size in sizes]

    def packed() -> Row:
        query, key, value = parts(1, len(batch.ids_N))
        grad = torch.randn(1, len(batch.ids_N), heads, head_width, dtype=dtype, device=device)
        module = nn.Module()

        def work() -> object:
            out, _ = attention_forward(module, query, key, value, None, packed=batch, scaling=head_width**-0.5)
            return torch.autograd.grad(out, (query, key, value), grad)

        return measured(work, device, repeats=repeats)

    def whole() -> Row:
        query, key, value = parts(groups * group_size, prompt_tokens + completion_tokens)
        grad = torch.randn_like(query)
        repeat = heads // key_value_heads

        def work() -> object:
            out = functional.scaled_dot_product_attention(query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), is_causal=True)
            return torch.autograd.grad(out, (query, key, value), grad)

        return measured(work, device, repeats=repeats)

    return [attempt({"part": "attention", "name": name}, work) for name, work in (("packed", packed), ("whole rows", whole))]


def matmul_rate(side: int, *, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """Operations per second of a product of square matrices."""
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return float(2 * side**3 / measured(lambda: left @ right, device, repeats=repeats)["seconds"])


def measured(work: Work, device: torch.device, *, repeats: int, warmup: int = 1) -> Row:
    """Median seconds, and the most memory that was held at a time beyond what was held before."""
    for _ in range(warmup):
        work()
    synchronize(device)
    before = held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
    return {"seconds": statistics.median(seconds), "seconds_each": seconds, "peak_bytes": peak, "error": None}


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with its numbers, or with the reason why the device could not give them."""
    try:
        return row | measure()
    except torch.OutOfMemoryError as error:
        return row | nothing(f"out of memory: {str(error).splitlines()[0]}")
    except ConfigError as error:
        return row | nothing(str(error))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def nothing(reason: str) -> Row:
    return {"seconds": None, "seconds_each": None, "peak_bytes": None, "error": reason}


def held(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_facts(device: torch.device) -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    if device.type != "cuda":
        return {"name": device.type, "memory_bytes": None, "cuda": None, "versions": versions}
    facts = torch.cuda.get_device_properties(device)
    return {"name": facts.name, "memory_bytes": facts.total_memory, "cuda": torch.version.cuda, "versions": versions}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), torch.device("cuda"))))

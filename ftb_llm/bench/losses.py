"""What a loss costs: the milliseconds of log Z and weights for many groups at once, on one core."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from ftb_llm.bench.tables import Table

GROUPS, GROUP_SIZE = 4096, 16
STEP_GROUPS, STEP_GROUP_SIZE = 8, 32  # of the quickstart
SPREAD = 3.0  # standard deviation of Delta within a group
REPEATS = 50
MEMBERS: tuple[tuple[str, float | None, float | None], ...] = (
    ("reverse_kl", None, None),
    ("forward_kl", None, None),
    ("pearson", None, None),
    ("neyman", None, None),
    ("hellinger", None, None),
    ("alpha", 0.75, None),
    ("tv", None, None),
    ("tv", None, 0.1),
    ("js", None, None),
)


def measure_losses() -> list[dict[str, Any]]:
    """One row per member, and one for all shadow divergences of a step of the quickstart."""
    import torch

    from ftb_llm.divergences import get_divergence
    from ftb_llm.shadow import shadow_metrics

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        delta_GK = SPREAD * torch.randn(GROUPS, GROUP_SIZE, dtype=torch.float64, generator=generator)
        rows = []
        for name, alpha, width in MEMBERS:
            member = get_divergence(name, alpha, width=width)
            row = {"divergence": name, "alpha": alpha, "ms": median_ms(lambda member=member: member.normalise(delta_GK))}  # type: ignore[misc]
            rows.append(row | {"width": width, "call": "normalise", "groups": GROUPS, "group_size": GROUP_SIZE})
        step_GK = SPREAD * torch.randn(STEP_GROUPS, STEP_GROUP_SIZE, dtype=torch.float64, generator=generator)
        row = {"divergence": "all", "alpha": None, "ms": median_ms(lambda: shadow_metrics(step_GK))}
        return [*rows, row | {"width": None, "call": "shadow_metrics", "groups": STEP_GROUPS, "group_size": STEP_GROUP_SIZE}]
    finally:
        torch.set_num_threads(threads)


def median_ms(call: Callable[[], object]) -> float:
    """Median time of a call, after two that warm it up."""
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def losses_table(rows: Sequence[dict[str, Any]]) -> Table:
    header = ["what", "groups x completions", "ms"]
    body = [[_told(row), f"{row['groups']} x {row['group_size']}", f"{row['ms']:.2f}"] for row in rows]
    return Table(title=f"Log Z and weights on one core, median of {REPEATS}", rows=[header, *body])


def _told(row: dict[str, Any]) -> str:
    if row["call"] == "shadow_metrics":
        return "all shadow divergences of a step"
    number = row["alpha"] if row["width"] is None else row["width"]
    return row["divergence"] if number is None else f"{row['divergence']}:{number:g}"

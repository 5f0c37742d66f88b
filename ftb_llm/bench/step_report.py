"""The learner's step in a table and as a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftb_llm.bench.plot import Panel, Point, picture
from ftb_llm.bench.step_cases import COMPILED, CONTENDERS
from ftb_llm.bench.tables import NONE, Table

Row = dict[str, Any]
GIB = 2**30


def learner_tables(found: Mapping[str, Any]) -> list[Table]:
    """One line per case and contender, then the matrix rates, then the headline numbers."""
    rows: Sequence[Row] = found["rows"]
    machine = found["machine"]
    where = f"{machine['threads']} threads, torch {machine['torch']}, float32, {machine['date'][:10]}"
    header = [
        "model",
        "prompt : completion",
        "contender",
        "s a step",
        "tokens/s",
        "ours is faster by",
        "loaded, GiB",
        "peak above it, GiB",
        "cores others used",
    ]
    body = [
        [
            f"{row['size']} ({row['hidden']} x {row['layers']}, vocabulary {row['vocabulary']:,})",
            f"{row['groups'] * row['group_size']} x ({row['prompt_tokens']} + {row['completion_tokens']})",
            row["contender"],
            *(number(row[key], form) for key, form in (("seconds", ".2f"), ("tokens_per_second", ",.0f"))),
            NONE if row["contender"] == "ours" else number(row["speedup"], ".2f"),
            *(number(row[key] and row[key] / GIB, ".2f") for key in ("loaded_bytes", "step_bytes")),
            number(row["others_cores"], ".1f"),
        ]
        for row in rows
    ]
    title = f"One step of the learner ({where}); tokens are prompt and completion of every row, for every contender alike"
    own = [row for row in rows if row["matmul_fraction"] is not None]
    rates = [
        [
            f"{row['size']}, {row['prompt_tokens']} + {row['completion_tokens']}",
            f"{row['flops'] / 1e9:,.0f}",
            f"{row['flops'] / row['seconds'] / 1e9:.0f}",
            f"{row['matmul_rates']['square'] / 1e9:.0f}",
            f"{row['matmul_rates']['feed_forward'] / 1e9:.0f}",
            f"{row['matmul_fraction']:.2f}",
        ]
        for row in own
    ]
    columns = ["model", "GFLOP a step needs", "GFLOP/s of the step", "of a large square product", "of the feed-forward's product", "step / square"]
    headline = [[name, number(value, ".3g")] for name, value in found.items() if isinstance(value, float) or value is None]
    tables = [Table(title=title, rows=[header, *body])]
    if rates:
        tables.append(Table(title="Our step against the machine's matrix products", rows=[columns, *rates]))
    return [*tables, Table(title=f"In short (speed-ups at the size {found['speedup_size'] or NONE})", rows=[["number", "value"], *headline])]


def learner_picture(found: Mapping[str, Any]) -> str:
    """Seconds a step and memory above the model, one place per case and a mark per contender."""
    rows = [row for row in found["rows"] if row["error"] is None]
    cases = list(dict.fromkeys(map(place_of, rows)))

    def panel(title: str, low_mid_high: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> Panel:
        lines: dict[str, Sequence[Point]] = {name: [Point(x=x, y=y, low=low, high=high) for x, low, y, high in points] for name, points in low_mid_high.items()}
        return Panel(title=title, lines=lines, x_label="model, or vocabulary, and prompt : completion", log=True, categories=cases, joined=False)

    seconds: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in (*CONTENDERS, COMPILED)}
    memory: dict[str, list[tuple[int, float, float, float]]] = {name: [] for name in seconds}
    for row in rows:
        place = cases.index(place_of(row))
        seconds[row["contender"]].append((place, min(row["seconds_each"]), row["seconds"], max(row["seconds_each"])))
        gib = row["step_bytes"] / GIB
        memory[row["contender"]].append((place, gib, gib, gib))
    drawn = [panel(title, {name: points for name, points in some.items() if points}) for title, some in (("Seconds a step", seconds), (MEMORY, memory))]
    return picture("One step of the learner beside a loop with full logits and beside TRL", [[drawn[0]], [drawn[1]]])


def place_of(row: Row) -> str:
    """A case in few letters, since seven of them stand side by side."""
    name = f"{row['vocabulary'] / 1000:.0f}k" if row["size"] == "vocabulary" else row["size"]
    return f"{name} {row['ratio']}"


MEMORY = "Peak memory above the loaded model, GiB"


def number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)

"""The parts of the page about learning: each takes the run's files and gives HTML, or says what is missing."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ftb_llm.config.schema import DIVERGENCES, Objective
from ftb_llm.report.files import Point, Row, RunFiles, thin
from ftb_llm.report.heatmap import heat_png, legend_png
from ftb_llm.report.summary import SummaryRow, judged_rows
from ftb_llm.report.svg import Mark, Series, bar_chart, line_chart
from ftb_llm.summary import configured, objective_changes, switch_steps
from ftb_llm.types import ObjectiveSpec

BARS_AT_MOST = 30
CURVE_POINTS = 100  # of curves that jump from step to step: means over neighbours show where they go

DISTANCE_NOTE = (
    "The estimates come from each step's own completions; the band is two standard errors to either side. They are too low where groups are small, "
    "and they can't see what no completion has hit. On stale completions they only say how far the policy is from the target on those."
)
MEMBERS_NOTE = (
    "Whichever divergence trains, each of them gives every completion of the step a weight. Where few completions carry the gradient, steps are noisy; "
    "where two divergences agree (cosine 1), they ask for the same step."
)


def missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of plain text cells; the columns in `numbers` are right-aligned."""
    classes = ['class="number"' if index in numbers else "" for index in range(len(head))]
    top = "".join(f'<th scope="col" {kind}>{escape(cell)}</th>' for cell, kind in zip(head, classes, strict=True))
    body = "".join("<tr>" + "".join(f"<td {kind}>{escape(cell)}</td>" for cell, kind in zip(row, classes, strict=True)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def side_by_side(*figures: str) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def summary(run: RunFiles) -> str:
    rows = judged_rows(run.summary)
    if not rows:
        return missing("No summary.json yet: it is written when the run ends.")
    body = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th><td class="number">{escape(row.value)}</td><td>{escape(row.goal)}</td><td>{_verdict(row)}</td></tr>'
        for row in rows
    )
    head = '<tr><th scope="col">Measure</th><th scope="col" class="number">Value</th><th scope="col">Goal</th><th scope="col">Verdict</th></tr>'
    return f'<div class="scroll"><table class="summary"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _verdict(row: SummaryRow) -> str:
    if row.met is None:
        return ""
    return '<span class="met">✓ met</span>' if row.met else '<span class="missed">✗ missed</span>'


def divergence_marks(run: RunFiles) -> list[Mark]:
    """Where the objective changed, as the steps themselves recorded it."""
    switches = {step for version in run.versions for step in switch_steps(version["config"]["objective"], run.versions)}
    return [Mark(step=step, label=text) for step, text in objective_changes(run.rows, switches)[1:]]


def learning(run: RunFiles) -> str:
    """Reward and exact total variation, the two curves that say whether it worked."""
    marks = divergence_marks(run)
    reward = [
        Series(label="sampled, mean of the step", points=run.points("reward/mean"), colour=0, look="faint"),
        Series(label="exact, of the policy", points=run.points("eval/reward"), colour=0, dots=True),
        Series(label="exact, of the target", points=run.points("eval/target_reward"), colour=1, look="dashed"),
    ]
    tv = [Series(label="exact TV", points=run.points("eval/exact_tv"), dots=True)]
    return side_by_side(line_chart("Reward", reward, marks=marks), line_chart("Exact total variation to the target", tv, marks=marks, from_zero=True))


def divergences(run: RunFiles) -> str:
    """Each divergence as the training batches say it and as the oracle knows it; then how the members would have trained."""
    marks = divergence_marks(run)
    parts = ["<h3>Between policy and target</h3>"]
    if not any(run.points(f"eval/exact_{name}") for name in DIVERGENCES):
        parts.append(missing("This run's task has no oracle, or it was not evaluated."))
    charts = [_distance_chart(run, name, marks) for name in DIVERGENCES if run.points(f"divergence/estimate/{name}") or run.points(f"eval/exact_{name}")]
    if not charts:
        return "".join([*parts, missing("Not recorded in this run.")])
    parts.append(f"<p>{DISTANCE_NOTE}</p>")
    parts.append(f'<div class="small">{"".join(charts)}</div>')
    parts.append("<h3>As each member would have trained</h3>")
    parts.append(f"<p>{MEMBERS_NOTE}</p>")
    parts.append(side_by_side(_ess_chart(run, marks), _cosine_chart(run, marks)))
    return "".join(parts)


def _distance_chart(run: RunFiles, name: str, marks: Sequence[Mark]) -> str:
    """Estimate with its error, and the exact value where there is one: of tv, both in the everyday scale."""
    scale = 0.5 if name == "tv" else 1.0
    rows = [row for row in run.rows if row.get(f"divergence/estimate/{name}") is not None]
    estimate = Series(
        label="estimate",
        points=[(row["step"], scale * row[f"divergence/estimate/{name}"]) for row in rows],
        band=[(row["step"], 2 * scale * row[f"divergence/stderr/{name}"]) for row in rows],
        look="faint",
    )
    exact = Series(label="exact", points=run.points(f"eval/exact_{name}"), colour=1, dots=True)
    unit = "half the sum of |p − q|" if name == "tv" else ""
    return line_chart(name.replace("_", " "), [estimate, exact], marks=marks, unit=unit, width=350, height=180)


def _ess_chart(run: RunFiles, marks: Sequence[Mark]) -> str:
    curves = [(name, run.points(f"divergence/ess/{name}")) for name in DIVERGENCES]
    return line_chart("Completions that carry the gradient", _member_curves(curves), marks=marks, unit="effective number per step", height=280, from_zero=True)


def _cosine_chart(run: RunFiles, marks: Sequence[Mark]) -> str:
    """Left out where no step trained with one of the members that are compared."""
    curves = [(name, [(row["step"], cosine) for row in run.rows if (cosine := _cosine_to_active(row, name)) is not None]) for name in DIVERGENCES]
    if not any(points for _, points in curves):
        return ""
    return line_chart("Agreement with the divergence in force", _member_curves(curves), marks=marks, unit="cosine of the weights", height=280)


def _cosine_to_active(row: Row, name: str) -> float | None:
    """None where what the step trained with, or `name`, is not among the members that were compared: they are untempered and exact."""
    if "objective" not in row:
        return None
    spec = ObjectiveSpec(**row["objective"])
    if spec.kind != "ftb" or spec.tempered or spec.width is not None or spec.divergence == "custom":
        return None
    active = spec.divergence
    if active == name and f"divergence/loss/{name}" in row:
        return 1.0
    found: float | None = row.get(f"divergence/cosine/{name}:{active}", row.get(f"divergence/cosine/{active}:{name}"))
    return found


def _member_curves(curves: Iterable[tuple[str, Sequence[Point]]]) -> list[Series]:
    return [Series(label=name.replace("_", " "), points=thin(points, CURVE_POINTS), colour=index) for index, (name, points) in enumerate(curves)]


def staleness(run: RunFiles) -> str:
    counts: Counter[int] = Counter()
    for row in run.rows:
        counts.update({int(age): count for age, count in row.get("staleness_counts", {}).items()})
    ages = [
        Series(label="mean", points=run.points("off_policy/staleness_mean"), colour=0),
        Series(label="max", points=run.points("off_policy/staleness_max"), colour=1, look="faint"),
    ]
    histogram = bar_chart("Age of the groups trained on", _bars(counts), x_label="steps behind the learner", y_label="groups")
    return side_by_side(histogram, line_chart("Staleness over the run", ages, unit="steps", from_zero=True))


def _bars(counts: Counter[int]) -> list[tuple[str, float]]:
    """One bar per age, or per range of ages where there are many."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BARS_AT_MOST)
    bars: Counter[int] = Counter()
    for age, count in counts.items():
        bars[(age - low) // width] += count
    starts = [low + index * width for index in range((high - low) // width + 1)]
    return [(str(start) if width == 1 else f"{start}–{start + width - 1}", float(bars[index])) for index, start in enumerate(starts)]


def heat_maps(run: RunFiles) -> str:
    """Policy beside target, prompt by prompt, on one colour scale per prompt."""
    newest = run.last or run.first  # a run that was stopped early has only the first
    target, shape = newest.get("target"), newest.get("grid_shape")
    if not target:
        return missing("No exact evaluation in this run's eval/ folder.")
    parts = []
    if shape:
        parts.append(_scale())
        parts += [_heat_row(run, prompt, target[prompt], tuple(shape)) for prompt in target]
    parts.append("<h3>Exact TV by prompt</h3>")
    rows = [(prompt, _tv(run.first, prompt), _tv(run.last, prompt)) for prompt in target]
    parts.append(table(["prompt", "before training", _when(run)], rows, numbers=(1, 2)))
    return "".join(parts)


def _when(run: RunFiles) -> str:
    return f"after step {run.last['step']}" if run.last else "after training"


def _scale() -> str:
    return (
        '<p class="scale">Each square is one completion. Colour grows with the square root of its probability, from 0 '
        f'<img src="{legend_png()}" alt="colour scale from dark to bright" width="128" height="10"> '
        "to the largest of the three pictures of the prompt.</p>"
    )


def _heat_row(run: RunFiles, prompt: str, target: Sequence[float], shape: tuple[int, ...]) -> str:
    """Three pictures: before training, now, target."""
    columns, cells = shape[-1], math.prod(shape)
    before, now = (evaluation.get("policy", {}).get(prompt) for evaluation in (run.first, run.last))
    panels = [("before training", before), (f"policy {_when(run)}", now), ("target", target)]
    highest = max(max(values[:cells]) for _, values in panels if values)
    pictures = "".join(_heat_panel(f"{prompt} {caption}", caption, values, cells, columns, highest) for caption, values in panels)
    return f'<h3>{escape(prompt)} <span class="unit">brightest cell {highest:.4f}</span></h3><div class="heat">{pictures}</div>'


def _heat_panel(alt: str, caption: str, values: Sequence[float] | None, cells: int, columns: int, highest: float) -> str:
    if not values:
        return f"<figure>{missing('not evaluated')}<figcaption>{escape(caption)}</figcaption></figure>"
    outside = sum(values[cells:])
    note = f' <span class="unit">{outside:.2%} outside</span>' if outside >= 5e-5 else ""
    picture = heat_png(values[:cells], cells // columns, columns, highest)
    return f'<figure><img class="map" src="{picture}" alt="{escape(alt)}"><figcaption>{escape(caption)}{note}</figcaption></figure>'


def _tv(evaluation: dict[str, Any], prompt: str) -> str:
    """Half the L1 distance between policy and target."""
    policy, target = evaluation.get("policy", {}).get(prompt), evaluation.get("target", {}).get(prompt)
    if not policy or not target:
        return "–"
    return f"{sum(abs(p - q) for p, q in zip(policy, target, strict=True)) / 2:.4f}"


def config_history(run: RunFiles) -> str:
    """Every version that the config has had, also those that a resume added."""
    if not run.versions:
        return missing("No config version in this run's run.db.")
    first, *others = run.versions
    rows = [(str(first["version"]), str(first["effective_step"]), "start of the run", started_with(first["config"]))]
    rows += [(str(version["version"]), str(version["effective_step"]), version["source"], change_text(version)) for version in others]
    return table(["version", "from step", "source", "change"], rows, numbers=(0, 1))


def started_with(config: dict[str, Any]) -> str:
    objective = Objective.model_validate(config["objective"])
    return f"{configured(objective)}, beta {objective.beta}, learning rate {config['learner']['learning_rate']}"


def change_text(version: Row) -> str:
    return "; ".join(f"{key}: {old} → {new}" for key, (old, new) in version["changed"].items()) or "no setting changed"

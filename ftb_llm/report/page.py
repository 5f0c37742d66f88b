"""Puts the parts together into one self-contained page."""

from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from ftb_llm.report import operations, sections
from ftb_llm.report.files import RunFiles, read_run
from ftb_llm.run_dir import write_whole

PARTS: tuple[tuple[str, str, Callable[[RunFiles], str]], ...] = (
    ("summary", "Summary", sections.summary),
    ("learning", "Learning", sections.learning),
    ("policy", "Policy beside target", sections.heat_maps),
    ("divergences", "Divergences", sections.divergences),
    ("staleness", "Staleness", sections.staleness),
    ("flow", "Queue, speed and waits", operations.flow),
    ("config", "Config history", sections.config_history),
    ("pushes", "Pushes and canaries", operations.pushes),
    ("accounting", "Accounting", operations.accounting),
    ("warnings", "Last warnings", operations.warnings),
)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder, from the files in it and nothing else."""
    page = run_dir / "report.html"
    write_whole(page, render(read_run(run_dir)))
    return page


def render(run: RunFiles) -> str:
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in PARTS)
    body = "".join(f'<section id="{anchor}"><h2>{escape(title)}</h2>{part(run)}</section>' for anchor, title, part in PARTS)
    name = escape(run.name)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        # The page asks for nothing from anywhere, and says so to the browser.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{name} · ftb_llm</title><style>{stylesheet()}</style></head>\n"
        f'<body><header><p class="eyebrow">ftb_llm run report</p><h1>{name}</h1>{facts(run)}<nav>{links}</nav></header>\n<main>{body}</main></body></html>\n'
    )


def stylesheet() -> str:
    return files("ftb_llm.report").joinpath("report.css").read_text(encoding="utf-8")


def facts(run: RunFiles) -> str:
    """What was run, in one line of terms."""
    config, summary = run.config, run.summary
    times = [event["time"] for event in run.events]
    learner, sampling, actors = (config.get(name, {}) for name in ("learner", "sampling", "actors"))
    terms = {
        "state": summary.get("state", "not finished"),
        "task": summary.get("task") or config.get("data", {}).get("path"),
        "model": config.get("model", {}).get("path"),
        "objective at the start": sections.started_with(run.versions[0]["config"]) if run.versions else None,
        "steps": str(summary.get("steps") or (run.rows[-1]["step"] if run.rows else 0)),
        "batch": f"{learner['groups_per_step']} groups × {sampling['group_size']} completions" if learner and sampling else None,
        "generators": str(actors["count"]) if actors else None,
        "cores": str(summary["cores"]) if summary.get("cores") else None,
        "started": datetime.fromtimestamp(times[0], UTC).strftime("%Y-%m-%d %H:%M UTC") if times else None,
    }
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(str(value))}</dd></div>" for label, value in terms.items() if value)
    return f'<dl class="facts">{items}</dl>'

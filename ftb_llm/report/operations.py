"""The parts of the page about the machinery: queue and speed, pushes and canaries, accounting, warnings."""

import statistics
from datetime import UTC, datetime

from ftb_llm.report.files import Row, RunFiles
from ftb_llm.report.sections import missing, side_by_side, table
from ftb_llm.report.svg import Series, line_chart

PUSHES_SHOWN = 12
WARNINGS_SHOWN = 20
STATES = ("trained", "dropped_stale", "rejected", "buffered", "leased")


def flow(run: RunFiles) -> str:
    """Queue, speed and waits: who holds up whom."""
    speed = [
        Series(label="generators", points=run.points("perf/generate_tokens_per_second"), colour=0),
        Series(label="learner", points=run.points("perf/learn_tokens_per_second"), colour=1),
    ]
    waits = [
        Series(label="learner waits for groups", points=run.points("time/learner_wait_seconds"), colour=1),
        Series(label="generators wait for room in the queue", points=run.points("time/generator_wait_seconds"), colour=0),
    ]
    return side_by_side(
        line_chart("Tokens per second", speed, from_zero=True),
        line_chart("Groups in the queue", [Series(label="groups", points=run.points("perf/queue_groups"))], from_zero=True),
        line_chart("Waiting", waits, unit="seconds per step", from_zero=True),
    )


def pushes(run: RunFiles) -> str:
    """How long engines stood still for a new adapter, and whether they then held what the learner had."""
    good, failed = run.events_of("push"), run.events_of("push_failed")
    if not good and not failed:
        return missing("No adapter has been pushed in this run.")
    parts = [_push_facts(good, failed)]
    if good:
        names = sorted({push["generator"] for push in good})
        series = [
            Series(label=name, points=[(push["version"], push["pause_ms"]) for push in good if push["generator"] == name], colour=index % 6)
            for index, name in enumerate(names)
        ]
        parts.append(line_chart("Engine paused for a push, by version", series, unit="ms", from_zero=True, width=1040, height=200))
        parts.append(f"<h3>Canaries of the last {min(len(good), PUSHES_SHOWN)} pushes</h3>")
        parts.append("<p>Summed log-prob of one fixed sequence: the engine has to repeat the learner's value, and to have left the base model's.</p>")
        head = ["version", "generator", "pause, ms", "total, ms", "engine", "learner", "base", "engine − learner"]
        parts.append(table(head, [_push_row(push) for push in good[-PUSHES_SHOWN:]], numbers=(0, 2, 3, 4, 5, 6, 7)))
    return "".join(parts)


def _push_facts(good: list[Row], failed: list[Row]) -> str:
    facts = f"{len(good)} delivered, {len(failed)} failed."
    if good:
        pauses = [push["pause_ms"] for push in good]
        worst = max(abs(push["canary_engine"] - push["canary_learner"]) for push in good)
        facts += f" Pause: median {statistics.median(pauses):.0f} ms, longest {max(pauses):.0f} ms. Largest canary difference: {worst:.1e}."
    return f"<p>{facts}</p>"


def _push_row(push: Row) -> tuple[str, ...]:
    engine, learner, base = push["canary_engine"], push["canary_learner"], push["canary_base"]
    values = (f"{push['pause_ms']:.1f}", f"{push['total_ms']:.1f}", f"{engine:.5f}", f"{learner:.5f}", f"{base:.5f}", f"{engine - learner:+.1e}")
    return (str(push["version"]), push["generator"], *values)


def accounting(run: RunFiles) -> str:
    """Where every generated group went."""
    counts = run.summary.get("accounting") or {}
    if not counts:
        return missing("No accounting yet: it is written with summary.json when the run ends.")
    total = sum(counts.get(state, 0) for state in STATES)
    generated = counts.get("generated", 0)
    parts = [table(["generated", *(state.replace("_", " ") for state in STATES)], [[str(generated), *(str(counts.get(state, 0)) for state in STATES)]])]
    if total == generated:
        parts.append('<p><span class="met">✓</span> Every generated group is accounted for.</p>')
    else:
        parts.append(f'<p><span class="missed">✗</span> {generated} generated, but {total} accounted for.</p>')
    parts.append("<h3>Why groups were rejected or dropped</h3>")
    reasons = counts.get("reasons") or {}
    rows = [(str(reason), str(count)) for reason, count in sorted(reasons.items())]
    parts.append(table(["reason", "groups"], rows, numbers=(1,)) if rows else "<p>None was.</p>")
    return "".join(parts)


def warnings(run: RunFiles) -> str:
    found = run.events_of("warning", "push_failed", "actor_out", "rejected")
    if not found:
        return "<p>None.</p>" if run.events else missing("No events.jsonl in this run.")
    rows = [(clock(event["time"]), str(event["step"]), event["kind"].replace("_", " "), event["message"]) for event in found[-WARNINGS_SHOWN:]]
    more = f"<p>The last {WARNINGS_SHOWN} of {len(found)}.</p>" if len(found) > WARNINGS_SHOWN else ""
    return more + table(["time (UTC)", "step", "kind", "what happened"], rows, numbers=(1,))


def clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")

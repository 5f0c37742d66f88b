"""`summary.json`: the run in numbers, each of them derived from what the run wrote down."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from ftb_llm.config import Config
from ftb_llm.config.schema import Member, Objective
from ftb_llm.machine import core_count
from ftb_llm.run_dir import RunDir
from ftb_llm.tally import EventTally, ObjectiveChanges, StepTally, divergence_steps
from ftb_llm.types import objective_text


def summarise(run_dir: RunDir, config: Config, *, state: str, accounting: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that `summary.json` holds; None where this run has no such number.

    Both files are read row by row, the events first: they tell where the divergence was changed.
    """
    events = EventTally()
    for event in run_dir.events():
        events.add(event)
    steps = StepTally(events.switches | _scheduled_steps(config.objective.model_dump(mode="json")))
    for row in run_dir.metrics():
        steps.add(row)
    first, last = steps.first_evaluated, steps.last_evaluated
    return {
        "run": run_dir.path.name,
        "state": state,
        "task": config.data.path.removeprefix("builtin:"),
        "divergence": _in_words(steps.objective.found, config.objective),
        "cores": core_count(),
        "steps": steps.steps,
        "exact_tv_start": first.get("eval/exact_tv"),
        "exact_tv_end": last.get("eval/exact_tv"),
        "reward_start": first.get("eval/reward", steps.first_reward),
        "reward_end": last.get("eval/reward", steps.last_reward),
        "target_reward": last.get("eval/target_reward"),
        "modes_found": last.get("eval/modes_found"),
        "modes_total": last.get("eval/modes_total"),
        "train_seconds": steps.train_seconds,
        "mean_staleness_steps": steps.mean("off_policy/staleness_mean"),
        "generate_tokens_per_second": steps.mean("perf/generate_tokens_per_second"),
        "learn_tokens_per_second": steps.mean("perf/learn_tokens_per_second"),
        "shadow_share": steps.shadow_share,
        "pushes": events.pushes,
        "pushes_failed": events.pushes_failed,
        "push_pause_ms_p50": events.pause_ms_p50,
        "push_pause_ms_max": events.pause_ms_max,
        "push_bytes": events.push_bytes,
        "canary_max_abs_diff": events.canary_max_abs_diff,
        "speed_before_push": None,
        "speed_after_push": None,
        "speed_after_push_ratio": None,
        "speed_after_last_push": None,
        "logprob_max_abs_diff": None,
        "logprob_mean_abs_diff": None,
        "logprob_compared": None,
        "peak_rss_gib": None,
        **facts,
        "total_seconds": facts["total_seconds"] + events.earlier_seconds if "total_seconds" in facts else None,
        "config_versions": 1 + events.config_changes,
        "accounting": accounting,
    }


def configured(objective: Objective) -> str:
    """What these settings train with: ramps and the whole schedule in words."""
    divergence = objective.divergence
    later = (f", then {_member(entry, objective)} from step {entry.step}" for entry in divergence.schedule)
    members = "".join((_member(divergence, objective), *later))
    return objective_text(objective.kind, members, tempered=objective.tempered, log_z=objective.log_z)


def _member(member: Member, objective: Objective) -> str:
    return f"{member.text} {objective.custom}" if member.name == "custom" else member.text


def objective_changes(rows: Iterable[Mapping[str, Any]], switches: Container[int]) -> list[tuple[int, str]]:
    """The objective of the first of these rows of `metrics.jsonl`, then each other one with the step where it took over."""
    changes = ObjectiveChanges(switches)
    for row in rows:
        changes.add(row)
    return changes.found


def switch_steps(objective: Mapping[str, Any], versions: Iterable[Mapping[str, Any]]) -> set[int]:
    """Where a schedule or a changed config puts a member into force; `versions` have `changed` and `effective_step`."""
    return _scheduled_steps(objective) | divergence_steps(versions)


def trained_with(steps: Iterable[dict[str, Any]], objective: Objective, events: Iterable[dict[str, Any]]) -> str:
    """`hellinger`, or `forward_kl, then tv from step 200`; before the first step, what the config says."""
    config_changes = (event for event in events if event["kind"] == "config_change")
    switches = switch_steps(objective.model_dump(mode="json"), config_changes)
    return _in_words(objective_changes(steps, switches), objective)


def _in_words(changes: Sequence[tuple[int, str]], objective: Objective) -> str:
    if not changes:
        return configured(objective)
    (_, first), *others = changes
    return "".join((first, *(f", then {text} from step {step}" for step, text in others)))


def _scheduled_steps(objective: Mapping[str, Any]) -> set[int]:
    return {entry["step"] for entry in objective["divergence"].get("schedule", ())}

"""`GET /v1/status` as a plain dict: what the API serves, the progress panel draws and Prometheus is given."""

from dataclasses import asdict
from typing import Any

from ftb_llm.buffer import GroupBuffer
from ftb_llm.config.ledger import ConfigLedger
from ftb_llm.run_log import RunLog
from ftb_llm.state import RunState


def run_status(state: RunState, ledger: ConfigLedger, buffer: GroupBuffer, log: RunLog) -> dict[str, Any]:
    """The objective is the one in force at the step in progress; the config version is the newest, which may start with the next."""
    row = state.last_row
    version = ledger.current
    objective = ledger.objective_at(max(1, state.started_step))
    steps_per_second = 1 / row["time/step_seconds"] if row.get("time/step_seconds") else 0.0
    return {
        "run": state.name,
        "run_dir": state.run_dir,
        "url": state.url,
        "state": state.phase.value,
        "step": state.step,
        "max_steps": version.config.run.max_steps,
        "policy_version": state.policy_version,
        "config_version": version.version,
        "objective": asdict(objective),
        "actors": [generator.as_dict() for generator in state.generators],
        "buffer": {"groups": buffer.depth, "capacity": buffer.capacity},
        "staleness": {
            "mean": row.get("off_policy/staleness_mean"),
            "max": row.get("off_policy/staleness_max"),
            "min": row.get("off_policy/staleness_min"),
            "limit": version.config.staleness.max_steps,
        },
        "throughput": {
            "generate_tokens_per_second": sum(generator.throughput.per_second() for generator in state.generators),
            "learn_tokens_per_second": state.learn_throughput.per_second(),
            "steps_per_second": steps_per_second,
        },
        "divergences": by_member(row),
        "reward": below(row, "reward/"),
        "eval": below(state.last_eval, "eval/"),
        "accounting": buffer.accounting.as_dict(),
        "last_error": state.last_error,
        "last_error_step": state.last_error_step,
        "last_error_time": state.last_error_time,
        "last_checkpoint": state.last_checkpoint,
        "reports": log.status(),
    }


def below(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The metrics of one concern, without its name."""
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def by_member(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the step says of each divergence; how two of them compare (`divergence/cosine/...`) stays in the row."""
    members: dict[str, dict[str, Any]] = {}
    for name, value in below(row, "divergence/").items():
        quantity, _, member = name.partition("/")
        if quantity != "cosine":
            members.setdefault(member, {})[quantity] = value
    return members

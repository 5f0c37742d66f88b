"""Writes the files of a made-up run, in the shapes of the real ones, without running anything.

Delta is Gaussian under the policy, so that most divergences are known.
"""

import json
import math
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ftb_llm.config import Config, build_config
from ftb_llm.config.ledger import ConfigVersion, difference
from ftb_llm.journal import Journal
from ftb_llm.shadow import shadow_metrics
from ftb_llm.tasks.hypergrid import SIDE, Hypergrid

SWAP_STEP = 161
BETA = 0.5


def write_run(run_dir: Path, *, steps: int = 400, seed: int = 0) -> Path:
    """A finished hypergrid run whose divergence was swapped at `SWAP_STEP`."""
    rng = random.Random(seed)
    (run_dir / "eval").mkdir(parents=True)
    config = build_config({"run": {"name": run_dir.name, "max_steps": steps}})
    swapped = build_config({"run": {"name": run_dir.name, "max_steps": steps}, "objective": {"divergence": {"name": "hellinger"}}})
    write_json(run_dir / "config.json", swapped.model_dump(mode="json"))  # a live run's config.json is the newest version
    write_versions(run_dir, (1, "start", config), (SWAP_STEP, "rest <127.0.0.1>", swapped))
    write_lines(run_dir / "metrics.jsonl", [metrics_row(step, steps, rng) for step in range(steps + 1)])
    write_lines(run_dir / "events.jsonl", events(steps, rng))
    write_json(run_dir / "eval" / "first.json", evaluation(0, distance=1.0))
    write_json(run_dir / "eval" / "last.json", evaluation(steps, distance=0.04))
    write_json(run_dir / "summary.json", summary(run_dir.name, steps))
    return run_dir


def write_versions(run_dir: Path, *versions: tuple[int, str, Config]) -> None:
    """Config versions as (first step, source, config) into run.db."""
    with closing(Journal(run_dir / "run.db")) as journal:
        before = versions[0][2]
        for version, (step, source, config) in enumerate(versions, start=1):
            changed = difference(before, config)
            journal.add_config(ConfigVersion(version=version, config=config, effective_step=step, source=source, changed=changed, time=1_760_000_000))
            before = config


def metrics_row(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    distance = math.exp(-3.2 * step / steps)
    spread = 3 * distance
    row: dict[str, Any] = {"step": step, "time": 1_760_000_000 + 0.5 * step, "config_version": 1 + (step >= SWAP_STEP), "policy_version": max(0, step - 1)}
    if step > 0:
        ages = [rng.choice((2, 3, 3, 4, 4, 4, 5, 6, 9)) for _ in range(8)]
        row |= {
            "objective": {"kind": "ftb", "divergence": "reverse_kl" if step < SWAP_STEP else "hellinger", "alpha": None, "beta": BETA, "tempered": False},
            "staleness_counts": {str(age): ages.count(age) for age in sorted(set(ages))},
            "reward/mean": 2.1 - 1.7 * distance + rng.gauss(0, 0.08),
            "reward/std": 0.6,
            "reward/max": 2.501,
            "optim/loss": 3 * distance,
            "optim/grad_norm": 1.2 * distance,
            "optim/learning_rate": 3e-3,
            **shadow_metrics(spread * torch.randn(8, 32, generator=torch.Generator().manual_seed(rng.getrandbits(32)))),
            "off_policy/staleness_mean": sum(ages) / 8,
            "off_policy/staleness_max": max(ages),
            "off_policy/staleness_min": min(ages),
            "perf/generate_tokens_per_second": rng.gauss(3100, 120),
            "perf/learn_tokens_per_second": rng.gauss(3000, 150),
            "perf/queue_groups": rng.randint(4, 20),
            "time/step_seconds": 0.4,
            "time/learn_seconds": 0.2,
            "time/divergence_seconds": 0.001,
            "time/learner_wait_seconds": abs(rng.gauss(0.05, 0.02)),
            "time/generator_wait_seconds": abs(rng.gauss(0.12, 0.05)),
        }
    if step % 25 == 0:
        row |= {
            "eval/exact_tv": math.erf(spread / math.sqrt(8)),
            "eval/exact_reverse_kl": spread**2 / 2,
            "eval/exact_forward_kl": spread**2 / 2,
            "eval/exact_pearson": math.expm1(spread**2) / 2,
            "eval/exact_neyman": math.expm1(spread**2) / 2,
            "eval/exact_hellinger": -4 * math.expm1(-(spread**2) / 8),
            "eval/exact_js": -4 * math.log(2) * math.expm1(-(spread**2) / (8 * math.log(2))),  # about
            "eval/reward": 2.1 - 1.7 * distance,
            "eval/target_reward": 2.1,
            "eval/modes_found": 16,
            "eval/modes_total": 16,
        }
    return row


def events(steps: int, rng: random.Random) -> list[dict[str, Any]]:
    found = [event(0, "started", f"training from step 0 to {steps}")]
    for version in range(1, steps):
        pause, canary = rng.gauss(92, 8), -12.4 - version / steps
        found.append(event(version, "push", "delivered", **push(version, pause, canary, rng)))
        if version == SWAP_STEP - 1:
            changed = {"objective.divergence.name": ["reverse_kl", "hellinger"]}
            found.append(event(version, "config_change", "config version 2", version=2, effective_step=SWAP_STEP, source="rest <127.0.0.1>", changed=changed))
    found.append(event(20, "rejected", "group g17 rejected, not_finite: reward 3 of 32 is nan <script>alert(1)</script>", reason="not_finite", group="g17"))
    found.append(event(steps, "finished", f"the run finished at step {steps}"))
    return sorted(found, key=lambda row: row["step"])


def push(version: int, pause: float, canary: float, rng: random.Random) -> dict[str, Any]:
    return {
        "generator": "generator-0",
        "version": version,
        "byte_count": 180_224,
        "pause_ms": pause,
        "total_ms": pause + 60,
        "canary_engine": canary + rng.gauss(0, 2e-6),
        "canary_learner": canary,
        "canary_base": -15.1,
        "ok": True,
        "problem": None,
    }


def event(step: int, kind: str, message: str, **details: Any) -> dict[str, Any]:
    return {"time": 1_760_000_000 + 0.5 * step, "step": step, "kind": kind, "message": message, **details}


def evaluation(step: int, *, distance: float) -> dict[str, Any]:
    """A policy that lies between uniform (distance 1) and the target (distance 0), with 1% of its mass outside the grid."""
    task = Hypergrid()
    policy, target = {}, {}
    for prompt in task.prompts():
        weights = [math.exp(reward / BETA) for reward in task.rewards(prompt)]
        target[prompt] = [0.999 * weight / sum(weights) for weight in weights] + [0.001]
        policy[prompt] = [(1 - distance) * goal + distance * 0.99 / SIDE**2 for goal in target[prompt][:-1]] + [0.01 * distance]
    return {"step": step, "metrics": {}, "modes_found": 16, "modes_total": 16, "policy": policy, "target": target, "grid_shape": [SIDE, SIDE]}


def summary(name: str, steps: int) -> dict[str, Any]:
    accounting = {"generated": 3220, "buffered": 11, "leased": 8, "trained": 3200, "dropped_stale": 0, "rejected": 1, "reasons": {"not_finite": 1}}
    return {
        "run": name,
        "state": "finished",
        "task": "hypergrid",
        "as_shipped": True,
        "dtype": "float32",
        "divergence": "hellinger",
        "cores": 2,
        "steps": steps,
        "exact_tv_start": 0.86,
        "exact_tv_end": 0.035,
        "reward_start": 0.4,
        "reward_end": 2.03,
        "target_reward": 2.1,
        "modes_found": 16,
        "modes_total": 16,
        "train_seconds": 174.2,
        "total_seconds": 243.0,
        "mean_staleness_steps": 4.3,
        "shadow_share": 0.005,
        "push_pause_ms_p50": 92.4,
        "push_bytes": 180_224,
        "speed_after_push_ratio": 0.991,
        "logprob_max_abs_diff": 3.1e-6,
        "logprob_max_abs_diff_per_token": 1.2e-6,
        "peak_rss_gib": 5.4,
        "config_versions": 2,
        "accounting": accounting,
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

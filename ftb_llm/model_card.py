"""The model card of a merged model: what it is made of, how it was trained, and what the run measured."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftb_llm.adapter_folder import AdapterFolder
from ftb_llm.config import Config
from ftb_llm.run_dir import RunDir
from ftb_llm.summary import trained_with

_CARD = """---
{base_line}library_name: transformers
pipeline_tag: text-generation
tags:
- ftb_llm
---

# {run}, version {version}, merged

`{base}`, {trained}, as it was after step {version}.

| | |
|---|---|
| base model | `{base}` |
| run | {run} |
| version | {version} |
| objective | {objective} |
| beta | {beta:g} |
| adapter | LoRA, sha256 `{sha256}` |
| weights | `base + {scale:g} * B A`, added in float32 and kept in the base's dtype ({dtypes}) |
{measured}
Load it with `transformers.AutoModelForCausalLM.from_pretrained(this_folder)`; it needs neither PEFT nor ftb_llm.
"""
_FTB = "trained by f-Trajectory Balance towards the reward-tilted base model `pi_ref e^(r / {beta:g}) / Z`"
_BASELINE = "trained by a baseline with beta {beta:g}"
_MEASURED = (  # of summary.json
    ("reward_start", "mean reward at the start"),
    ("reward_end", "mean reward at the end"),
    ("target_reward", "mean reward of the target"),
    ("exact_tv_start", "exact total variation to the target at the start"),
    ("exact_tv_end", "exact total variation to the target at the end"),
)


def merged_card(run: RunDir, config: Config, adapter: AdapterFolder, dtypes: Sequence[str]) -> str:
    rows = [row for row in run.metrics() if 0 < row["step"] <= adapter.version]
    objective = {"kind": config.objective.kind, "beta": config.objective.beta} | (rows[-1].get("objective", {}) if rows else {})  # live settings change
    base = config.model.path
    return _CARD.format(
        base_line=f"base_model: {base}\n" if is_hub_name(base) else "",
        base=base,
        run=run.path.resolve().name,
        version=adapter.version,
        trained=(_FTB if objective["kind"] == "ftb" else _BASELINE).format(beta=objective["beta"]),
        objective=trained_with(rows, config.objective, run.events()),
        beta=objective["beta"],
        sha256=adapter.sha256,
        scale=adapter.scale,
        dtypes=", ".join(dtypes),
        measured=_measured(_summary(run.path)),
    )


def is_hub_name(path: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None and not Path(path).exists()


def _measured(summary: Mapping[str, Any]) -> str:
    rows = [f"| {text} | {summary[name]:.4g} |" for name, text in _MEASURED if summary.get(name) is not None]
    if not rows:
        return ""
    return "\n".join(["", f"Measured over the whole run, {summary['steps']} steps:", "", "| | |", "|---|---|", *rows, ""])


def _summary(run: Path) -> dict[str, Any]:
    """Empty while the run is alive: it is written at the end."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

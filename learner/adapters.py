"""Published adapters: `adapters/v000012/` in PEFT's format, which PEFT, vLLM and the Hub load unchanged."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig

from ftb_llm.config import Config
from ftb_llm.summary import configured
from ftb_llm.types import AdapterRef, CanaryValue
from learner import folders
from learner.model import AdaptedModel
from learner.packing import Batch, pack

PREFIX = "v"
CANARY_TOKENS = 32

_FTB = """trained by f-Trajectory Balance towards the reward-tilted base model `pi_ref e^(r / {beta:g}) / Z`
with the divergence `{objective}`"""
_BASELINE = "trained by the baseline `{objective}` with beta {beta:g}"
_CARD = """---
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- ftb_llm
---

# {run}, version {version}

A LoRA adapter of `{base}`, {trained}, as it was after step {version}.

Merged weights are `base + {scale:g} * B A`. Load it with `peft.PeftModel.from_pretrained(base_model, this_folder)`.
"""


class Canary:
    """One fixed sequence: its log-prob under each version proves to a generator which weights it holds."""

    def __init__(self, model: AdaptedModel, prompt_ids: Sequence[int], max_model_len: int) -> None:
        room = max_model_len - 1  # the engine wants to sample one more
        count = min(CANARY_TOKENS, room // 2)
        self._prompt = tuple(prompt_ids[: room - count])
        vocabulary = model.peft_model.config.get_text_config().vocab_size
        self._completion = tuple((7 * index + 3) % vocabulary for index in range(count))
        self._batch: Batch = pack([self._prompt], [[self._completion]], model.device)
        with torch.no_grad(), model.as_reference():
            self._base = model.scorer.completion_logprobs(self._batch).item()

    def value(self, model: AdaptedModel) -> CanaryValue:
        with torch.no_grad():
            adapted = model.scorer.completion_logprobs(self._batch).item()
        return CanaryValue(prompt_ids=self._prompt, completion_ids=self._completion, adapted=adapted, base=self._base)


def publish(model: AdaptedModel, *, version: int, parent: Path, canary: CanaryValue, config: Config) -> tuple[AdapterRef, bytes]:
    """Write the folder atomically; returns its reference and the bytes of its safetensors file."""
    payload = safetensors.torch.save(model.adapter_state(), metadata={"format": "pt"})
    sha256 = hashlib.sha256(payload).hexdigest()
    facts = {"version": version, "sha256": sha256, "scale": model.scale, "byte_count": len(payload)}
    folder = parent / folders.named(PREFIX, version)
    files = {
        "adapter_model.safetensors": payload,
        "adapter_config.json": _json(_portable(model.peft_model.peft_config["default"])),
        "README.md": model_card(config, version, model.scale).encode(),
        "ftb_llm.json": _json(facts),
    }
    folders.write_folder(folder, files)
    reference = AdapterRef(version=version, path=str(folder), sha256=sha256, byte_count=len(payload), scale=model.scale, canary=canary)
    return reference, payload


def prune(parent: Path, *, newest: int, keep: int) -> None:
    """Delete all but the last `keep` adapters up to version `newest`."""
    folders.prune(parent, PREFIX, newest=newest, keep=keep)


def model_card(config: Config, version: int, scale: float) -> str:
    objective = config.objective
    trained = _FTB if objective.kind == "ftb" else _BASELINE
    return _CARD.format(
        run=config.run.name or "ftb_llm adapter",
        version=version,
        base=config.model.path,
        trained=trained.format(objective=configured(objective), beta=objective.beta),
        scale=scale,
    )


def _portable(config: PeftConfig) -> dict[str, Any]:
    """The adapter's config as PEFT itself saves it: for inference, with sets as sorted lists."""
    values = config.to_dict() | {"inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()

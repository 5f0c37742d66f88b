"""A published adapter on disk, `adapters/v000012/`: found by its version, checked by its sha256, and plain LoRA or refused.

Merging adds `scale * B A` with one scale for the whole adapter. PEFT knows many variants that store the same tensors and mean
something else by them, so every setting that isn't known to be harmless has to be at rest.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftb_llm.errors import CheckpointError, SetupError

WEIGHTS, SETTINGS, FACTS = "adapter_model.safetensors", "adapter_config.json", "ftb_llm.json"

# What may have any value: it names things, was for training alone, or is of a variant that has a switch of its own.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha", "r", "target_modules", "use_rslora"),
    *("lora_dropout", "megatron_core", "qalora_group_size"),
}
_AT_REST = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal")}  # the other inits change the base


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """One published adapter, whole and plain."""

    path: Path
    version: int
    sha256: str
    scale: float
    settings: dict[str, Any]  # of PEFT

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS


def find_adapter(run: Path, version: int | None) -> Path:
    """The folder of this version, or of the newest."""
    found = {int(path.name[1:]): path for path in (run / "adapters").glob("v*") if path.name[1:].isdecimal()}
    if not found:
        raise SetupError(f"{run} has no adapters; a run publishes its first at the start, into {run / 'adapters'}")
    if version is None:
        return found[max(found)]
    if version not in found:
        raise SetupError(f"--version: {version} is not there; {run} has {', '.join(map(str, sorted(found)))}, as checkpoint.keep left them")
    return found[version]


def open_adapter(path: Path) -> AdapterFolder:
    """Read what the folder says of itself and hold its weights against that."""
    facts, settings = _read_json(path / FACTS), _read_json(path / SETTINGS)
    check_plain(settings, path / SETTINGS)
    try:
        version, sha256, scale = int(facts["version"]), str(facts["sha256"]), float(facts["scale"])
        told = float(settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"adapter {path} is torn: {FACTS} or {SETTINGS} lacks its numbers ({type(error).__name__}: {error})") from None
    if not math.isclose(scale, told, rel_tol=1e-9):
        raise CheckpointError(f"adapter {path} contradicts itself: the scale is {scale:g} in {FACTS} and {told:g} by alpha and rank of {SETTINGS}")
    check_sha256(path / WEIGHTS, sha256)
    return AdapterFolder(path=path, version=version, sha256=sha256, scale=scale, settings=settings)


def check_plain(settings: Mapping[str, Any], source: Path) -> None:
    """Raise unless these settings of PEFT describe what `base + scale * B A` merges."""
    for name, value in settings.items():
        if name in _HARMLESS:
            continue
        allowed = _AT_REST.get(name)
        if (value not in allowed) if allowed else value:
            right = json.dumps(allowed[0]) if allowed else "off"
            message = f"{name} is {json.dumps(value)}; it must be {right}, since only plain LoRA is merged right by base + scale * B A"
            raise CheckpointError(f"adapter {source}: {message}")


def check_neighbour(weights: Path) -> None:
    """The same of the settings that lie beside a file of weights; a payload that came through Ray has none."""
    if (source := weights.with_name(SETTINGS)).is_file():
        check_plain(_read_json(source), source)


def check_sha256(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"adapter {path} can't be read: {error.strerror}") from None
    if found != sha256:
        raise CheckpointError(f"adapter {path} is torn: its sha256 is {found}, {sha256} was published")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"adapter {path} can't be read: {error.strerror}") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"adapter {path} is torn: it holds no JSON object")
    return values

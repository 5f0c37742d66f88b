"""Checkpoints: `checkpoints/step_000400/`, everything that the next step depends on, with a checksum of every file.

The learning rate is a function of the config and the step, so there is no scheduler state to save.
"""

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ftb_llm.errors import CheckpointError
from learner import folders
from learner.model import AdaptedModel

PREFIX = "step_"
MANIFEST = "manifest.json"
ADAPTER, OPTIMIZER, TORCH_RNG, STATE = "adapter.safetensors", "optimizer.pt", "torch_rng.pt", "state.json"
FORMAT = 1


def save(model: AdaptedModel, *, step: int, parent: Path, keep: int) -> Path:
    """Write the checkpoint of `step` atomically and delete old ones. Returns its folder."""
    files = {
        ADAPTER: safetensors.torch.save(model.adapter_state()),
        OPTIMIZER: _torch_bytes(model.optimizer.state_dict()),
        TORCH_RNG: _torch_bytes({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}),
        STATE: json.dumps({"step": step, "log_z": model.log_z.state(), "python_rng": random.getstate(), "numpy_rng": _numpy_rng()}).encode(),
    }
    manifest = {"format": FORMAT, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    folder = parent / folders.named(PREFIX, step)
    folders.write_folder(folder, files | {MANIFEST: json.dumps(manifest, indent=2).encode()})
    folders.prune(parent, PREFIX, newest=step, keep=keep)
    return folder


def load(model: AdaptedModel, folder: Path) -> int:
    """Check every file, then put the whole state back. Returns the step. Nothing changes when a file is torn."""
    files = verified(folder)
    state = json.loads(files[STATE])
    optimizer = torch.load(io.BytesIO(files[OPTIMIZER]), weights_only=True)
    generators = torch.load(io.BytesIO(files[TORCH_RNG]), weights_only=True)
    try:
        model.load_adapter_state(safetensors.torch.load(files[ADAPTER]))
        model.optimizer.load_state_dict(optimizer)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from None
    if "log_z" in state:  # older checkpoints have none
        model.log_z.load_state(state["log_z"])
    torch.set_rng_state(generators["cpu"])
    if generators["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(generators["cuda"])
    version, words, gauss = state["python_rng"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    return int(state["step"])


def verified(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each equal to what the manifest says was written."""
    manifest = _manifest(folder)
    files: dict[str, bytes] = {}
    for name in (ADAPTER, OPTIMIZER, TORCH_RNG, STATE):
        data = _read(folder / name)
        if hashlib.sha256(data).hexdigest() != manifest.get(name):
            raise CheckpointError(f"checkpoint file {folder / name} is torn: its {len(data)} bytes are not those that were written")
        files[name] = data
    return files


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(_read(path))
        known, sums = manifest["format"], manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint file {path} is torn: it is no manifest") from None
    if known != FORMAT or not isinstance(sums, dict):
        raise CheckpointError(f"checkpoint file {path} has format {known}; this version reads format {FORMAT}")
    return sums


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint file {path} can't be read: {error.strerror}") from None


def _torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _numpy_rng() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), *rest]

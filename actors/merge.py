"""Merging an adapter into the running engine: W0 + scale * B A from the base checkpoint, loaded as a whole new model.

`AdapterMerger` is mixed into vLLM's worker and runs in the engine's process. It always starts from the base checkpoint on
disk, never from the weights in the engine, so a push depends on no push before it and rounding can't build up.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ftb_llm.adapter_folder import check_neighbour
from ftb_llm.errors import CheckpointError

PEFT_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The two factors for one linear layer: `a` is rank x inputs, `b` is outputs x rank."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def merged_shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


def read_adapter(path: Path) -> dict[str, LoraPair]:
    """The adapter's pairs, each under the name of the base weight it changes. Anything that is no plain LoRA factor is an error."""
    check_neighbour(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"adapter {path} can't be read: {error}") from None
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = PEFT_KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"adapter {path} holds {key}, which can't be merged; only LoRA A and B of linear layers can")
        sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = tensor
    if not sides:
        raise CheckpointError(f"adapter {path} is empty")
    return {name: _pair(name, found) for name, found in sides.items()}


def _pair(name: str, found: Mapping[str, torch.Tensor]) -> LoraPair:
    if set(found) != {"A", "B"}:
        raise CheckpointError(f"adapter has only lora_{next(iter(found))} for {name}; it needs both A and B")
    a, b = found["A"], found["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(f"adapter's factors for {name} don't fit together: A is {list(a.shape)}, B is {list(b.shape)}")
    return LoraPair(a=a, b=b)


def base_files(base: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint folder and the safetensors file that holds it, one file or sharded with an index."""
    index = base / "model.safetensors.index.json"
    single = base / "model.safetensors"
    try:
        if index.is_file():
            return {name: base / file for name, file in loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        with safe_open(single, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), single)
    except (OSError, SafetensorError, JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"base model {base} has no readable model.safetensors: {error}") from None


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"base model file {file} can't be read: {error}") from None


def check_adapter(base: Path, adapter: Path) -> None:
    """Raise unless every pair of the adapter fits an existing base weight. Reads only the shapes of the base."""
    pairs, files = read_adapter(adapter), base_files(base)
    if unknown := sorted(set(pairs) - set(files)):
        raise CheckpointError(f"adapter changes {unknown[0]}, which base model {base} does not have ({len(unknown)} such weights)")
    for file in sorted({files[name] for name in pairs}):
        with _opened(file) as handle:
            for name in (name for name in pairs if files[name] == file):
                shape = tuple(handle.get_slice(name).get_shape())
                if shape != pairs[name].merged_shape:
                    raise CheckpointError(f"adapter's B A for {name} is {list(pairs[name].merged_shape)}, the base weight is {list(shape)}")


def merged_weights(base: Path, adapter: Path, scale: float, device: str | torch.device = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the base model, with the adapter merged in float32 where it applies; raises if any pair was left over."""
    pairs, files = read_adapter(adapter), base_files(base)
    for file in sorted(set(files.values())):
        with _opened(file) as handle:  # memory-mapped: pages come in as tensors are read
            for name in (name for name in handle.keys() if files.get(name) == file):  # noqa: SIM118  the handle is no dict
                weight = handle.get_tensor(name)
                pair = pairs.pop(name, None)
                yield name, weight if pair is None else _merge(weight.to(device), pair, scale)
    if pairs:
        raise CheckpointError(f"adapter changes {next(iter(pairs))}, which base model {base} does not have ({len(pairs)} such weights)")


def _merge(weight: torch.Tensor, pair: LoraPair, scale: float) -> torch.Tensor:
    a, b = pair.a.to(weight.device, torch.float32), pair.b.to(weight.device, torch.float32)
    if tuple(weight.shape) != pair.merged_shape:
        raise CheckpointError(f"adapter's B A is {list(pair.merged_shape)}, the base weight is {list(weight.shape)}")
    return torch.addmm(weight.to(torch.float32), b, a, alpha=scale).to(weight.dtype)


class AdapterMerger:
    """Worker extension: vLLM adds these methods to its worker, where `AsyncLLM.collective_rpc` finds them by name."""

    model_runner: Any  # the worker's

    def merge_adapter(self, base: str, adapter: str, scale: float) -> int:
        """Replace the engine's weights while it is paused; returns how many base weights the adapter changed.

        A bare `load_weights` would not do: the CPU backend has repacked its linear layers. vLLM's layerwise reload undoes
        and redoes that, layer by layer, and keeps the storage that CUDA graphs refer to.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        pairs = read_adapter(Path(adapter))
        device = next(model.parameters()).device
        with torch.no_grad():
            initialize_layerwise_reload(model)
            try:
                loaded = model.load_weights(merged_weights(Path(base), Path(adapter), scale, device))
            finally:  # puts the old weights back where no new ones came, so that a failed push leaves an engine that can be pushed to
                finalize_layerwise_reload(model, self.model_runner.model_config)
        if missing := sorted(expected - set(loaded)):
            raise CheckpointError(f"engine took no new value for {missing[0]} ({len(missing)} such weights)")
        return len(pairs)

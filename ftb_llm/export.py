"""Export: a run's adapter as a folder of its own, or merged into its base as a whole model that needs nothing of ours.

The merge itself is the generator's, handed in by the composition root: what is exported is what the engines ran.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftb_llm.adapter_folder import SETTINGS, WEIGHTS, AdapterFolder, check_sha256, find_adapter, open_adapter
from ftb_llm.config import Config
from ftb_llm.config.load import build_config
from ftb_llm.errors import CheckpointError, SetupError
from ftb_llm.inputs import built, builtin_name, local_model
from ftb_llm.model_card import is_hub_name, merged_card
from ftb_llm.ports import Progress
from ftb_llm.run_dir import RunDir, sync

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2 * 2**30  # of weights in one file, and about what is in memory at a time
# Of the base model: everything that loading and talking to it needs, but neither weights nor what lies about them.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("*.index.json", SETTINGS)
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

Weights = Iterator[tuple[str, "torch.Tensor"]]
Merge = Callable[[Path, Path, float], Weights]  # base folder, adapter's weights, scale
Check = Callable[[Path, Path], None]  # base folder, adapter's weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and where."""

    path: Path
    version: int
    merged: bool
    base: str
    byte_count: int


def export_adapter(run: Path, version: int | None, out: Path | None) -> Exported:
    """Copy an adapter's folder, in PEFT's format."""
    config = read_config(run)
    adapter = open_adapter(find_adapter(run, version))
    out = out or default_folder(run, adapter.version, merged=False)
    with whole_folder(out) as folder:
        for name in sorted({WEIGHTS, SETTINGS, *(file.name for file in adapter.path.glob("*") if file.is_file())}):
            _copy(adapter.path / name, folder / name)
        (folder / SETTINGS).write_text(json.dumps(portable(adapter.settings, config.model.path), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        check_sha256(folder / WEIGHTS, adapter.sha256)  # of the copy: a live run deletes and replaces its adapters
    return Exported(path=out, version=adapter.version, merged=False, base=config.model.path, byte_count=_size(out))


def export_merged(
    run: Path, version: int | None, out: Path | None, *, progress: Progress, merge: Merge, check: Check, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write base + scale * B A as a model in Hugging Face format, with everything that loading it needs."""
    config = read_config(run)
    adapter = open_adapter(find_adapter(run, version))
    out = out or default_folder(run, adapter.version, merged=True)
    base = base_folder(config, adapter, progress)
    tied = is_tied(base)
    check(base, adapter.weights)
    with whole_folder(out) as folder:
        for file in sorted({file for pattern in _COPIED for file in base.glob(pattern)}):
            if not any(file.match(pattern) for pattern in _NOT_COPIED):
                (folder / file.relative_to(base)).parent.mkdir(exist_ok=True)
                _copy(file, folder / file.relative_to(base))
        weights = merge(base, adapter.weights, adapter.scale)
        dtypes = write_weights(without_tied_head(weights) if tied else weights, folder, shard_bytes=shard_bytes)
        (folder / "README.md").write_text(merged_card(RunDir(run), config, adapter, dtypes), encoding="utf-8")
        check_sha256(adapter.weights, adapter.sha256)  # a live run may have put another adapter in its place meanwhile
    return Exported(path=out, version=adapter.version, merged=True, base=config.model.path, byte_count=_size(out))


def default_folder(run: Path, version: int, *, merged: bool) -> Path:
    return run / "export" / f"v{version:06d}{'-merged' if merged else ''}"


def read_config(run: Path) -> Config:
    if not (run / "config.json").is_file():
        raise SetupError(f"{run} is not a run folder; it has no config.json")
    return build_config(RunDir(run).read_json("config.json"))


def portable(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """PEFT's settings with the base as other machines know it: a Hub name and its commit, not a path into this machine's cache."""
    recorded = Path(settings.get("base_model_name_or_path") or "")
    if (commit := hub_commit(recorded)) is None or not is_hub_name(name):
        return settings
    return settings | {"base_model_name_or_path": name, "revision": commit}


def base_folder(config: Config, adapter: AdapterFolder, progress: Progress) -> Path:
    """The model that the adapter was trained on: the very folder if it is still there, else the one of its name.

    The folder of a built-in model is named after what it is made of, that of a Hub model after its commit; so another one is noticed.
    """
    name = config.model.path
    recorded = Path(adapter.settings.get("base_model_name_or_path") or name)
    if (recorded / "config.json").is_file():
        return recorded
    task = builtin_name("model.path", name)
    folder = built(task, progress) if task else local_model(name, progress, revision=hub_commit(recorded))
    if task and folder.name != recorded.name:
        raise SetupError(f"model.path: {name} is now {folder.name}, but the run was trained on {recorded.name}; export it where it was trained")
    return folder


def hub_commit(folder: Path) -> str | None:
    """Of a folder in the Hub's cache, `.../snapshots/<commit>`."""
    return folder.name if folder.parent.name == "snapshots" else None


def is_tied(base: Path) -> bool:
    """Whether the base model's head is its embeddings again. Raises where nothing can be merged by weight."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise SetupError(f"model.path: {base} can't be loaded: {' '.join(str(error).split())}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise SetupError(f"--merged: {base} holds quantized weights, which B A can't be added to; export the adapter alone, without --merged")
    return bool(config.get_text_config().tie_word_embeddings)


def without_tied_head(weights: Weights) -> Weights:
    """A head that is the embeddings again is left out, as transformers itself leaves it out; it comes back when the model is loaded."""
    import torch

    held = {}
    for name, tensor in weights:
        if name in (_EMBEDDINGS, _HEAD):
            held[name] = tensor  # the base's own, memory-mapped
        else:
            yield name, tensor
    if len(held) == 2 and torch.equal(held[_EMBEDDINGS], held[_HEAD]):
        del held[_HEAD]
    yield from held.items()


def write_weights(weights: Iterable[tuple[str, "torch.Tensor"]], folder: Path, *, shard_bytes: int) -> list[str]:
    """Write safetensors as the weights come, one file at a time, with an index if there are several. Returns the dtypes met."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0
    dtypes: set[str] = set()

    def flush() -> None:
        _save(pending, folder / _part(len(shards)))
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    flush()
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return sorted(dtypes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (folder / _part(number)).rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(dtypes)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary neighbour to write into, renamed to `out` when everything is in it and on the disk; deleted when something fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"--out: {out} exists already and is {'not empty' if out.is_dir() else 'no folder'}; name a folder that is new or empty")
    target = out.resolve()
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        raise SetupError(f"--out: {out} can't be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone when it was renamed


def _save(tensors: dict[str, "torch.Tensor"], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from None  # a full disk, for instance; the folder's own handler says it
    file.chmod(0o644)  # safetensors lets nobody but the owner read


def _copy(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source} can't be read: {error.strerror}") from None
    target.write_bytes(data)


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

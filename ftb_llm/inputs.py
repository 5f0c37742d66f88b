"""What a run needs from outside, found before anything is started: the model's folder and the tokenized prompts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ftb_llm.config import Config
from ftb_llm.datasets import load_prompts
from ftb_llm.errors import ConfigError, InvalidConfig, SetupError
from ftb_llm.ports import Progress
from ftb_llm.tasks import TASKS
from ftb_llm.types import Prompt

_BUILTIN = "builtin:"
# Of a Hub repository: the weights in the one format that the engine merges into, the config and the tokenizer.
_HUB_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What a run needs from outside, read and checked."""

    model_path: Path
    task: str | None  # the built-in task whose oracle applies
    prompts: list[Prompt]


def read_inputs(config: Config, progress: Progress) -> Inputs:
    """The model folder (built-in ones are built on first use, others may come from the Hub) and the tokenized prompts."""
    from transformers import AutoTokenizer

    check_rewards_match(config)
    model_task, data_task = builtin_name("model.path", config.model.path), builtin_name("data.path", config.data.path)
    model_path = built(model_task, progress) if model_task else local_model(config.model.path, progress)
    data_path = str(built(data_task, progress) / "prompts.jsonl") if data_task else config.data.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise _wrong_model(f"{config.model.path} can't be loaded: {' '.join(str(error).split())}") from None
    # The oracle enumerates what this very tokenizer and model can write.
    task = data_task if data_task == model_task else None
    return Inputs(model_path=model_path, task=task, prompts=load_prompts(config, data_path, tokenizer))


def builtin_name(key: str, value: str) -> str | None:
    """The task that `builtin:TASK` names; None for anything but a built-in."""
    if not value.startswith(_BUILTIN):
        return None
    name = value.removeprefix(_BUILTIN)
    if name not in TASKS:
        raise InvalidConfig([ConfigError(key, f"{value} is no built-in; it must be one of {', '.join(_BUILTIN + task for task in TASKS)}")])
    return name


def check_rewards_match(config: Config) -> None:
    """The reward of one built-in task says nothing about the prompts of another."""
    task = builtin_name("data.path", config.data.path)
    others = {f"ftb_llm.tasks.{name}:reward" for name in TASKS if name != task}
    for reward in config.rewards.functions if task else ():
        if reward.function in others:
            message = f"{reward.function} does not go with data.path {config.data.path}; use ftb_llm.tasks.{task}:reward"
            raise InvalidConfig([ConfigError("rewards.functions", message)])


def built(task: str, progress: Progress) -> Path:
    """The folder of a built-in task's base model and prompts."""
    from ftb_llm.tasks import base_model

    try:
        with shown(base_model.log, progress):
            return base_model.ensure_built(task)
    except OSError as error:
        folder = base_model.cache_folder()
        raise SetupError(f"FTB_LLM_CACHE: the cache folder {folder} can't be used: {error.strerror or error}; set FTB_LLM_CACHE to a writable one") from None


@contextmanager
def shown(log: logging.Logger, progress: Progress) -> Iterator[None]:
    """Show what is logged meanwhile: building takes a minute, and whoever waits should know for what."""
    handler, level = _ToProgress(progress), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _ToProgress(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.line(record.getMessage())


def local_model(path: str, progress: Progress, revision: str | None = None) -> Path:
    """The folder of a model: the one named, or the Hub's cached or fetched copy of the repository of that name, newest or of a commit."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    progress.line(f"model {path}: no local folder, looking for it on the Hugging Face Hub")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # noqa: BLE001 - the Hub's client raises dozens of types for one cause: it does not give the files
        reason = " ".join(str(error).split())
        raise _wrong_model(f"{path} is no local folder, and the Hugging Face Hub does not give it: {reason}") from None


def _wrong_model(message: str) -> InvalidConfig:
    return InvalidConfig([ConfigError("model.path", message)])

"""Prompts in TRL's prompt-only format, from a local file, a Hub dataset or a built-in task, tokenized once."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ftb_llm.config.schema import Config
from ftb_llm.errors import ConfigError, InvalidConfig
from ftb_llm.types import Prompt

_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any: ...


def load_prompts(config: Config, path: str, tokenizer: Tokenizer) -> list[Prompt]:
    """Read, check and tokenize every prompt; the first wrong row stops the run with its number."""
    rows = read_rows(path, config.data.split)
    room = config.actors.max_model_len - config.sampling.max_tokens
    prompts = [to_prompt(index, row, tokenizer) for index, row in enumerate(rows)]
    if not prompts:
        raise _wrong(path, "holds no rows")
    for prompt in prompts:
        if len(prompt.token_ids) > room:
            raise _wrong(
                path,
                f"row {prompt.index}: the prompt has {len(prompt.token_ids)} tokens, but actors.max_model_len "
                f"{config.actors.max_model_len} less sampling.max_tokens {config.sampling.max_tokens} leaves {room}",
            )
    return prompts


def read_rows(path: str, split: str) -> Iterable[Mapping[str, Any]]:
    """The dataset's rows. A path with a known ending is a local file; anything else is a Hub name or a dataset folder."""
    import datasets

    datasets.disable_progress_bars()
    loader = _LOADERS.get(Path(path).suffix)
    if loader is not None and not Path(path).is_file():
        raise _wrong(path, "no such file; it must be a .jsonl or .parquet file, a Hub name, or builtin:hypergrid / builtin:sums")
    try:
        source = {"path": loader, "data_files": path, "split": "train"} if loader else {"path": path, "split": split}
        dataset = datasets.load_dataset(**source)
    except Exception as error:  # noqa: BLE001 - `datasets` raises dozens of types for one cause: it can't read this
        cause = error.__cause__ or error
        raise _wrong(path, f"can't be read: {type(cause).__name__}: {' '.join(str(cause).split())}") from None
    if "prompt" not in dataset.column_names:
        raise _wrong(path, f"has columns {dataset.column_names} but no prompt column")
    return dataset


def to_prompt(index: int, row: Mapping[str, Any], tokenizer: Tokenizer) -> Prompt:
    """One row: text is encoded as it stands, a conversation goes through the model's own chat template."""
    value = row["prompt"]
    columns = {name: column for name, column in row.items() if name != "prompt"}
    try:
        json.dumps(columns)
    except TypeError as error:
        raise ConfigError("data.path", f"row {index}: its columns can't be handed to the rewards: {error}") from None
    if isinstance(value, str):
        return Prompt(index=index, text=value, token_ids=_tokens(index, tokenizer.encode(value) if value else ()), columns=columns)
    if not _is_conversation(value):
        raise ConfigError("data.path", f"row {index}: prompt is {value!r}; it must be text or a list of messages with role and content")
    text = tokenizer.apply_chat_template(value, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(value, add_generation_prompt=True, tokenize=True)
    token_ids = ids["input_ids"] if isinstance(ids, Mapping) else ids
    return Prompt(index=index, text=text, token_ids=_tokens(index, token_ids), messages=[dict(message) for message in value], columns=columns)


def _tokens(index: int, token_ids: Sequence[int]) -> tuple[int, ...]:
    """An engine can't continue nothing."""
    if not token_ids:
        raise ConfigError("data.path", f"row {index}: the prompt is empty; it must have at least one token")
    return tuple(token_ids)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)


def _wrong(path: str, message: str) -> InvalidConfig:
    return InvalidConfig([ConfigError("data.path", f"{path} {message}")])


def check_prompts_fit(config: Config, longest: int) -> None:
    """Refuse settings under which the longest prompt leaves no room for its completion."""
    if longest + config.sampling.max_tokens > config.actors.max_model_len:
        room = config.actors.max_model_len - longest
        message = (
            f"{config.sampling.max_tokens} is too many: the longest prompt has {longest} tokens, "
            f"which leaves {room} of actors.max_model_len {config.actors.max_model_len}"
        )
        raise InvalidConfig([ConfigError("sampling.max_tokens", message)])


class PromptOrder:
    """Which prompt comes n-th: each epoch visits every prompt once. A pure function of n, so a resumed run skips nothing."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self.longest = max(len(prompt.token_ids) for prompt in prompts)
        self._epoch = -1
        self._places: list[int] = []

    def __getitem__(self, n: int) -> Prompt:
        epoch, place = divmod(n, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._places = list(range(len(self._prompts)))
            if self._shuffle:
                random.Random(f"{self._seed}/{epoch}").shuffle(self._places)
        return self._prompts[self._places[place]]

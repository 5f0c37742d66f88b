"""What `ftb-llm bench families` knows of a family and learns of it. Plain records: a process of its own is told the one and answers the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What every tiny model has, where its config knows the name: wide enough to be told from rounding, small enough for float64.
COMMON: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One configuration: a tiny model that is built from it is judged."""

    name: str
    model_type: str  # as transformers knows it
    settings: Settings  # beyond the common ones; None takes the config's own default
    attention: str = "eager"  # the naive loop's
    experts: bool = False  # routed: rounding alone changes which expert a token goes to


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is judged, and in which dtype."""

    family: Family
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Distances from the naive loop in float64."""

    value: float  # of the policy's log-probs
    reference: float  # of the reference's
    gradient: float  # of the adapter's gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the process found. Either why there are no numbers, or all of them."""

    refused: str | None = None  # by the check before anything is loaded
    failed: str | None = None  # after that check had said ok
    packed: bool = False  # scored the fast way
    adapted: float = 0.0  # share of the weights, but embeddings and head, that the adapter reaches
    ours: Errors | None = None
    naive: Errors | None = None  # of the naive loop in the learner's own dtype
    merged: float | None = None  # the exported model's log-probs, loaded again; None where not looked at


def family(name: str, model_type: str | None = None, /, **settings: Any) -> Family:
    """A dense one, of the type of its name where no other is given."""
    return Family(name=name, model_type=model_type or name, settings=settings)


def routed(name: str, model_type: str | None = None, /, **settings: Any) -> Family:
    """One with experts."""
    return Family(name=name, model_type=model_type or name, settings=settings, experts=True)

"""Which runs are the built-in tasks as they are shipped: of those the end is known in advance, so their numbers have goals."""

from typing import Any

from ftb_llm.config.load import build_config, merge, settings
from ftb_llm.config.schema import Config

_SHARED: dict[str, Any] = {
    "model": {"lora": {"rank": 16, "alpha": 32}},
    "sampling": {"group_size": 32},
    "actors": {"count": 1, "groups_in_flight": 16, "max_model_len": 64, "kv_cache_gib": 0.25, "push_every_steps": 4},
    "buffer": {"capacity_groups": 24},
    "learner": {"groups_per_step": 8, "learning_rate": 0.003},
    "eval": {"every_steps": 25},
}


def _task(name: str, own: dict[str, Any]) -> dict[str, Any]:
    builtin = f"builtin:{name}"
    source = {"model": {"path": builtin}, "data": {"path": builtin}, "rewards": {"functions": [{"function": f"ftb_llm.tasks.{name}:reward"}]}}
    return merge(merge(_SHARED, source), own)


# As configs/quickstart.yaml and configs/sums.yaml have them, which a test holds them to; an installed package has no configs.
SHIPPED: dict[str, dict[str, Any]] = {
    "hypergrid": _task(
        "hypergrid",
        {
            "objective": {"divergence": {"name": "reverse_kl"}, "beta": 0.5},
            "sampling": {"max_tokens": 4},
            "learner": {"warmup_steps": 10},
            "run": {"max_steps": 400},
        },
    ),
    "sums": _task(
        "sums",
        {"objective": {"divergence": {"name": "hellinger"}, "beta": 0.2}, "sampling": {"max_tokens": 8}, "run": {"max_steps": 300}},
    ),
}
# What says where a run lies, how it is watched, how it begins, or which member of the family it tries.
_FREE = ("run.name.", "run.dir.", "run.seed.", "control.", "logging.", "checkpoint.", "eval.", "objective.divergence.")


def is_as_shipped(config: Config) -> bool:
    """Whether this is a built-in task under the settings that its goals are for."""
    shipped = SHIPPED.get(config.data.path.removeprefix("builtin:")) if config.data.path.startswith("builtin:") else None
    return shipped is not None and _what_counts(config) == _what_counts(build_config(shipped))


def _what_counts(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for key, _ in settings():
        if f"{key}.".startswith(_FREE):
            continue
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found

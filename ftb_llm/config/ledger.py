"""The versions of the config while a run is alive: who changed what, and from which step on.

A patch becomes a version at once and takes effect at the next step boundary: `effective_step` is the first step that has
not started yet. Everything is synchronous, so that on one event loop a patch is applied whole or not at all.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftb_llm.config.load import build_config, is_live, merge, settings
from ftb_llm.config.resolve import resolve_objective
from ftb_llm.config.schema import Config, Divergence, Member
from ftb_llm.errors import ConfigError, FixedSetting, InvalidConfig, StaleConfig
from ftb_llm.types import ObjectiveSpec

KEYS = tuple(key for key, _ in settings())
LIVE_KEYS = frozenset(key for key in KEYS if is_live(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigVersion:
    """One version of the config; `changed` maps each changed key to (old, new)."""

    version: int
    config: Config
    effective_step: int
    source: str
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    time: float

    @property
    def etag(self) -> str:
        """Strong entity tag: the version and a hash of what it holds, quoted as HTTP wants it."""
        text = json.dumps(self.config.model_dump(mode="json"), sort_keys=True)
        return f'"{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"'


class ConfigLedger:
    """All versions of one run's config, oldest first.

    `next_step` gives the number of the first step that has not started; it may raise `WrongState` when no step will follow.
    `on_change` is called with each patched version before it counts: if it raises, nothing has changed.
    `history` holds the versions of the run that is resumed. The constructor calls nobody: the versions it had to add
    (the first one, or one for a config that differs from the last of `history`) are `ledger.history()[len(history):]`.
    """

    def __init__(
        self,
        config: Config,
        *,
        next_step: Callable[[], int],
        on_change: Callable[[ConfigVersion], None],
        history: Sequence[ConfigVersion] = (),
    ) -> None:
        self._next_step = next_step
        self._on_change = on_change
        self._versions = list(history)
        if not self._versions:
            self._versions.append(ConfigVersion(version=1, config=config, effective_step=next_step(), source="start", time=time.time()))
        elif config != self.current.config or self.current.effective_step > next_step():
            self._versions.append(self._successor(config, source="resume"))

    @property
    def current(self) -> ConfigVersion:
        """The newest version; it may not have taken effect yet."""
        return self._versions[-1]

    @property
    def etag(self) -> str:
        return self.current.etag

    def history(self) -> tuple[ConfigVersion, ...]:
        return tuple(self._versions)

    def at_step(self, step: int) -> ConfigVersion:
        """The version that governs `step`: of those in effect by then, the newest."""
        for version in reversed(self._versions):
            if version.effective_step <= step:
                return version
        raise ValueError(f"step {step} is before the first config version, which starts at step {self._versions[0].effective_step}")

    def objective_at(self, step: int) -> ObjectiveSpec:
        """The objective of `step`, its schedules evaluated: the same step of the same history always has the same."""
        return resolve_objective(self.at_step(step).config.objective, step, self.member_since(step))

    def member_since(self, step: int) -> int:
        """The step from which on the divergence of `step` has been in force without a break, its schedule left aside.

        Versions that never governed a step (replaced before it came, or of a future that a resume abandoned) don't count.
        """
        member, end = self.at_step(step).config.objective.divergence.first, step + 1
        for version in reversed(self._versions):
            if version.effective_step >= end:
                continue
            divergence = version.config.objective.divergence
            if divergence.first != member or divergence.scheduled(end - 1) is not None:
                break
            end = version.effective_step
        return min(end, step)

    def patch(self, merge_patch: Any, *, if_match: str, source: str) -> ConfigVersion:
        """Apply an RFC 7386 merge patch; a patch that changes nothing returns the current version.

        A patch of the divergence's name, alpha or width takes the place of the member in force: see `_in_its_place`.

        Raises `StaleConfig` when `if_match` is neither `*` nor the current etag, `FixedSetting` when a fixed setting would
        change, and `InvalidConfig` when a key is unknown or the result is not a valid config.
        """
        if not _matches(if_match, self.etag):
            raise StaleConfig(if_match, self.etag)
        if not isinstance(merge_patch, Mapping):
            raise InvalidConfig([ConfigError("", 'the patch must be a JSON object such as {"objective": {"beta": 0.1}}')])
        tree = self.current.config.model_dump(mode="json")
        now = dict(leaves(tree))
        # Before the values are checked: a bad value for a fixed setting is best answered by saying that it is fixed.
        fixed = [key for key, value in leaves(merge_patch) if value is not None and value != now[key] and key not in LIVE_KEYS]
        if fixed:
            raise FixedSetting(fixed)
        merge_patch = _in_its_place(merge_patch, self.current.config.objective.divergence, self._next_step())
        successor = self._successor(build_config(_merged(tree, merge_patch)), source=source)
        if not successor.changed:
            return self.current
        fixed = [key for key in successor.changed if key not in LIVE_KEYS]  # settings put back to their default by a null
        if fixed:
            raise FixedSetting(fixed)
        self._check_max_steps(successor)
        self._on_change(successor)
        self._versions.append(successor)
        return successor

    def _successor(self, config: Config, *, source: str) -> ConfigVersion:
        return ConfigVersion(
            version=self.current.version + 1,
            config=config,
            effective_step=self._next_step(),
            source=source,
            changed=difference(self.current.config, config),
            time=time.time(),
        )

    def _check_max_steps(self, version: ConfigVersion) -> None:
        current_step = version.effective_step - 1
        if "run.max_steps" in version.changed and version.config.run.max_steps < current_step:
            message = f"{version.config.run.max_steps} is below the current step {current_step}; it must be at least {max(current_step, 1)}"
            raise InvalidConfig([ConfigError("run.max_steps", message)])


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Each setting in which the two differ, as dotted key to (old value, new value)."""
    before, after = (dict(leaves(config.model_dump(mode="json"))) for config in (old, new))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The known settings that `tree` names, as (dotted key, value), in the order of the schema."""
    for key in KEYS:
        value: Any = tree
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            yield key, value


def _merged(tree: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7386, with one difference: a null for a key that does not exist stays, so that a misspelt key is reported."""
    merged = dict(tree)
    for key, value in patch.items():
        below = merged.get(key)
        if value is None and key in merged:
            del merged[key]
        elif isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = value
    return merged


def _in_its_place(patch: Mapping[str, Any], divergence: Divergence, step: int) -> Mapping[str, Any]:
    """The patch, with what a new member means for the old one: its alpha and width go with it, and so does what the schedule began by `step`.

    What the patch itself says about them holds.
    """
    objective = patch.get("objective")
    new = objective.get("divergence") if isinstance(objective, Mapping) else None
    if not isinstance(new, Mapping) or not new.keys() & Member.model_fields.keys():
        return patch
    implied: dict[str, Any] = {}
    if new.get("name", divergence.name) != divergence.name:
        implied |= {"alpha": None, "width": None}
    if divergence.scheduled(step) is not None:
        implied["schedule"] = [entry.model_dump(mode="json") for entry in divergence.schedule if entry.step > step]
    return merge(patch, {"objective": {"divergence": implied | dict(new)}})


def _matches(if_match: str, etag: str) -> bool:
    """True for `*`, and for a list of entity tags that holds `etag`; the quotes, easily lost in a shell, may be missing."""
    tags = [tag.strip() for tag in if_match.split(",")]
    return "*" in tags or any(tag in (etag, etag.strip('"')) for tag in tags)

"""The versions of the config while a run is alive: who changed what, and from which step on.

A patch becomes a version at once and takes effect at the next step boundary: `effective_step` is the first step that has
not started yet. Everything is synchronous, so that on one event loop a patch is applied whole or not at all.
"""

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ftb_llm.config.load import build_config, is_live, merge, settings
from ftb_llm.config.resolve import resolve_objective
from ftb_llm.config.schema import Config, Divergence, Member
from ftb_llm.errors import ConfigError, FixedSetting, InvalidConfig, StaleConfig, WrongState
from ftb_llm.types import ObjectiveSpec

KEYS = tuple(key for key, _ in settings())
LIVE_KEYS = frozenset(key for key in KEYS if is_live(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChange:
    """What one version changed; `changed` maps each changed key to (old, new)."""

    version: int
    effective_step: int
    source: str
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigVersion(ConfigChange):
    """One version of the config, whole."""

    config: Config

    @property
    def etag(self) -> str:
        """Strong entity tag: the version and a hash of what it holds, quoted as HTTP wants it."""
        text = json.dumps(self.config.model_dump(mode="json"), sort_keys=True)
        return f'"{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"'

    @property
    def change(self) -> ConfigChange:
        """The same without the config."""
        return ConfigChange(**{name: getattr(self, name) for name in _CHANGE_FIELDS})


_CHANGE_FIELDS = tuple(item.name for item in fields(ConfigChange))


@dataclass(frozen=True, slots=True, kw_only=True)
class PastVersions:
    """The versions of a run that is resumed, oldest first: what each changed, and the newest config."""

    changes: Sequence[ConfigChange]
    config: Config


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is kept of each version; a divergence that did not change is the same object in many."""

    change: ConfigChange
    divergence: Divergence


class ConfigLedger:
    """All versions of one run's config, oldest first.

    `next_step` gives the number of the first step that has not started; it may raise `WrongState` when no step will follow.
    `on_change` is called with each patched version before it counts: if it raises, nothing has changed.
    `past` holds the versions of the run that is resumed. The constructor calls nobody; `added` is the version that it had
    to add: the first one, or one for a config that differs from the last of `past`.

    A run may have thousands of versions. Only those that can still govern a step are kept whole, of the others what they
    changed; an older one is put together again when it is asked for.
    """

    def __init__(
        self,
        config: Config,
        *,
        next_step: Callable[[], int],
        on_change: Callable[[ConfigVersion], None],
        past: PastVersions | None = None,
    ) -> None:
        self._next_step = next_step
        self._on_change = on_change
        self._entries: list[_Entry] = []
        self._whole: list[ConfigVersion] = []  # the newest ones, oldest first
        self.added: ConfigVersion | None = None
        if past is None:
            first = ConfigVersion(version=1, config=config, effective_step=next_step(), source="start", time=time.time())
            self.added = self._add(first)
            return
        self._entries = _entries(past)
        self._whole = [_whole(past.changes[-1], past.config)]
        if config != self.current.config or self.current.effective_step > next_step():
            self.added = self._add(self._successor(config, source="resume"))

    @property
    def current(self) -> ConfigVersion:
        """The newest version; it may not have taken effect yet."""
        return self._whole[-1]

    @property
    def etag(self) -> str:
        return self.current.etag

    @property
    def count(self) -> int:
        """How many versions there are."""
        return len(self._entries)

    def history(self, *, since: int = 0, limit: int | None = None) -> tuple[ConfigChange, ...]:
        """What the versions above `since` changed, oldest first; of more than `limit` the first ones."""
        begin = bisect_right(self._entries, since, key=lambda entry: entry.change.version)
        end = None if limit is None else begin + limit
        return tuple(entry.change for entry in self._entries[begin:end])

    def past(self) -> PastVersions:
        """What a later ledger of the same run begins with."""
        return PastVersions(changes=self.history(), config=self.current.config)

    def at_step(self, step: int) -> ConfigVersion:
        """The version that governs `step`: of those in effect by then, the newest."""
        return self._version(self._position_at(step))

    def _position_at(self, step: int) -> int:
        for position in range(len(self._entries) - 1, -1, -1):
            if self._entries[position].change.effective_step <= step:
                return position
        first = self._entries[0].change.effective_step
        raise ValueError(f"step {step} is before the first config version, which starts at step {first}")

    def objective_at(self, step: int) -> ObjectiveSpec:
        """The objective of `step`, its schedules evaluated: the same step of the same history always has the same."""
        return resolve_objective(self.at_step(step).config.objective, step, self.member_since(step))

    def member_since(self, step: int) -> int:
        """The step from which on the divergence of `step` has been in force without a break, its schedule left aside.

        Versions that never governed a step (replaced before it came, or of a future that a resume abandoned) don't count.
        """
        member, end = self._entries[self._position_at(step)].divergence.first, step + 1
        known: Divergence | None = None  # in force since `end`; what held at a later step holds at an earlier one
        for entry in reversed(self._entries):
            effective_step, divergence = entry.change.effective_step, entry.divergence
            if effective_step >= end:
                continue
            if divergence is not known and (divergence.first != member or divergence.scheduled(end - 1) is not None):
                break
            known, end = divergence, effective_step
        return min(end, step)

    def patch(self, merge_patch: Any, *, if_match: str, source: str) -> ConfigVersion:
        """Apply an RFC 7386 merge patch; a patch that changes nothing returns the current version.

        A patch of the divergence's name, alpha or width takes the place of the member in force: see `_in_its_place`.

        Raises `StaleConfig` when `if_match` is neither `*` nor the current etag, `FixedSetting` when a fixed setting would
        change, `InvalidConfig` when a key is unknown or the result is not a valid config, and `WrongState` when the step
        from which it would hold will never be taken.
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
        return self._add(successor)

    def _add(self, version: ConfigVersion) -> ConfigVersion:
        """Append it, and let go of the configs that no step will ask for: the step in progress is the oldest that will."""
        before = self._entries[-1].divergence if self._entries else None
        divergence = version.config.objective.divergence
        self._entries.append(_Entry(version.change, before if before is not None and before == divergence else divergence))
        ahead = [kept for kept in self._whole if kept.effective_step < version.effective_step][-1:]
        self._whole = [*ahead, version]
        return version

    def _version(self, position: int) -> ConfigVersion:
        """The whole version at a position; one that is not kept whole is the newest with every later change undone."""
        change = self._entries[position].change
        for kept in self._whole:
            if kept.version == change.version:
                return kept
        tree = self.current.config.model_dump(mode="json")
        for entry in reversed(self._entries[position + 1 :]):
            for key, (old, _) in entry.change.changed.items():
                _put(tree, key, old)
        return _whole(change, build_config(tree))

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
        # A lowered run.max_steps acts at once; anything else would begin with a step that is not taken.
        if version.effective_step > version.config.run.max_steps and version.changed.keys() != {"run.max_steps"}:
            raise WrongState(
                f"no step will follow: step {current_step} is the last one with run.max_steps {version.config.run.max_steps}; "
                "raise run.max_steps in the same patch to go on"
            )


def _whole(change: ConfigChange, config: Config) -> ConfigVersion:
    return ConfigVersion(config=config, **{name: getattr(change, name) for name in _CHANGE_FIELDS})


def _entries(past: PastVersions) -> list[_Entry]:
    """The divergence of each version: the newest one's, with every later change of it undone."""
    divergence = past.config.objective.divergence
    tree = {"objective": {"divergence": divergence.model_dump(mode="json")}}
    entries: list[_Entry] = []
    for change in reversed(past.changes):
        entries.append(_Entry(change, divergence))
        undone = {key: old for key, (old, _) in change.changed.items() if key.startswith("objective.divergence.")}
        if undone:
            for key, old in undone.items():
                _put(tree, key, old)
            divergence = Divergence.model_validate(tree["objective"]["divergence"])
    return entries[::-1]


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the setting with this dotted key."""
    *above, last = key.split(".")
    for part in above:
        tree = tree[part]
    tree[last] = value


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

"""`run.db`: one SQLite file that knows where every group is and which configs were in force.

The journal is the record, the buffer in memory is its working copy: every change of a group's state is one transaction
here, so the accounting identity holds at every instant and after any stop. Payloads are kept only while a group is alive.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftb_llm.config import build_config
from ftb_llm.config.ledger import ConfigChange, ConfigVersion, PastVersions
from ftb_llm.errors import SetupError
from ftb_llm.types import Group, GroupState, ScoredGroup

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    reason TEXT,
    prompt_index INTEGER NOT NULL,
    generator TEXT NOT NULL,
    min_version INTEGER NOT NULL,
    max_version INTEGER NOT NULL,
    token_count INTEGER NOT NULL,
    reward_mean REAL,
    trained_step INTEGER,
    created REAL NOT NULL,
    payload BLOB
);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state);
CREATE TABLE IF NOT EXISTS config_versions (
    version INTEGER PRIMARY KEY,
    effective_step INTEGER NOT NULL,
    source TEXT NOT NULL,
    changed TEXT NOT NULL,
    config TEXT NOT NULL,
    time REAL NOT NULL
);
"""


@dataclass(slots=True, kw_only=True)
class Accounting:
    """Groups by where they are. The number generated is their sum: it can't drift, because it isn't stored."""

    groups: Counter[GroupState]
    reasons: Counter[str]

    def move(self, count: int, source: GroupState, target: GroupState) -> None:
        self.groups[source] -= count
        self.groups[target] += count

    @property
    def generated(self) -> int:
        return self.groups.total()

    def as_dict(self) -> dict[str, Any]:
        counts = {state.value: self.groups[state] for state in GroupState}
        return {"generated": self.generated, **counts, "reasons": dict(self.reasons)}


class Journal:
    """The open `run.db`. Used from one thread: the controller's."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    # -- groups

    def add(self, scored: ScoredGroup) -> None:
        """A scored group enters the buffer."""
        reward_mean = sum(scored.rewards) / len(scored.rewards)
        self._insert(scored.group, GroupState.BUFFERED, reward_mean=reward_mean, payload=scored.encode())

    def add_rejected(self, group: Group, reason: str) -> None:
        """A group whose rewards failed is recorded with its reason, never silently lost."""
        self._insert(group, GroupState.REJECTED, reason=reason)

    def move(self, ids: Iterable[str], state: GroupState, *, reason: str | None = None, step: int | None = None) -> None:
        """Groups change state together, in one transaction. Finished groups give up their payload."""
        alive = state in (GroupState.BUFFERED, GroupState.LEASED)
        rows = [(state.value, reason, step, alive, group_id) for group_id in ids]
        with self._transaction():
            self._db.executemany(
                "UPDATE groups SET state = ?, reason = ?, trained_step = ?, payload = CASE WHEN ? THEN payload END WHERE id = ?",
                rows,
            )

    def alive(self) -> list[ScoredGroup]:
        """Groups that were buffered or leased when the file was last written, oldest first; leased ones become buffered."""
        with self._transaction():
            self._db.execute("UPDATE groups SET state = ? WHERE state = ?", (GroupState.BUFFERED.value, GroupState.LEASED.value))
        rows = self._db.execute("SELECT payload FROM groups WHERE state = ? ORDER BY created, id", (GroupState.BUFFERED.value,))
        return [ScoredGroup.decode(payload) for (payload,) in rows]

    def group_ids(self) -> list[str]:
        """Every group that was ever generated."""
        return [group_id for (group_id,) in self._db.execute("SELECT id FROM groups")]

    def accounting(self) -> Accounting:
        """Counted afresh from the file."""
        counts = self._db.execute("SELECT state, COUNT(*) FROM groups GROUP BY state")
        reasons = self._db.execute("SELECT reason, COUNT(*) FROM groups WHERE reason IS NOT NULL GROUP BY reason")
        return Accounting(groups=Counter({GroupState(state): count for state, count in counts}), reasons=Counter(dict(reasons)))

    # -- config versions

    def add_config(self, version: ConfigVersion) -> None:
        self._db.execute(
            "INSERT INTO config_versions VALUES (?, ?, ?, ?, ?, ?)",
            (
                version.version,
                version.effective_step,
                version.source,
                json.dumps(version.changed),
                version.config.model_dump_json(),
                version.time,
            ),
        )

    @contextmanager
    def adding_config(self, version: ConfigVersion) -> Iterator[None]:
        """The version is in the file when the block ends well, and not when it raises."""
        with self._transaction():
            self.add_config(version)
            yield

    def past_configs(self) -> PastVersions | None:
        """Every config version of a run that has any."""
        rows = self._db.execute("SELECT version, effective_step, source, changed, time FROM config_versions ORDER BY version")
        changes = [
            ConfigChange(
                version=version,
                effective_step=effective_step,
                source=source,
                changed={key: (old, new) for key, (old, new) in json.loads(changed).items()},
                time=at,
            )
            for version, effective_step, source, changed, at in rows
        ]
        if not changes:
            return None
        (newest,) = self._db.execute("SELECT config FROM config_versions ORDER BY version DESC LIMIT 1").fetchone()
        return PastVersions(changes=changes, config=build_config(json.loads(newest)))

    # -- inside

    def _insert(
        self,
        group: Group,
        state: GroupState,
        *,
        reason: str | None = None,
        reward_mean: float | None = None,
        payload: bytes | None = None,
    ) -> None:
        self._db.execute(
            "INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)",
            (
                group.id,
                state.value,
                reason,
                group.prompt.index,
                group.generator,
                group.min_version,
                group.max_version,
                group.token_count,
                reward_mean,
                time.time(),
                payload,
            ),
        )

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """BEGIN … COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """A full disk may refuse the commit and leave the rest to us, or may have ended the transaction already."""
        try:
            if error_type is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def check_books(path: Path) -> None:
    """A run that goes on needs its books. Raises `SetupError` when they are gone or damaged; a new file is never begun here."""
    fault = _damage(path)
    if fault is not None:
        raise SetupError(
            f"--resume: {path} {fault}; without it nobody knows which groups were trained. Put a copy of it back, or begin a new run under another run.name"
        )


def _damage(path: Path) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size == 0:
        return "is empty"
    try:
        with closing(sqlite3.connect(path)) as db:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            db.execute("SELECT COUNT(*) FROM groups").fetchone()
            db.execute("SELECT COUNT(*) FROM config_versions").fetchone()
    except sqlite3.DatabaseError as error:
        return f"is damaged ({error})"
    return None if verdict == "ok" else f"is damaged ({' '.join(str(verdict).split())})"

"""One failed write of a config version leaves no trace, and the next patch works: the real ledger, journal and folder."""

import errno
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ftb_llm import run_dir
from ftb_llm.config.ledger import ConfigVersion
from ftb_llm.controller import Controller
from ftb_llm.errors import NotRecorded
from ftb_llm.journal import Journal
from ftb_llm.run_dir import RunDir
from tests.fakes import make_run

SETTINGS = {"sampling": {"group_size": 2}, "buffer": {"capacity_groups": 4}, "learner": {"groups_per_step": 2}}


@pytest.fixture
def run(tmp_path: Path) -> Controller:
    run = make_run(tmp_path / "run", SETTINGS)
    RunDir(tmp_path / "run").write_json("config.json", run.ledger.current.config.model_dump(mode="json"))
    return run


def patch(run: Controller, beta: float) -> ConfigVersion:
    return run.ledger.patch({"objective": {"beta": beta}}, if_match="*", source="test")


def traces(path: Path) -> dict[str, Any]:
    """What a reader finds of the config: numbers in run.db, beta in config.json, announced versions."""
    with sqlite3.connect(path / "run.db") as db:
        versions = [version for (version,) in db.execute("SELECT version FROM config_versions ORDER BY version")]
    events = [event["version"] for event in RunDir(path).events() if event["kind"] == "config_change"]
    return {"run.db": versions, "config.json": json.loads((path / "config.json").read_text())["objective"]["beta"], "events": events}


def refuse(number: int) -> Any:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False), (errno.EMFILE, False)])
def test_a_version_that_config_json_refuses_did_not_happen(run: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, full: bool) -> None:
    patch(run, 0.41)
    with monkeypatch.context() as broken:
        broken.setattr(run_dir.os, "fsync", refuse(number))
        for beta in (0.42, 0.43):
            with pytest.raises(NotRecorded, match=r"config version 3 can't be written to config\.json: .*; it did not happen") as caught:
                patch(run, beta)
            assert caught.value.full is full
    assert run.ledger.current.version == 2
    assert traces(tmp_path / "run") == {"run.db": [1, 2], "config.json": 0.41, "events": [2]}
    assert patch(run, 0.44).version == 3
    assert traces(tmp_path / "run") == {"run.db": [1, 2, 3], "config.json": 0.44, "events": [2, 3]}


def test_a_version_that_run_db_refuses_is_not_announced(run: Controller, tmp_path: Path) -> None:
    """Another process that holds the file stands for a disk that refuses."""
    run._journal._db.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(tmp_path / "run" / "run.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(NotRecorded, match=r"config version 2 can't be written to run\.db: database is locked"):
        patch(run, 0.41)
    other.execute("ROLLBACK")
    assert traces(tmp_path / "run") == {"run.db": [1], "config.json": 0.5, "events": []}
    assert patch(run, 0.42).version == 2
    assert traces(tmp_path / "run") == {"run.db": [1, 2], "config.json": 0.42, "events": [2]}


def full_database(path: Path) -> Journal:
    """A journal whose file may not grow by a single page."""
    journal = Journal(path)
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    return journal


def test_a_full_run_db_is_a_full_disk(run: Controller, tmp_path: Path) -> None:
    run._journal.close()
    run._journal = full_database(tmp_path / "run" / "run.db")

    def fill() -> None:
        for number in range(100):
            patch(run, 0.1 + number / 1000)

    with pytest.raises(NotRecorded, match="database or disk is full") as caught:
        fill()
    assert caught.value.full
    version = run.ledger.current.version
    found = traces(tmp_path / "run")
    assert found["run.db"] == list(range(1, version + 1)) and found["events"] == list(range(2, version + 1))
    assert found["config.json"] == run.ledger.current.config.objective.beta
    run._journal._db.execute("PRAGMA max_page_count = 1000000")
    assert patch(run, 0.9).version == version + 1


def test_a_commit_that_is_refused_puts_config_json_back(run: Controller, tmp_path: Path) -> None:
    class Refusing:
        """A connection whose next commit fails, as on a full disk."""

        def __init__(self, db: sqlite3.Connection) -> None:
            self.db, self.refuse = db, True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.db, name)

        def execute(self, statement: str, *values: Any) -> Any:
            if statement == "COMMIT" and self.refuse:
                self.refuse = False
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return self.db.execute(statement, *values)

    run._journal._db = Refusing(run._journal._db)  # type: ignore[assignment]
    with pytest.raises(NotRecorded, match=r"run\.db: database or disk is full") as caught:
        patch(run, 0.41)
    assert caught.value.full
    assert traces(tmp_path / "run") == {"run.db": [1], "config.json": 0.5, "events": []}
    assert patch(run, 0.42).version == 2

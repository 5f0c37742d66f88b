"""A new config version, written down in an order that leaves no trace of one that failed.

`run.db` in a transaction that holds until `config.json` is written, then the event, which nobody may read of a version that
is not there. What is raised here refuses the version: the ledger doesn't take its number, and the next patch can.
"""

import errno
import sqlite3

from ftb_llm.config import Config
from ftb_llm.config.ledger import ConfigVersion
from ftb_llm.delivery import Emit
from ftb_llm.errors import NotRecorded
from ftb_llm.journal import Journal
from ftb_llm.run_dir import RunDir

CONFIG = "config.json"


def record_config(version: ConfigVersion, *, before: Config, journal: Journal, run_dir: RunDir, emit: Emit) -> None:
    """Raises `NotRecorded` when the disk refuses it; then everything is as it was."""
    replaced = False
    try:
        with journal.adding_config(version):
            run_dir.write_json(CONFIG, version.config.model_dump(mode="json"))
            replaced = True
    except (OSError, sqlite3.OperationalError) as error:
        fault = _fault(error)
        if replaced:  # the last word, the commit, was refused
            fault += _put_back(run_dir, before)
        raise NotRecorded(_number(error), f"config version {version.version} {fault}; it did not happen") from error
    changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in version.changed.items())
    emit(
        "config_change",
        f"config version {version.version} from step {version.effective_step} on ({version.source}): {changes}",
        version=version.version,
        effective_step=version.effective_step,
        source=version.source,
        changed={key: list(values) for key, values in version.changed.items()},
    )


def _put_back(run_dir: RunDir, before: Config) -> str:
    try:
        run_dir.write_json(CONFIG, before.model_dump(mode="json"))
    except OSError as error:
        return f", and {CONFIG}, which holds it, can't be put back: {error.strerror}"
    return ""


def _fault(error: OSError | sqlite3.OperationalError) -> str:
    where, why = (CONFIG, error.strerror) if isinstance(error, OSError) else ("run.db", error)
    return f"can't be written to {where}: {why}"


def _number(error: OSError | sqlite3.OperationalError) -> int:
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    return errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO

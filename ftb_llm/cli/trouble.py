"""What the machine does to a run's files, a full disk or too many open files, in one line instead of a traceback."""

import errno
import sqlite3

_OF_THE_MACHINE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EMFILE,
        errno.ENFILE,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ESTALE,
    }
)
_OF_SQLITE = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR})


def file_trouble(error: BaseException) -> str | None:
    """One line that names the file and what became of it; None for any other error, which wants its traceback."""
    if isinstance(error, BaseExceptionGroup):
        lines = [file_trouble(inner) for inner in error.exceptions]
        return lines[0] if all(lines) else None
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        what = error.strerror or str(error)
        return f"{error.filename}: {what}" if error.filename is not None else what
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_SQLITE:
        return f"run.db: {error}"
    return None

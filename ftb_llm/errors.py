"""Every error the project raises on purpose.

Each one is also the standard-library error a caller would expect, carries one clear line, and survives pickling, so that
it crosses Ray and process boundaries unchanged.
"""

import errno


class FtbError(Exception):
    """Root of the tree: catch this to catch everything the project raises on purpose."""


class ConfigError(FtbError, ValueError):
    """A setting is wrong. The message names the key, the value and what would be right."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(key, message)
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class InvalidConfig(FtbError, ValueError):
    """One or more settings are wrong; `problems` holds one `ConfigError` each."""

    def __init__(self, problems: list[ConfigError]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)


class FixedSetting(FtbError, ValueError):
    """A patch names settings that can't change while the run is alive."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(keys)
        self.keys = keys

    def __str__(self) -> str:
        return f"fixed for the life of the run: {', '.join(self.keys)}"


class StaleConfig(FtbError, ValueError):
    """A patch was written against a config version that is no longer the current one."""

    def __init__(self, given: str, current: str) -> None:
        super().__init__(given, current)
        self.given = given
        self.current = current

    def __str__(self) -> str:
        return f"If-Match {self.given} is not the current version {self.current}; read the config again and retry"


class WrongState(FtbError, RuntimeError):
    """A command makes no sense in the run's present state."""


class NotRecorded(FtbError, OSError):
    """A change could not be written down, so it did not happen; the next one may. `errno` says why: ENOSPC is a full disk."""

    def __str__(self) -> str:
        return str(self.strerror)

    @property
    def full(self) -> bool:
        """Whether the disk has no room left."""
        return self.errno in (errno.ENOSPC, errno.EDQUOT)


class NotServing(WrongState):
    """A generator whose canary failed gives no completions until a push succeeds."""


class EngineError(FtbError, RuntimeError):
    """A generator's engine could not do what it was asked."""


class RequestRefused(FtbError, ValueError):
    """An engine won't complete this one prompt; the engine itself is well."""


class ProcessDied(FtbError, RuntimeError):
    """An actor, or the engine behind it, is gone for good."""


class SetupError(FtbError, RuntimeError):
    """Something outside the config stops the run before it starts: a busy port, no free CPU, a missing file."""


class RemoteError(FtbError, RuntimeError):
    """An actor raised something unexpected, died, or did not start."""


class RewardError(FtbError, ValueError):
    """A reward function failed on one group; `reason` is the short tag that is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class CheckpointError(FtbError, RuntimeError):
    """A checkpoint or adapter on disk is missing, torn or of another run."""


class ApiUnreachable(FtbError, ConnectionError):
    """Nothing usable answers at the control plane's address."""


class ApiError(FtbError, RuntimeError):
    """The control plane refused a request; the message is the problem's detail, `kind` the last word of its type."""

    def __init__(self, status: int, kind: str, detail: str) -> None:
        super().__init__(status, kind, detail)
        self.status = status
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class ClusterLost(FtbError, ConnectionError):
    """The cluster that a job was submitted to no longer answers."""

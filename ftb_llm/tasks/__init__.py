"""The built-in tasks: small enough that the exact target of every prompt is known."""

from ftb_llm.errors import ConfigError
from ftb_llm.tasks.hypergrid import Hypergrid
from ftb_llm.tasks.oracle import Task
from ftb_llm.tasks.sums import Sums

TASKS: dict[str, Task] = {"hypergrid": Hypergrid(), "sums": Sums()}


def get_task(name: str) -> Task:
    """The built-in task of that name."""
    if name not in TASKS:
        raise ConfigError("", f"{name!r} is no built-in task; the tasks are {', '.join(TASKS)}")
    return TASKS[name]

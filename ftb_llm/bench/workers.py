"""Independent calls in worker processes, their results as they come, and no process left behind."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ftb_llm.errors import ProcessDied

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(function: Callable[[Item], Result], items: Sequence[Item], *, jobs: int) -> Iterator[Result]:
    """Call `function` on each item, `jobs` at a time. The processes end with this generator: exhausted, closed or interrupted."""
    if not items:
        return
    others = set(multiprocessing.active_children())
    # Spawned, since a forked copy of torch's threads would hang.
    pool = ProcessPoolExecutor(min(jobs, len(items)), mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
    except BrokenProcessPool:
        raise ProcessDied("a worker process was killed, perhaps for lack of memory; try fewer jobs") from None
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        pool.shutdown(wait=True, cancel_futures=True)  # the pool's own thread reaps them: two who do would race


def _begin() -> None:
    """Ctrl-C is the parent's to handle, and a worker must not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

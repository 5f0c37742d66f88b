"""Independent calls in worker processes, their results as they come, and no process left behind."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Self, TypeVar

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


class Late(Exception):
    """A call took longer than it may; its process was ended."""


class Worker(Generic[Item, Result]):
    """One process that answers call after call, and is begun anew after one that killed it or took too long."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        self._function = function
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def call(self, item: Item, *, seconds: float) -> Result:
        connection = self._started()
        connection.send(item)
        if not connection.poll(seconds):
            self.close()
            raise Late
        try:
            result: Result = connection.recv()
        except EOFError:
            self.close()
            raise ProcessDied("the process died, perhaps for lack of memory") from None
        return result

    def close(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _started(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_answer, args=(theirs, self._function), daemon=True)
            self._process.start()
            theirs.close()  # else the end of the process would go unnoticed
        return self._connection


def _answer(connection: Connection, function: Callable[[Any], Any]) -> None:
    _begin()
    with suppress(EOFError):  # there are no more calls
        while True:
            connection.send(function(connection.recv()))

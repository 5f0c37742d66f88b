import math
import multiprocessing
import os
import time

import pytest

from ftb_llm.bench.workers import Late, Worker, spread
from ftb_llm.errors import ProcessDied


def test_results_of_all_items_come() -> None:
    assert sorted(spread(math.sqrt, [4.0, 9.0, 16.0], jobs=2)) == [2.0, 3.0, 4.0]
    assert multiprocessing.active_children() == []


def test_nothing_to_do_starts_nothing() -> None:
    assert list(spread(math.sqrt, [], jobs=2)) == []


def test_an_error_comes_through_and_ends_the_workers() -> None:
    with pytest.raises(ValueError, match="math domain error"):
        list(spread(math.sqrt, [-1.0], jobs=2))
    assert multiprocessing.active_children() == []


def test_whoever_stops_early_leaves_no_process_at_work() -> None:
    results = spread(time.sleep, [0.0, 600.0, 600.0], jobs=2)
    assert next(results) is None
    results.close()
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_of_ours() -> None:
    with pytest.raises(ProcessDied, match="a worker process was killed, perhaps for lack of memory; try fewer jobs"):
        list(spread(os._exit, [1], jobs=1))


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def end(code: int) -> int:
    if code:
        os._exit(code)
    return os.getpid()


def test_a_worker_answers_call_after_call_in_one_process() -> None:
    with Worker(pid_after) as worker:
        assert worker.call(0.0, seconds=60) == worker.call(0.0, seconds=60) != os.getpid()
    assert multiprocessing.active_children() == []


def test_a_call_that_takes_too_long_is_ended_and_the_next_begins_anew() -> None:
    with Worker(pid_after) as worker:
        first = worker.call(0.0, seconds=60)
        with pytest.raises(Late):
            worker.call(600.0, seconds=0.1)
        assert worker.call(0.0, seconds=60) != first


def test_a_worker_that_dies_is_an_error_of_ours_and_the_next_begins_anew() -> None:
    with Worker(end) as worker:
        with pytest.raises(ProcessDied, match="the process died, perhaps for lack of memory"):
            worker.call(1, seconds=60)
        assert worker.call(0, seconds=60) != os.getpid()

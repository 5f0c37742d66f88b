import math
import multiprocessing
import os
import time

import pytest

from ftb_llm.bench.workers import spread
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

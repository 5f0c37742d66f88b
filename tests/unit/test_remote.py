"""The learner's ranks as one: whose answer counts, and whose fault it is when one of them fails."""

import asyncio
import time
from typing import Any

import pytest

from ftb_llm.errors import ProcessDied, RemoteError, WrongState
from ftb_llm.remote import all_ranks, death_reason, told


async def answer(value: Any, after: float = 0.0) -> Any:
    await asyncio.sleep(after)
    return value


async def fail(error: Exception, after: float = 0.0) -> Any:
    await asyncio.sleep(after)
    raise error


def together(*calls: Any, grace_seconds: float = 30.0) -> list[Any]:
    return asyncio.run(all_ranks(list(calls), grace_seconds=grace_seconds))


def test_answers_come_in_the_order_of_the_ranks() -> None:
    assert together(answer("a", after=0.02), answer("b"), answer("c", after=0.01)) == ["a", "b", "c"]


def test_nobody_waits_for_the_others_of_a_dead_rank() -> None:
    began = time.monotonic()
    with pytest.raises(ProcessDied, match=r"^learner rank 1 of 3 died: it was killed$"):
        together(answer(0, after=3600), fail(ProcessDied("it was killed")), answer(2, after=3600))
    assert time.monotonic() - began < 5


def test_a_broken_sum_is_explained_by_the_death_behind_it() -> None:
    with pytest.raises(ProcessDied, match=r"^learner rank 1 of 2 died: it was killed$"):
        together(fail(RemoteError("RuntimeError: connection closed by peer")), fail(ProcessDied("it was killed"), after=0.05))


def test_a_breakdown_that_nothing_explains_is_told_after_a_moment() -> None:
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"^learner rank 1 of 2: RuntimeError: timed out$"):
        together(answer(0, after=3600), fail(RemoteError("RuntimeError: timed out")), grace_seconds=0.05)
    assert time.monotonic() - began < 5


def test_an_error_raised_on_purpose_stays_what_it_was() -> None:
    with pytest.raises(WrongState, match=r"^step 5 was asked for$"):
        together(fail(WrongState("step 5 was asked for")), fail(WrongState("step 5 was asked for")))


UNEXPECTED = """The actor died unexpectedly before finishing this task.
\tclass_name: LearnerActor
\tactor_id: 36b02cfeb83d8
\tpid: 17
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with \
a connection error code 2. End of file. There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer."""
AT_IMPORT = """The actor died because of an error raised in its creation task, \x1b[36mray::LearnerActor.__init__()\x1b[39m (pid=9, ip=127.0.0.1)
  File "worker.py", line 1, in load
ModuleNotFoundError: No module named 'learner'"""


def test_a_death_is_told_without_rays_names_and_guesses() -> None:
    told = death_reason(UNEXPECTED)
    assert told.startswith("its process ended: Worker unexpectedly exits with a connection error code 2. End of file.")
    assert "actor_id" not in told
    assert "potential root causes" not in told


def test_a_death_by_an_exception_is_that_exception() -> None:
    assert death_reason(AT_IMPORT) == "ModuleNotFoundError: No module named 'learner'"


def test_an_exception_whose_message_holds_a_traceback_is_the_one_within() -> None:
    cause = RuntimeError("The actor with name LearnerActor failed to import on the worker.\n\nTraceback (most recent call last):\n  File x\nKeyError: 'peft'")
    assert told(cause) == "KeyError: 'peft'"
    assert told(ValueError("one\n two")) == "ValueError: one two"

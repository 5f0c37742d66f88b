import asyncio

import pytest

from ftb_llm.buffer import GroupBuffer, staleness
from ftb_llm.journal import Journal
from ftb_llm.types import GroupState
from tests.fakes import make_group, make_scored


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "run.db")
    yield journal
    journal.close()


def no_limit():
    return None


def make_buffer(journal, capacity=4):
    return GroupBuffer(capacity=capacity, journal=journal)


async def put(buffer, *scored):
    for one in scored:
        await buffer.reserve()
        await buffer.put(one)


def assert_books_balance(buffer, journal):
    """What memory believes is what the file counts."""
    assert buffer.accounting.as_dict() == journal.accounting().as_dict()


async def test_groups_leave_whole_and_oldest_first(journal):
    buffer = make_buffer(journal)
    await put(buffer, make_scored(0), make_scored(1), make_scored(2))
    leased = await buffer.lease(2, step=1, max_staleness_steps=no_limit)
    assert [scored.group.id for scored in leased] == ["g000000000", "g000000001"]
    assert buffer.depth == 1
    assert_books_balance(buffer, journal)
    buffer.settle(leased, step=1)
    assert buffer.accounting.as_dict() | {"reasons": {}} == {
        "generated": 3, "buffered": 1, "leased": 0, "trained": 2, "dropped_stale": 0, "rejected": 0, "reasons": {},
    }  # fmt: skip
    assert_books_balance(buffer, journal)


async def test_a_full_buffer_holds_generators_back_until_a_lease(journal):
    buffer = make_buffer(journal, capacity=2)
    await put(buffer, make_scored(0))
    await buffer.reserve()  # a group on its way counts too
    third = asyncio.ensure_future(buffer.reserve())
    await asyncio.sleep(0)
    assert not third.done()
    await buffer.lease(1, step=1, max_staleness_steps=no_limit)
    await asyncio.wait_for(third, 1)


async def test_reject_and_release_free_their_place(journal):
    buffer = make_buffer(journal, capacity=1)
    await buffer.reserve()
    await buffer.reject(make_group("g000000000"), "timeout")
    await asyncio.wait_for(buffer.reserve(), 1)
    await buffer.release()
    await asyncio.wait_for(buffer.reserve(), 1)
    assert buffer.accounting.as_dict()["reasons"] == {"timeout": 1}
    assert_books_balance(buffer, journal)


async def test_a_lease_waits_for_enough_groups(journal):
    buffer = make_buffer(journal)
    lease = asyncio.ensure_future(buffer.lease(2, step=1, max_staleness_steps=no_limit))
    await put(buffer, make_scored(0))
    await asyncio.sleep(0)
    assert not lease.done()
    await put(buffer, make_scored(1))
    assert len(await asyncio.wait_for(lease, 1)) == 2


async def test_stale_groups_are_dropped_when_consumed_and_free_their_place(journal):
    buffer = make_buffer(journal, capacity=3)
    await put(buffer, make_scored(0, version=0), make_scored(1, version=5), make_scored(2, version=6))
    leased = await buffer.lease(2, step=8, max_staleness_steps=lambda: 2)
    assert [scored.group.min_version for scored in leased] == [5, 6]
    assert buffer.accounting.groups[GroupState.DROPPED_STALE] == 1
    assert buffer.accounting.reasons == {"stale": 1}
    assert_books_balance(buffer, journal)


async def test_a_failed_step_gives_its_groups_back_first_in_line(journal):
    buffer = make_buffer(journal)
    await put(buffer, make_scored(0), make_scored(1), make_scored(2))
    buffer.give_back(await buffer.lease(2, step=1, max_staleness_steps=no_limit))
    leased = await buffer.lease(3, step=1, max_staleness_steps=no_limit)
    assert [scored.group.id for scored in leased] == ["g000000000", "g000000001", "g000000002"]
    assert_books_balance(buffer, journal)


async def test_a_cancelled_lease_takes_nothing(journal):
    buffer = make_buffer(journal)
    lease = asyncio.ensure_future(buffer.lease(2, step=1, max_staleness_steps=no_limit))
    await put(buffer, make_scored(0))
    lease.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lease
    assert buffer.depth == 1
    assert_books_balance(buffer, journal)


async def test_a_reopened_buffer_has_buffered_and_leased_groups_again(tmp_path):
    journal = Journal(tmp_path / "run.db")
    buffer = make_buffer(journal)
    await put(buffer, make_scored(0), make_scored(1), make_scored(2))
    await buffer.lease(1, step=1, max_staleness_steps=no_limit)
    journal.close()
    reopened = Journal(tmp_path / "run.db")
    again = make_buffer(reopened)
    assert again.depth == 3
    assert_books_balance(again, reopened)


def test_staleness_counts_steps_since_the_oldest_token():
    assert staleness(make_scored(version=0), 1) == 0
    assert staleness(make_scored(version=4), 10) == 5


async def test_a_limit_that_changes_while_the_learner_waits_counts_at_once(journal):
    buffer = make_buffer(journal)
    limit = [None]
    await put(buffer, make_scored(0, version=0))
    lease = asyncio.ensure_future(buffer.lease(2, step=5, max_staleness_steps=lambda: limit[0]))
    await asyncio.sleep(0)
    limit[0] = 1
    await put(buffer, make_scored(1, version=4), make_scored(2, version=4))
    leased = await asyncio.wait_for(lease, 1)
    assert [scored.group.min_version for scored in leased] == [4, 4]
    assert buffer.accounting.reasons == {"stale": 1}
    assert_books_balance(buffer, journal)


async def test_groups_of_an_abandoned_future_are_dropped_with_their_reason(journal):
    buffer = make_buffer(journal)
    await put(buffer, make_scored(0, version=2), make_scored(1, version=6))
    buffer.forget_versions_after(2)
    assert buffer.depth == 1
    assert buffer.accounting.reasons == {"abandoned_version": 1}
    assert_books_balance(buffer, journal)

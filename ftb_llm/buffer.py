"""The bounded queue of whole groups between generators and learner.

    reserve -> (generate, score) -> put | reject | release          generators
    lease -> (step) -> settle | give_back                           learner

A generator reserves its place *before* it generates, so a full queue holds new work back and nothing that was generated
ever waits outside the accounts. Groups leave oldest first; those past the staleness limit are dropped when they are
consumed, because only then is their age known.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence

from ftb_llm.journal import Accounting, Journal
from ftb_llm.types import Group, GroupState, ScoredGroup


class GroupBuffer:
    """Used from one event loop. Every change is journalled before it is visible here."""

    def __init__(self, *, capacity: int, journal: Journal) -> None:
        self._capacity = capacity
        self._journal = journal
        self._waiting: deque[ScoredGroup] = deque(journal.alive())
        self._reserved = 0
        self._changed = asyncio.Condition()
        self.accounting: Accounting = journal.accounting()

    @property
    def depth(self) -> int:
        """Groups that are ready to train on."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        return self._capacity

    # -- the generators' side

    async def reserve(self) -> None:
        """Wait for a free place and take it. Each reservation ends in exactly one put, reject or release."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) + self._reserved < self._capacity)
            self._reserved += 1

    async def put(self, scored: ScoredGroup) -> None:
        self._journal.add(scored)
        self.accounting.groups[GroupState.BUFFERED] += 1
        self._waiting.append(scored)
        await self.release()

    async def reject(self, group: Group, reason: str) -> None:
        self._journal.add_rejected(group, reason)
        self.accounting.groups[GroupState.REJECTED] += 1
        self.accounting.reasons[reason] += 1
        await self.release()

    async def release(self) -> None:
        """Give a reservation back."""
        async with self._changed:
            self._reserved -= 1
            self._changed.notify_all()

    # -- the learner's side

    async def lease(self, count: int, *, step: int, max_staleness_steps: int | None) -> list[ScoredGroup]:
        """The `count` oldest groups that are fresh enough for `step`; waits until there are so many."""
        async with self._changed:
            while True:
                await self._drop_stale(step, max_staleness_steps)
                if len(self._waiting) >= count:
                    break
                await self._changed.wait()
            groups = [self._waiting.popleft() for _ in range(count)]
            self._move(groups, GroupState.BUFFERED, GroupState.LEASED)
            self._changed.notify_all()
        return groups

    def settle(self, groups: Sequence[ScoredGroup], *, step: int) -> None:
        """The groups were trained on at `step`."""
        self._move(groups, GroupState.LEASED, GroupState.TRAINED, step=step)

    def give_back(self, groups: Sequence[ScoredGroup]) -> None:
        """The step did not happen: the groups wait again, first in line."""
        self._move(groups, GroupState.LEASED, GroupState.BUFFERED)
        self._waiting.extendleft(reversed(groups))

    # -- inside

    async def _drop_stale(self, step: int, max_staleness_steps: int | None) -> None:
        if max_staleness_steps is None:
            return
        stale = [scored for scored in self._waiting if staleness(scored, step) > max_staleness_steps]
        if not stale:
            return
        self._move(stale, GroupState.BUFFERED, GroupState.DROPPED_STALE, reason="stale")
        self.accounting.reasons["stale"] += len(stale)
        dropped = {scored.group.id for scored in stale}
        self._waiting = deque(scored for scored in self._waiting if scored.group.id not in dropped)
        self._changed.notify_all()

    def _move(self, groups: Iterable[ScoredGroup], source: GroupState, target: GroupState, *, reason: str | None = None, step: int | None = None) -> None:
        ids = [scored.group.id for scored in groups]
        self._journal.move(ids, target, reason=reason, step=step)
        self.accounting.move(len(ids), source, target)


def staleness(scored: ScoredGroup, step: int) -> int:
    """Age, in optimizer steps, of the oldest token when the group is used for `step` (the first step trains version 0)."""
    return step - 1 - scored.group.min_version

"""The bounded queue of whole groups between generators and learner.

    reserve -> (generate, score) -> put | reject | release          generators
    lease -> (step) -> settle | give_back                           learner

A generator reserves its place *before* it generates, so a full queue holds new work back and nothing that was generated
ever waits outside the accounts. Groups leave oldest first; those past the staleness limit are dropped when they are
consumed, because only then is their age known.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

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

    def forget_versions_after(self, step: int) -> None:
        """After going back to a checkpoint: groups of policies that no longer exist are of no known age."""
        self._drop(lambda scored: scored.group.max_version > step, "abandoned_version")

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

    async def lease(self, count: int, *, step: int, max_staleness_steps: Callable[[], int | None]) -> list[ScoredGroup]:
        """The `count` oldest groups that are fresh enough for `step`; waits until there are so many. The limit may change meanwhile."""
        async with self._changed:
            while True:
                self._drop_stale(step, max_staleness_steps())
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

    def _drop_stale(self, step: int, max_staleness_steps: int | None) -> None:
        """Only while the condition is held."""
        if max_staleness_steps is not None and self._drop(lambda scored: staleness(scored, step) > max_staleness_steps, "stale"):
            self._changed.notify_all()

    def _drop(self, unwanted: Callable[[ScoredGroup], bool], reason: str) -> int:
        dropped = [scored for scored in self._waiting if unwanted(scored)]
        self._move(dropped, GroupState.BUFFERED, GroupState.DROPPED_STALE, reason=reason)
        self.accounting.reasons.update({reason: len(dropped)} if dropped else {})
        self._waiting = deque(scored for scored in self._waiting if not unwanted(scored))
        return len(dropped)

    def _move(self, groups: Iterable[ScoredGroup], source: GroupState, target: GroupState, *, reason: str | None = None, step: int | None = None) -> None:
        ids = [scored.group.id for scored in groups]
        self._journal.move(ids, target, reason=reason, step=step)
        self.accounting.move(len(ids), source, target)


def staleness(scored: ScoredGroup, step: int) -> int:
    """Age, in optimizer steps, of the oldest token when the group is used for `step` (the first step trains version 0)."""
    return step - 1 - scored.group.min_version

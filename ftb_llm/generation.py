"""Prompts to scored groups: a few workers per generator keep its engine busy.

Consumes: group numbers from the work list. Produces: scored or rejected groups in the buffer.
Waits for: the generator to serve, then a free place in the buffer. Unblocked by: a good push, the learner's lease.
Never waits for the learner otherwise.
"""

import asyncio
import contextlib
import heapq
import time
from collections.abc import Callable, Collection

from ftb_llm.buffer import GroupBuffer
from ftb_llm.config import Config
from ftb_llm.config.schema import TOKEN_LEVEL
from ftb_llm.datasets import PromptOrder
from ftb_llm.delivery import Emit, bury
from ftb_llm.errors import FtbError, NotServing, RequestRefused, RewardError
from ftb_llm.ports import GeneratorPort, ReferencePort, RewardPort
from ftb_llm.state import GeneratorPhase, GeneratorState
from ftb_llm.types import FinishReason, Group, GroupRequest, GroupState, SamplingSpec, ScoredGroup

_REFUSED_SECONDS = 0.05
_HOPELESS_GROUPS = 32
_LONGEST_REST_SECONDS = 10.0


class WorkList:
    """Numbers of the groups to generate. A number that came to nothing is handed out again, so no prompt is skipped."""

    def __init__(self, done: Collection[int] = ()) -> None:
        self._next = max(done, default=-1) + 1
        self._returned = sorted(set(range(self._next)) - set(done))

    def take(self) -> int:
        if self._returned:
            return heapq.heappop(self._returned)
        self._next += 1
        return self._next - 1

    def put_back(self, number: int) -> None:
        heapq.heappush(self._returned, number)


def group_id(number: int) -> str:
    return f"g{number:09d}"


def group_number(identifier: str) -> int:
    return int(identifier.removeprefix("g"))


class Generation:
    """Everything that the workers of all generators share."""

    def __init__(
        self,
        *,
        config: Callable[[], Config],
        work: WorkList,
        prompts: PromptOrder,
        buffer: GroupBuffer,
        rewards: RewardPort,
        reference: ReferencePort | None,
        emit: Emit,
    ) -> None:
        self._config = config
        self._work = work
        self._prompts = prompts
        self._buffer = buffer
        self._rewards = rewards
        self._reference = reference
        self._emit = emit
        self._draining = False
        self._busy = 0
        self._idle = asyncio.Event()
        self._wait_seconds = 0.0
        self._rejected_in_a_row = 0

    def take_wait_seconds(self) -> float:
        """Seconds that workers waited for a place in the buffer, all of them together, since the last call."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    async def drain(self, timeout_seconds: float) -> None:
        """Start no further group, and give those under way some time to land in the buffer."""
        self._draining = True
        if self._busy:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):  # what is late is cancelled by the caller and generated again on resume
                async with asyncio.timeout(timeout_seconds):
                    await self._idle.wait()

    async def work_forever(self, port: GeneratorPort, state: GeneratorState) -> None:
        """One worker: one group after the other until its generator dies or the run drains."""
        while True:
            await state.serving.wait()
            if state.phase is GeneratorPhase.DEAD:
                return None
            waiting_since = time.monotonic()
            await self._buffer.reserve()
            self._wait_seconds += time.monotonic() - waiting_since
            if self._draining:
                return await self._buffer.release()
            self._busy += 1
            try:
                await self._one_group(port, state)
            finally:
                self._busy -= 1
                if self._busy == 0:
                    self._idle.set()

    def request(self, number: int) -> GroupRequest:
        """The group with that number; the same number always asks for the same prompt."""
        config = self._config()
        sampling = config.sampling
        return GroupRequest(
            group_id=group_id(number),
            prompt=self._prompts[number],
            sampling=SamplingSpec(
                group_size=sampling.group_size,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                token_logprobs=config.objective.kind in TOKEN_LEVEL,
            ),
        )

    async def _one_group(self, port: GeneratorPort, state: GeneratorState) -> None:
        number = self._work.take()
        try:
            group = await self._generate(port, state, number)
        except RequestRefused as error:
            return await self._reject(self._empty_group(number, state), "refused", error)
        if group is None:
            self._work.put_back(number)
            return await self._buffer.release()
        if self._config().objective.truncated == "reject" and (problem := truncation(group)):
            return await self._reject(group, "truncated", problem)
        try:
            rewards = await self._rewards.score(group)
        except RewardError as error:
            return await self._reject(group, error.reason, error)
        reference = None if self._reference is None else await self._reference.score(group)
        await self._buffer.put(ScoredGroup(group=group, rewards=rewards, reference=reference))
        self._rejected_in_a_row = 0

    async def _reject(self, group: Group, reason: str, error: FtbError) -> None:
        """Count it and go on; when nothing gets through any more, more and more slowly, and not at all if nothing ever did."""
        await self._buffer.reject(group, reason)
        self._emit("rejected", f"group {group.id} rejected, {error}", reason=reason, group=group.id)
        self._rejected_in_a_row += 1
        accounts = self._buffer.accounting
        if accounts.groups[GroupState.REJECTED] == accounts.generated >= _HOPELESS_GROUPS:
            raise FtbError(f"the first {accounts.generated} groups were all rejected, the last one because: {error}")
        if self._rejected_in_a_row > _HOPELESS_GROUPS:
            await asyncio.sleep(min(_LONGEST_REST_SECONDS, 2.0 ** (self._rejected_in_a_row - _HOPELESS_GROUPS - 5)))

    def _empty_group(self, number: int, state: GeneratorState) -> Group:
        """A group that came to nothing, for the books."""
        return Group(id=group_id(number), prompt=self._prompts[number], completions=(), generator=state.name, generate_seconds=0.0)

    async def _generate(self, port: GeneratorPort, state: GeneratorState, number: int) -> Group | None:
        request = self.request(number)  # a fault in here is our own and ends the run under its own name
        state.groups_in_flight += 1
        try:
            group = await port.generate(request)
        except NotServing:
            await asyncio.sleep(_REFUSED_SECONDS)  # the push report that explains it is on its way to the delivery loop
            return None
        except RequestRefused:
            raise
        except Exception as error:  # noqa: BLE001 - the supervisor's boundary: an engine or actor that broke is dead, the others go on
            bury(state, error, self._emit)
            return None
        finally:
            state.groups_in_flight -= 1
        state.throughput.add(group.token_count)
        return group


def truncation(group: Group) -> FtbError | None:
    """What is wrong with a group that must be whole; None when every completion came to its own end."""
    cut = [completion for completion in group.completions if completion.finish_reason is FinishReason.LENGTH]
    if not cut:
        return None
    return FtbError(
        f"truncated: {len(cut)} of {len(group.completions)} completions were cut at sampling.max_tokens {len(cut[0].token_ids)}, "
        "and objective.truncated is reject; raise sampling.max_tokens, or set objective.truncated to keep or mask"
    )

"""Which groups of a step are computed together, and on which rank: whole groups, up to a budget of tokens.

Tokens are counted as they are computed: a prompt once per group, and no padding, since a packed row has none.
"""

from collections.abc import Sequence

from ftb_llm.types import Group


def token_cost(group: Group) -> int:
    """Tokens that a pass over the group computes."""
    return len(group.prompt.token_ids) + group.token_count


def plan(groups: Sequence[Group], *, budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """For each rank its micro-batches, each a list of places in `groups`.

    The largest groups go to the least loaded rank first. A micro-batch keeps within the budget unless it is one single group.
    Groups of alike prompts and lengths stand together: equally long ones share their attention calls. Every rank that is
    asked with the same groups gets the same answer.
    """
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(groups)), key=lambda place: -token_cost(groups[place])):
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += token_cost(groups[place])
    return [_fill(sorted(share, key=lambda place: _shape(groups[place])), groups, budget) for share in shares]


def _fill(places: Sequence[int], groups: Sequence[Group], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for place in places:
        cost = token_cost(groups[place])
        if not batches or cost > room:
            batches.append([])
            room = budget
        batches[-1].append(place)
        room -= cost
    return batches


def _shape(group: Group) -> tuple[int, int]:
    return len(group.prompt.token_ids), max(len(completion.token_ids) for completion in group.completions)


def rounds(groups: Sequence[Group], *, budget: int, ranks: int) -> list[list[list[int]]]:
    """The plan by turns: for each, what every rank computes, which for some is nothing at the end."""
    shares = plan(groups, budget=budget, ranks=ranks)
    return [[share[turn] if turn < len(share) else [] for share in shares] for turn in range(max(map(len, shares)))]


def parts_of(groups: Sequence[Group], *, budget: int) -> list[range]:
    """The completions of a micro-batch in parts: all at once, unless it is a single group that is larger than the budget."""
    everything = [range(len(groups[0].completions))]
    if sum(map(token_cost, groups)) <= budget:
        return everything
    return slices(groups[0], budget=budget) if len(groups) == 1 else everything


def slices(group: Group, *, budget: int) -> list[range]:
    """Completions of a group that is larger than the budget, in runs that keep within it where one completion does."""
    parts: list[range] = []
    room = 0
    for place, completion in enumerate(group.completions):
        if not parts or len(completion.token_ids) > room:
            parts.append(range(place, place))
            room = budget - len(group.prompt.token_ids)
        parts[-1] = range(parts[-1].start, place + 1)
        room -= len(completion.token_ids)
    return parts

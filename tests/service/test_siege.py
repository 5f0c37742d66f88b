"""A small real control plane under attack: its memory, what it closes, and an honest client meanwhile."""

from collections.abc import Iterator

import psutil
import pytest

from ftb_llm.api.app import create_app
from ftb_llm.bench.attacks import MEGABYTE, Order, Outcome
from ftb_llm.bench.honest import HonestClient
from ftb_llm.bench.siege import a_sink, attack_in_a_process
from tests.service.conftest import FakeRun, serving

SERVED_AT_ONCE = 128
MOST_MB = 20
BREAK_OFF_MB = 300
TOKEN = "s3cret"


@pytest.fixture(params=[None, TOKEN], ids=["free", "guarded"])
def besieged(request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None]]:
    """The URL of a server in this process, and its token."""
    with serving(create_app(FakeRun(), token=request.param)) as url:
        yield url, request.param


def attack(
    url: str, token: str | None, order: str, *, seconds: float, megabytes: float = 0, connections: int = 1
) -> tuple[Outcome | None, float, HonestClient]:
    """What came of it, by how many MB this process grew at most, and what an honest client asked meanwhile."""
    process = psutil.Process()
    with HonestClient(url, token) as honest:
        before = most = process.memory_info().rss

        def too_large() -> bool:
            nonlocal most
            most = max(most, process.memory_info().rss)
            return most - before > BREAK_OFF_MB * MEGABYTE

        port = int(url.rpartition(":")[2])
        spec = Order(attack=order, port=port, seconds=seconds, megabytes=megabytes, connections=connections)
        outcome = attack_in_a_process(spec, broken_off=too_large)
        too_large()
    return outcome, (most - before) / MEGABYTE, honest


def problems(honest: HonestClient) -> list[str | None]:
    return [one.problem for one in honest.asked if one.problem]


@pytest.mark.parametrize("headers", ["headers", "one-header"])
def test_headers_without_end_take_no_memory(besieged: tuple[str, str | None], headers: str) -> None:
    outcome, grown_mb, honest = attack(*besieged, headers, seconds=3, megabytes=60)
    assert outcome is not None, f"broken off: the server grew by {grown_mb:.0f} MB"
    assert outcome.closed >= outcome.opened - 1 > 3  # the last one ends with the attack
    assert outcome.most_bytes < 10 * MEGABYTE  # what is thrown away, and what the sockets' own buffers took
    assert grown_mb < MOST_MB
    assert problems(honest) == [] and len(honest.asked) > 10


@pytest.mark.parametrize("kind", ["idle", "slow"])
def test_of_many_connections_only_some_are_held(besieged: tuple[str, str | None], kind: str) -> None:
    outcome, grown_mb, honest = attack(*besieged, kind, seconds=4, connections=400)
    assert outcome is not None, f"broken off: the server grew by {grown_mb:.0f} MB"
    assert outcome.opened >= 400 and outcome.refused == 0
    assert outcome.closed >= outcome.opened - SERVED_AT_ONCE
    assert grown_mb < MOST_MB
    assert problems(honest) == [] and len(honest.asked) > 10


def test_the_sink_is_as_strict() -> None:
    with a_sink() as sink:
        crowd = attack_in_a_process(Order(attack="idle", port=sink.port, seconds=2, connections=200), broken_off=lambda: False)
        flood = attack_in_a_process(Order(attack="headers", port=sink.port, seconds=1), broken_off=lambda: False)
        assert sink.cpu_seconds() > 0
    assert crowd is not None and crowd.closed >= crowd.opened - SERVED_AT_ONCE > 0
    assert flood is not None and flood.closed == flood.opened > 3


def test_an_attack_is_broken_off() -> None:
    with a_sink() as sink:
        assert attack_in_a_process(Order(attack="idle", port=sink.port, seconds=60), broken_off=lambda: True) is None

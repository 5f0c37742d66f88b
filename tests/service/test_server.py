import asyncio
import signal
import socket
from collections.abc import Iterator

import httpx
import pytest

from ftb_llm.api.app import create_app
from ftb_llm.api.server import check_port, serve
from ftb_llm.errors import SetupError


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_busy_port_is_named(busy_port: int) -> None:
    with pytest.raises(SetupError, match=rf"^control\.port: {busy_port} is in use; .*control\.port={busy_port + 1}"):
        check_port("127.0.0.1", busy_port)


def test_a_free_port_stays_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "fe80::1%nowhere", "a" * 70])
def test_an_address_of_elsewhere_is_named(host: str) -> None:
    with pytest.raises(SetupError, match=rf"^control\.host: .*{host}.*127\.0\.0\.1"):
        check_port(host, 8000)


async def test_serving_on_a_busy_port_fails_at_once(run, busy_port: int) -> None:
    with pytest.raises(SetupError, match="in use"):
        async with serve(create_app(run), "127.0.0.1", busy_port):
            pytest.fail("it claims to serve")


async def test_it_serves_in_this_loop_and_leaves_signals_and_port_alone(run) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with serve(create_app(run), "127.0.0.1", 0) as url, httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (await http.get("/healthz")).status_code == 200
    check_port("127.0.0.1", int(url.rpartition(":")[2]))
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get("/healthz")


async def test_shutdown_waits_neither_for_idle_connections_nor_for_half_a_request(run) -> None:
    async with asyncio.timeout(8):
        async with serve(create_app(run), "127.0.0.1", 0) as url:
            port = int(url.rpartition(":")[2])
            _, idle = await asyncio.open_connection("127.0.0.1", port)
            reader, half = await asyncio.open_connection("127.0.0.1", port)
            half.write(b"PATCH /v1/config HTTP/1.1\r\nHost: localhost\r\nIf-Match: *\r\nContent-Length: 100\r\n\r\n{")
            await half.drain()
    assert run.changes == []
    for writer in (idle, half):
        writer.close()
    del reader


async def test_an_error_in_the_block_comes_out_unchanged(run) -> None:
    with pytest.raises(ZeroDivisionError):
        async with serve(create_app(run), "127.0.0.1", 0):
            raise ZeroDivisionError

"""What a client may do to the server before it is served: raw sockets against the real server."""

import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ftb_llm.api.app import create_app
from ftb_llm.api.connection import Limits
from tests.service.conftest import DEADLINE_SECONDS, FakeRun, serving

QUICK = Limits(header_seconds=0.3, body_seconds=0.3, idle_seconds=0.3, answer_seconds=0.3)
GET = b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n"
PATCH = b"PATCH /v1/config HTTP/1.1\r\nHost: localhost\r\nIf-Match: *\r\n"


@pytest.fixture(scope="module")
def quick() -> Iterator[str]:
    with serving(create_app(FakeRun()), limits=QUICK) as url:
        yield url


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=DEADLINE_SECONDS)


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def exchange(url: str, request: bytes) -> bytes:
    with closing(connect(url)) as connection:
        connection.sendall(request)
        return answer_of(connection)


def problem_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    problem: dict[str, Any] = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % problem["status"])
    return problem


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (GET + b"Content-Length: many\r\n\r\n", 400),
        (PATCH + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (GET + b"Long: " + b"x" * 16 * 1024 + b"\r\n\r\n", 431),
        (GET + b"Endless: " + b"x" * 100_000, 431),
        (GET + b"A: b\r\n" * 100 + b"\r\n", 431),
    ],
    ids=["tls", "nonsense", "two hosts", "no host", "bad length", "bad chunk", "long", "endless", "lines"],
)
def test_what_cannot_be_read_is_refused_with_a_problem_and_not_logged(
    url: str, request_bytes: bytes, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    problem = problem_of(exchange(url, request_bytes))
    assert problem["status"] == status
    assert problem["type"] == f"urn:ftb-llm:problem:{'bad-request' if status == 400 else 'header-too-large'}"
    assert len(problem["detail"]) <= 200
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_clients_that_break_off_leave_no_trace(quick: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(200):
        connection = connect(quick)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        connection.sendall((b"nonsense\r\n\r\n", GET + b"\r\n", GET, PATCH + b"Content-Length: 9\r\n\r\n{")[number % 4])
        connection.close()
    assert exchange(quick, GET + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_a_header_within_the_limits_is_served(url: str) -> None:
    for lines in (b"Long: " + b"x" * 15 * 1024 + b"\r\n", b"A: b\r\n" * 98):
        assert exchange(url, GET + lines + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_a_body_in_chunks_is_served_up_to_the_same_size(url: str, run: FakeRun) -> None:
    body = b'{"objective": {"beta": 0.25}}'
    chunked = PATCH + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(url, chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)).startswith(b"HTTP/1.1 200 ")
    assert exchange(url, chunked + b"11000\r\n" + b" " * 0x11000 + b"\r\n0\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_requests_one_after_another_on_one_connection(quick: str) -> None:
    with closing(connect(quick)) as connection:
        connection.sendall((GET + b"\r\n") * 3)
        assert answer_of(connection).count(b"HTTP/1.1 200 OK") == 3, "and closed when idle"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [(GET, 408), (GET + b"\r\n" + GET, 408), (PATCH + b"Content-Length: 100000000\r\n\r\n", 408), (b"", None)],
    ids=["header", "second header", "body", "silence"],
)
def test_what_does_not_come_in_time_is_given_up(quick: str, request_bytes: bytes, status: int | None) -> None:
    answer = exchange(quick, request_bytes)
    if status is None:
        assert answer == b""
    else:
        assert problem_of(answer[answer.rindex(b"HTTP/1.1 ") :])["type"] == "urn:ftb-llm:problem:request-timeout"


def test_a_body_that_follows_its_refusal_is_read_no_longer_than_another(quick: str) -> None:
    with closing(connect(quick)) as connection:
        connection.sendall(b"PATCH /v1/config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n{")
        assert answer_of(connection).startswith(b"HTTP/1.1 428 ")


def test_a_client_that_does_not_read_is_given_up(quick: str) -> None:
    with closing(connect(quick)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert send_until_closed(connection, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, most=200_000_000) < 200_000_000
    with httpx.Client(base_url=quick, trust_env=False) as http:
        assert http.get("/healthz").status_code == 200


def test_above_the_limit_the_connection_that_has_waited_longest_makes_room() -> None:
    with serving(create_app(FakeRun()), limits=Limits(connections=4)) as url, ExitStack() as stack:
        asked = stack.enter_context(closing(connect(url)))
        asked.sendall(GET + b"\r\n")
        assert asked.recv(1) == b"H"
        silent = [stack.enter_context(closing(connect(url))) for _ in range(4)]
        assert silent[0].recv(1) == b"", "the oldest that never asked"
        for connection in (asked, silent[1]):
            connection.sendall(GET + b"Connection: close\r\n\r\n")
            assert b"HTTP/1.1 200 " in b"H" + answer_of(connection)


def test_honest_clients_are_served_while_others_hold_connections(url: str) -> None:
    count = 1100 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 3000 else 300  # both ends are in this process
    before = psutil.Process().memory_info().rss
    with ExitStack() as stack:
        a_connection_each = httpx.Limits(max_keepalive_connections=0)
        honest = stack.enter_context(httpx.Client(base_url=url, trust_env=False, limits=a_connection_each, timeout=DEADLINE_SECONDS))
        for number in range(count):
            idle = stack.enter_context(closing(connect(url)))
            if number % 2:
                idle.sendall(GET)
            if number % 20 == 0:
                assert honest.get("/healthz").status_code == 200
        port = int(url.rpartition(":")[2])
        held = [end for end in psutil.Process().net_connections("tcp") if end.status == "ESTABLISHED" and end.laddr.port == port]
        assert len(held) <= 128
    assert psutil.Process().memory_info().rss - before < 20e6


@pytest.mark.parametrize("line", [b"X: y\r\n", b"x"], ids=["short lines", "one line"])
def test_200_mb_of_header_take_no_memory(url: str, line: bytes) -> None:
    block = line * (1_000_000 // len(line))
    before = psutil.Process().memory_info().rss
    with closing(connect(url)) as connection:
        connection.sendall(GET + b"X: ")
        assert send_until_closed(connection, block, most=200_000_000) < 20_000_000
    assert psutil.Process().memory_info().rss - before < 20e6


def test_the_server_outlives_having_no_file_handle_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(create_app(FakeRun())) as url, ExitStack() as stack:
        asking = stack.enter_context(closing(socket.socket()))
        asking.settimeout(DEADLINE_SECONDS)
        lowest_free = stack.enter_context(open(tmp_path / "probe", "w")).fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
        try:
            asking.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            asking.sendall(GET + b"Connection: close\r\n\r\n")
            wait_for(lambda: "accepts no connection" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert answer_of(asking).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in caplog.text
    assert len(caplog.records) == 1


def send_until_closed(connection: socket.socket, block: bytes, *, most: int) -> int:
    """How many bytes the server let us send."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(block)
            sent += len(block)
    except OSError:
        return sent
    return sent


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_clients_that_have_asked_once_and_wait_do_not_lock_newcomers_out() -> None:
    with serving(create_app(FakeRun()), limits=Limits(connections=4)) as url, ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(closing(connect(url)))
            waiting.sendall(GET + b"\r\n")
            assert waiting.recv(1) == b"H"
        for _ in range(3):
            newcomer = stack.enter_context(closing(connect(url)))
            newcomer.sendall(GET + b"Connection: close\r\n\r\n")
            assert answer_of(newcomer).startswith(b"HTTP/1.1 200 ")

"""One connection of the control plane, with an end to everything that its client may send or put off.

uvicorn's protocol over h11, which holds what has arrived of a request until it is whole. Here that is little and
not for long, whoever sends it, since no token has been seen yet: see `Limits`. A connection always has a deadline, and
when one too many comes, the one that has kept us waiting longest makes room, so clients that just ask are served.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from ftb_llm.api.problems import Refused

_READ_BYTES = 16 * 1024  # at a time; asyncio would take 256 KiB, and as much would wait in each connection
_LONGEST_DETAIL = 200
_KINDS = {413: "body-too-large", 431: "header-too-large"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may ask of the server before it is served."""

    connections: int = 128
    header_bytes: int = 16 * 1024  # of the request line and all header lines
    header_lines: int = 100
    body_bytes: int = 4 * 1024 * 1024  # that are read at all; what a route takes of them is its own limit
    header_seconds: float = 10.0  # from the connection's start, or the header's first byte, to its end
    body_seconds: float = 30.0  # from the header's end
    answer_seconds: float = 30.0  # until the client has taken it
    idle_seconds: float = 30.0  # between two requests
    linger_seconds: float = 2.0  # after a refusal, for the client to read it


class Phase(Enum):
    """What a connection waits for."""

    HEADER = auto()
    BODY = auto()
    ANSWER = auto()  # to be computed and taken; the only phase that doesn't wait for more of a request
    IDLE = auto()
    CLOSING = auto()  # refused; what else comes is thrown away


class BoundedConnection(h11.Connection):
    """h11, which also counts header lines and bytes of a body. `fault` says why a request could not be read."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(h11.SERVER, limits.header_bytes)
        self._limits = limits
        self._body_bytes = 0
        self.fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check_header(event)
            elif isinstance(event, h11.Data):
                self._check_body(event)
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
        return event

    def _check_header(self, request: h11.Request) -> None:
        limits, self._body_bytes = self._limits, 0
        size = len(request.target) + sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers)
        if len(request.headers) > limits.header_lines or size > limits.header_bytes:
            message = f"a header may have {limits.header_lines} lines and {limits.header_bytes} bytes"
            raise h11.RemoteProtocolError(message, error_status_hint=431)

    def _check_body(self, part: h11.Data) -> None:
        self._body_bytes += len(part.data)
        if self._body_bytes > self._limits.body_bytes:
            raise h11.RemoteProtocolError(f"a body may have {self._limits.body_bytes} bytes", error_status_hint=413)


class BoundedProtocol(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's protocol with `Limits`; what can't be served is answered with a problem document and never logged."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._bounded = BoundedConnection(limits)
        self.conn = self._bounded
        self._phase = Phase.HEADER
        self._since = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None
        self._has_asked = False  # a whole request, once
        self._is_dropped = False
        self._thrown_away = 0
        self._arrived = bytearray()

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._enter(Phase.HEADER)
        self._make_room()

    def get_buffer(self, sizehint: int) -> bytearray:
        self._arrived = bytearray(_READ_BYTES)
        return self._arrived

    def buffer_updated(self, nbytes: int) -> None:
        arrived, self._arrived = self._arrived, bytearray()
        self.data_received(bytes(arrived[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.CLOSING:
            self._thrown_away += len(data)
            if self._thrown_away > self._limits.body_bytes:
                self._drop()
            return
        super().data_received(data)
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_dropped = True
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    # -- what uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is not Phase.CLOSING and not (self._phase is Phase.BODY is self._present_phase()):
            self._enter(self._present_phase())

    def send_400_response(self, msg: str) -> None:
        fault = self._bounded.fault
        kind = "bad-request" if fault is None else _KINDS.get(fault.error_status_hint, "bad-request")
        self._refuse(kind, str(fault or msg)[:_LONGEST_DETAIL])

    def shutdown(self) -> None:
        if self._phase is Phase.CLOSING or self.transport.is_closing():
            self._drop()
        else:
            super().shutdown()

    # -- deadlines

    def _present_phase(self) -> Phase:
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        if not answered:
            return Phase.ANSWER
        if self.conn.trailing_data[0] or not self._has_asked:
            return Phase.HEADER
        return Phase.IDLE

    def _follow(self) -> None:
        if self._phase is not Phase.CLOSING and self._phase is not (phase := self._present_phase()):
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._phase = phase
        self._since = self.loop.time()
        self._has_asked = self._has_asked or phase is Phase.ANSWER
        limits = self._limits
        seconds = {
            Phase.HEADER: limits.header_seconds,
            Phase.BODY: limits.body_seconds,
            Phase.ANSWER: limits.answer_seconds,
            Phase.IDLE: limits.idle_seconds,
            Phase.CLOSING: limits.linger_seconds,
        }[phase]
        self._deadline = self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self._phase is Phase.HEADER and self.conn.trailing_data[0]:
            self._refuse("request-timeout", f"the header was not whole after {self._limits.header_seconds:g} s")
        elif self._phase is Phase.BODY:
            self._refuse("request-timeout", f"the body was not whole after {self._limits.body_seconds:g} s")
        else:
            self._drop()

    # -- ends

    def _make_room(self) -> None:
        """The newcomer has had no chance to ask yet, so it gives way only where all others are being answered."""
        others = [other for other in self.connections if isinstance(other, BoundedProtocol) and not other._is_dropped and other is not self]
        if len(others) < self._limits.connections:
            return
        least = min(others, key=BoundedProtocol._worth)
        (self if least._phase is Phase.ANSWER else least)._drop()

    def _worth(self) -> tuple[bool, bool, bool, float]:
        """Least for the one to close first: those refused, then those without a whole request, then idle ones, oldest first."""
        return self._phase is not Phase.CLOSING, self._phase is Phase.ANSWER, self._has_asked, self._since

    def _refuse(self, kind: str, detail: str) -> None:
        """Answer with a problem, if the client can still be answered, and close when it has had time to read that."""
        if not self._can_answer():
            self._drop()
            return
        if self.cycle is not None:
            self.cycle.disconnected = True  # whatever the application is about to answer
            self.cycle.message_event.set()
        response = Refused(kind, detail).response({"type": "http", "path": "/"})
        status = b"HTTP/1.1 %d %s" % (response.status_code, STATUS_PHRASES[response.status_code])
        lines = [status, b"connection: close"] + [name + b": " + value for name, value in response.raw_headers]
        self._enter(Phase.CLOSING)
        self.flow.resume_reading()
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        with suppress(OSError):  # the client has gone meanwhile
            self.transport.write_eof()

    def _can_answer(self) -> bool:
        has_begun = self.cycle is not None and (self._phase is Phase.BODY if self.cycle.response_complete else self.cycle.response_started)
        return not has_begun and not self.transport.is_closing()

    def _drop(self) -> None:
        self._is_dropped = True
        self.transport.abort()

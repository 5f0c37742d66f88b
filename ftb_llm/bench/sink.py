"""A server that does nothing but what any bounded server must: the control of `ftb-llm bench siege`.

It tells what the attacker's own work, and the kernel's, takes from a run on the same machine. It holds 128 connections, closes the
oldest for a new one, answers 431 to a header above 16 KiB and closes what is older than ten seconds.
"""

import os
import selectors
import socket
import sys
import time

from ftb_llm.bench.attacks import NICE

CONNECTIONS = 128
HEADER_BYTES = 16 * 1024
SECONDS = 10.0
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n"


class Sink:
    """Runs in one thread, for ever."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._taken: dict[socket.socket, int] = {}  # bytes of each connection, the oldest first
        self._since: dict[socket.socket, float] = {}

    def serve_forever(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=0.5):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._taken:  # not closed for another one just now
                    self._take(key.fileobj)
            now = time.monotonic()
            for connection in [one for one, since in self._since.items() if now - since > SECONDS]:
                self._close(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        if len(self._taken) >= CONNECTIONS:
            self._close(next(iter(self._taken)))
        connection.setblocking(False)
        self._taken[connection], self._since[connection] = 0, time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ)

    def _take(self, connection: socket.socket) -> None:
        try:
            taken = len(connection.recv(65536))
            self._taken[connection] += taken
            if self._taken[connection] > HEADER_BYTES:
                connection.send(TOO_LARGE)
        except OSError:
            taken = 0
        if taken == 0 or self._taken[connection] > HEADER_BYTES:
            self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._taken[connection], self._since[connection]
        connection.close()


def main() -> None:
    os.nice(NICE)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    try:
        Sink(listener).serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()

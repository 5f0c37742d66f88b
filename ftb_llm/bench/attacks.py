"""What a hostile or broken client does to a port of this machine, each attack bounded in bytes, connections and seconds.

    Order, as JSON on standard input -> a process of its own, the least urgent one there is -> Outcome, as JSON on standard output

Only the standard library is used, and the pace is limited: the harm is to come from the server, not from the attacker's own work.
"""

import json
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

MEGABYTE = 1_000_000
FLOOD_MEGABYTES_PER_SECOND = 25.0
RECONNECT_SECONDS = 0.05
OPEN_PER_SECOND = 150.0  # at first
REOPEN_PER_SECOND = 20.0  # of those that the server closed
TICK_SECONDS = 0.1
DRIP_SECONDS = 2.0
PATIENCE_SECONDS = 1.0  # for one connect or send
FILES = 4096  # that the attacker may hold open, where the machine lets it
NICE = 19

HEAD = b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\n"
SLOW_BODY = b"PATCH /v1/config HTTP/1.1\r\nHost: 127.0.0.1\r\nIf-Match: *\r\nContent-Length: 100000000\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do, and no more than that."""

    attack: str  # a key of ATTACKS
    port: int
    seconds: float
    megabytes: float = 200.0
    connections: int = 1100


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of it, as seen from outside."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sent_bytes: int = 0
    most_bytes: int = 0  # of one connection, before the server closed it
    opened: int = 0
    refused: int = 0  # connections that did not come about
    closed: int = 0  # by the server
    held: int = 0  # open at once, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a held connection says at first, and then every two seconds."""

    greeting: bytes = b""
    drip: bytes = b""


@dataclass(slots=True)
class Flood:
    """One piece over and over, as one header after another or as one header without end; on a new connection when the server closes."""

    order: Order
    head: bytes
    piece: bytes
    outcome: Outcome = field(default_factory=Outcome)
    began: float = field(default_factory=time.monotonic)

    def run(self) -> Outcome:
        while not self.over():
            connection = connect(self.order.port, self.outcome)
            if connection is not None:
                with connection:
                    before = self.outcome.sent_bytes
                    self.pour(connection)
                    self.outcome.most_bytes = max(self.outcome.most_bytes, self.outcome.sent_bytes - before)
            time.sleep(RECONNECT_SECONDS)
        return self.outcome

    def pour(self, connection: socket.socket) -> None:
        """Send until the server closes, or the order is carried out."""
        connection.settimeout(PATIENCE_SECONDS)
        self.outcome.held = 1
        offset = 0
        try:
            connection.sendall(self.head)
            while not self.over():
                count = connection.send(self.piece[offset:])
                offset = (offset + count) % len(self.piece)
                self.outcome.sent_bytes += count
                due = self.began + self.outcome.sent_bytes / (FLOOD_MEGABYTES_PER_SECOND * MEGABYTE)
                time.sleep(max(0.001, due - time.monotonic()))
        except TimeoutError:
            return  # it takes no more, and keeps the connection
        except OSError:
            self.outcome.closed += 1

    def over(self) -> bool:
        return time.monotonic() - self.began > self.order.seconds or self.outcome.sent_bytes >= self.order.megabytes * MEGABYTE


@dataclass(slots=True)
class Crowd:
    """Many connections held open at once, each of the kinds in turn; what the server closes is opened again."""

    order: Order
    kinds: Sequence[Kind]
    outcome: Outcome = field(default_factory=Outcome)
    members: dict[socket.socket, Kind] = field(default_factory=dict)

    def run(self) -> Outcome:
        began = time.monotonic()
        owed, next_drip = 0.0, began + DRIP_SECONDS
        try:
            while time.monotonic() - began < self.order.seconds:
                owed += TICK_SECONDS * (OPEN_PER_SECOND if self.outcome.opened < self.order.connections else REOPEN_PER_SECOND)
                while owed >= 1 and len(self.members) < self.order.connections:
                    owed -= 1
                    self.enter()
                owed = min(owed, 1.0)
                self.look()
                if time.monotonic() >= next_drip:
                    next_drip += DRIP_SECONDS
                    self.drip()
                time.sleep(TICK_SECONDS)
            self.look()
        finally:
            for member in self.members:
                member.close()
        return self.outcome

    def enter(self) -> None:
        kind = self.kinds[self.outcome.opened % len(self.kinds)]
        member = connect(self.order.port, self.outcome)
        if member is None:
            return
        self.members[member] = kind
        self.outcome.held = max(self.outcome.held, len(self.members))
        self.say(member, kind.greeting)

    def look(self) -> None:
        """Take out what the server closed."""
        watch = select.poll()
        by_number = {member.fileno(): member for member in self.members}
        for number in by_number:
            watch.register(number, select.POLLIN)
        for number, _ in watch.poll(0):
            member = by_number[number]
            try:
                closed = not member.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                closed = True
            if closed:
                self.leave(member)

    def drip(self) -> None:
        for member, kind in list(self.members.items()):
            self.say(member, kind.drip)

    def say(self, member: socket.socket, words: bytes) -> None:
        try:
            self.outcome.sent_bytes += member.send(words) if words else 0
        except BlockingIOError:
            return
        except OSError:
            self.leave(member)

    def leave(self, member: socket.socket) -> None:
        self.outcome.closed += 1
        del self.members[member]
        member.close()


def connect(port: int, outcome: Outcome) -> socket.socket | None:
    """A connection that doesn't block any more, or None where there is none to be had."""
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
    except OSError:
        outcome.refused += 1
        return None
    connection.setblocking(False)
    outcome.opened += 1
    return connection


def many_headers(order: Order) -> Outcome:
    return Flood(order, HEAD, b"X: y\r\n" * 10_000).run()


def giant_header(order: Order) -> Outcome:
    return Flood(order, HEAD + b"X: ", b"y" * 60_000).run()


def idle(order: Order) -> Outcome:
    return Crowd(order, [Kind()]).run()


def slow(order: Order) -> Outcome:
    return Crowd(order, [Kind(greeting=HEAD, drip=b"X: y\r\n"), Kind(greeting=SLOW_BODY, drip=b" ")]).run()


ATTACKS: Mapping[str, Callable[[Order], Outcome]] = {
    "headers": many_headers,
    "one-header": giant_header,
    "idle": idle,
    "slow": slow,
}


def carry_out(order: Order) -> Outcome:
    """The attack, with what it cost this process."""
    began, spent = time.monotonic(), time.process_time()
    outcome = ATTACKS[order.attack](order)
    outcome.seconds, outcome.cpu_seconds = time.monotonic() - began, time.process_time() - spent
    return outcome


def main() -> None:
    os.nice(NICE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)), hard))
    order = Order(**json.loads(sys.stdin.readline()))
    print(json.dumps(asdict(carry_out(order))), flush=True)


if __name__ == "__main__":
    main()

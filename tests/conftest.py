"""Shared by every test: markers from folders, no download, and no connection that leaves this machine."""

import os
import socket
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

# Set before anything heavy is imported: libraries that would look up a model or report usage find out that they may not.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

TESTS = Path(__file__).parent
MARKED_FOLDERS = ("ray", "e2e", "gpu")


class LeftTheMachine(BaseException):
    """A test tried to reach another machine. Not an `Exception`, so that no handler of ours can swallow it."""


def own_addresses() -> frozenset[str]:
    """The addresses of this machine: Ray talks to itself over the one that faces the network."""
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return frozenset(found)  # no route at all: nothing faces the network
        return frozenset(found | {probe.getsockname()[0]})


def is_here(host: Any, own: frozenset[str]) -> bool:
    """True for a name or an address of this machine, loopback included."""
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if name in own or name in ("localhost", socket.gethostname()):
        return True
    try:
        address = ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def is_name(host: Any) -> bool:
    """True for what has to be looked up, False for an address."""
    try:
        ip_address(str(host).partition("%")[0])
    except ValueError:
        return True
    return False


def guard_sockets() -> None:
    """Refuse connections to other machines and look-ups of their names, through the interpreter's own audit events."""
    own = own_addresses()

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            connection, address = arguments
            # Connecting a datagram socket sends nothing; it is how libraries find out their own address.
            if isinstance(address, tuple) and connection.type != socket.SOCK_DGRAM and not is_here(address[0], own):
                raise LeftTheMachine(f"a test tried to connect to {address}; tests may only reach this machine")
        elif event == "socket.getaddrinfo" and is_name(arguments[0]) and not is_here(arguments[0], own):
            raise LeftTheMachine(f"a test tried to look up {arguments[0]!r}; tests may only reach this machine")

    sys.addaudithook(refuse)


def pytest_configure(config: pytest.Config) -> None:
    guard_sockets()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test under tests/ray, tests/e2e or tests/gpu carries the marker of its folder."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)

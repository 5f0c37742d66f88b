"""The guard that keeps every test on this machine."""

import socket
from pathlib import Path

import pytest


def test_connecting_to_another_machine_is_refused() -> None:
    with socket.socket() as there, pytest.raises(BaseException, match="may only reach this machine") as caught:
        there.connect(("192.0.2.1", 80))
    assert caught.type.__name__ == "LeftTheMachine"
    assert not issubclass(caught.type, Exception)


def test_looking_up_another_machine_is_refused() -> None:
    with pytest.raises(BaseException, match=r"tried to look up 'example\.invalid'"):
        socket.create_connection(("example.invalid", 80), timeout=5)


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "localhost")])
def test_loopback_connects(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with socket.create_connection((host, server.getsockname()[1]), timeout=5):
            pass


def test_unix_sockets_connect(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))


def test_unit_tests_carry_no_marker_of_another_folder(request: pytest.FixtureRequest) -> None:
    assert not {"ray", "e2e", "gpu"} & {marker.name for marker in request.node.iter_markers()}

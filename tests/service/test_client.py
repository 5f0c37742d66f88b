import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from ftb_llm.api.client import Client
from ftb_llm.errors import ApiError, ApiUnreachable


def test_it_reads_and_commands(url: str, run) -> None:
    with Client(url + "/") as client:
        assert client.status()["run"] == "fake"
        assert client.config()["config"]["run"]["max_steps"] == 50
        assert client.checkpoint()["after_step"] == 12
        assert client.stop()["poll"] == "/v1/status"
    assert run.commands == [("checkpoint", "cli"), ("stop", "cli")]


def test_a_patch_names_its_source(url: str, run) -> None:
    with Client(url) as client:
        assert client.patch({"objective": {"beta": 0.25}})["changed"] == {"objective.beta": [0.5, 0.25]}
        assert [version["source"] for version in client.history()] == ["start", "cli"]


def test_the_history_is_whole_however_long(url: str, run) -> None:
    for number in range(1100):
        run.ledger.patch({"run": {"max_steps": 1000 + number}}, if_match="*", source="rest")
    with Client(url) as client:
        assert [version["version"] for version in client.history()] == list(range(1, 1102))
        assert [version["version"] for version in client.history(since=1099)] == [1100, 1101]


def test_ready_and_its_cause(url: str, run) -> None:
    with Client(url) as client:
        assert client.ready()
        run.cause = "the learner is dead"
        assert not client.ready()
        assert client.not_ready_cause() == "the learner is dead"


def test_a_refusal_carries_the_detail(url: str) -> None:
    with Client(url) as client, pytest.raises(ApiError, match=r"sampling\.group_size") as caught:
        client.patch({"sampling": {"group_size": 2}})
    assert caught.value.status == 409


class Rival:
    """Another writer, whose patches land between our read and our write."""

    def __init__(self, run, patches: list[dict]) -> None:
        self.ledger = run.ledger
        self.patches = patches

    def __call__(self, response: httpx.Response) -> None:
        if response.request.method == "GET" and self.patches:
            self.ledger.patch(self.patches.pop(), if_match="*", source="rival")


def test_a_conflict_is_retried_once(url: str, run) -> None:
    with Client(url) as client:
        client._http.event_hooks["response"].append(Rival(run, [{"objective": {"beta": 0.25}}]))
        client.patch({"learner": {"learning_rate": 0.001}})
    current = run.ledger.current.config
    assert (current.objective.beta, current.learner.learning_rate) == (0.25, 0.001)


def test_a_second_conflict_is_an_error(url: str, run) -> None:
    with Client(url) as client:
        client._http.event_hooks["response"].append(Rival(run, [{"objective": {"beta": 0.25}}, {"objective": {"beta": 0.75}}]))
        with pytest.raises(ApiError, match="If-Match") as caught:
            client.patch({"learner": {"learning_rate": 0.001}})
    assert caught.value.status == 412


def test_the_token_is_sent(guarded: httpx.Client) -> None:
    url = str(guarded.base_url)
    with Client(url, token="s3cret") as client:
        assert client.status()["run"] == "fake"
    with Client(url) as client, pytest.raises(ApiError, match="Bearer"):
        client.status()


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(url) as client, pytest.raises(ApiUnreachable, match=f"^nothing listens at {url}; "):
        client.status()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://127.0.0.1:port", ""])
def test_not_a_url(url: str) -> None:
    with pytest.raises(ApiUnreachable), Client(url) as client:
        client.status()


def test_another_server_on_the_port() -> None:
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}") as client, pytest.raises(ApiUnreachable, match="is not an ftb_llm control plane"):
            client.status()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

import logging

import httpx
import pytest


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/status/", 404), ("DELETE", "/v1/config", 405), ("GET", "/v1/control/stop", 405), ("GET", "/v1/%ff%22", 404)],
)
def test_unknown_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem = answer.json()
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert set(problem) == {"type", "title", "status", "detail", "instance"}
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "methods"), [("/v1/config", "GET, HEAD, PATCH"), ("/v1/control/stop", "POST"), ("/openapi.json", "GET, HEAD"), ("/", "GET, HEAD")]
)
def test_allow_names_every_method(http: httpx.Client, path: str, methods: str) -> None:
    for method in ("OPTIONS", "PUT", "DELETE"):
        answer = http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


@pytest.mark.parametrize(
    "path",
    ["/", "/healthz", "/readyz", "/metrics", "/v1/status", "/v1/config", "/v1/config/schema", "/v1/config/history", "/docs", "/openapi.json", "/nowhere"],
)
def test_head_answers_like_get_without_the_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    for name in ("content-type", "etag"):
        assert head.headers.get(name) == get.headers.get(name)
    assert head.headers["content-length"] == get.headers["content-length"] or path in ("/v1/status", "/metrics"), "these two tell the time"


@pytest.mark.parametrize("path", ["/v1/status", "/metrics"])
def test_an_unexpected_error_hides_the_inside_and_logs_it(http: httpx.Client, run, caplog: pytest.LogCaptureFixture, path: str) -> None:
    run.broken = True
    with caplog.at_level(logging.ERROR):
        answer = http.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert "a secret of the inside" in caplog.text
    run.broken = False
    assert http.get(path).status_code == 200


def test_a_status_that_breaks_its_contract_is_a_500(http: httpx.Client, run) -> None:
    run.state = "asleep"
    answer = http.get("/v1/status")
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:ftb-llm:problem:internal-error")

import logging

import httpx
import pytest

from ftb_llm.api.app import create_app
from ftb_llm.errors import ConfigError
from tests.service.conftest import serving

ROUTES = ["/", "/v1/config/schema", "/readyz", "/metrics", "/v1/status", "/v1/config", "/v1/config/history", "/docs", "/openapi.json", "/nowhere"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer s3cre", "s3cret", "Basic s3cret", "Bearer", "Bearer \xff"])
def test_the_token_is_needed(guarded: httpx.Client, header: str | None) -> None:
    for path in ROUTES:
        answer = guarded.get(path, headers={} if header is None else {"Authorization": header.encode("latin-1")})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert answer.json()["type"] == "urn:ftb-llm:problem:unauthorized"


def test_the_token_opens_every_route(guarded: httpx.Client) -> None:
    for path in ROUTES:
        for scheme in ("Bearer", "bearer"):
            assert guarded.get(path, headers={"Authorization": f"{scheme} s3cret"}).status_code == (404 if path == "/nowhere" else 200)


def test_healthz_needs_no_token(guarded: httpx.Client) -> None:
    assert guarded.get("/healthz").status_code == 200
    assert guarded.post("/v1/control/stop").status_code == 401


def test_with_a_token_any_host_and_origin_may_come(guarded: httpx.Client) -> None:
    headers = {"Authorization": "Bearer s3cret", "Host": "trainer.example", "Origin": "http://elsewhere.example"}
    assert guarded.post("/v1/control/checkpoint", headers=headers).status_code == 202


def test_the_token_is_never_logged(guarded: httpx.Client, run, caplog: pytest.LogCaptureFixture) -> None:
    run.broken = True
    with caplog.at_level(logging.DEBUG, logger="ftb_llm"), caplog.at_level(logging.DEBUG, logger="uvicorn"):
        assert guarded.get("/v1/status", headers={"Authorization": "Bearer s3cret"}).status_code == 500
        guarded.get("/v1/status", headers={"Authorization": "Bearer nearly"})
    assert "failed" in caplog.text
    assert "s3cret" not in caplog.text
    assert "nearly" not in caplog.text


def test_a_token_is_cleaned_of_the_line_break_of_its_file(run) -> None:
    with serving(create_app(run, token="s3cret-of-a-file\n")) as url:
        answer = httpx.get(f"{url}/v1/status", headers={"Authorization": "Bearer s3cret-of-a-file"}, trust_env=False)
    assert answer.status_code == 200


def test_an_empty_token_is_refused(run) -> None:
    with pytest.raises(ConfigError, match=r"control\.token_env"):
        create_app(run, token=" ")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]", "[", ""])
def test_foreign_hosts_are_refused(http: httpx.Client, host: str) -> None:
    for path in ("/healthz", "/v1/config"):
        answer = http.get(path, headers={"Host": host})
        assert (answer.status_code, answer.json()["type"]) == (421, "urn:ftb-llm:problem:foreign-host")


@pytest.mark.parametrize(
    "host", ["evil@127.0.0.1", "127.0.0.1#evil", "127.0.0.1/evil", "127.0.0.1:80:80", "127.0.0.1:port", "localhost, evil", "[::1", "127.0.0.1:"]
)
def test_a_host_is_a_name_and_a_port_and_nothing_else(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/status", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "LOCALHOST", "127.0.0.1", "127.0.0.2:80", "[::1]:8000"])
def test_names_of_this_machine_are_served(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/status", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_writes_of_another_origin_are_refused(http: httpx.Client, run, origin: str) -> None:
    answer = http.post("/v1/control/stop", headers={"Origin": origin})
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:ftb-llm:problem:cross-origin")
    assert run.commands == []


def test_what_a_browser_marks_as_of_another_site_is_refused(http: httpx.Client, run) -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    for method, path in (("POST", "/v1/control/stop"), ("GET", "/v1/status")):
        answer = http.request(method, path, headers=elsewhere)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:ftb-llm:problem:cross-origin")
    navigates = elsewhere | {"Sec-Fetch-Mode": "navigate"}
    assert http.post("/v1/control/stop", headers=navigates).status_code == 403, "a form of another site navigates too"
    assert http.get("/docs", headers=navigates).status_code == 200, "a link that was followed"
    assert http.post("/v1/control/stop", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 202


def test_writes_of_the_own_origin_pass(http: httpx.Client, url: str) -> None:
    assert http.post("/v1/control/stop", headers={"Origin": url}).status_code == 202

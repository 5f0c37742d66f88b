"""Schemathesis against a small real control plane, with a token and without: no answer that the OpenAPI document does not allow."""

import pytest

from ftb_llm.api.app import create_app
from tests.service.conftest import FakeRun, serving
from tools.check_api import PASSES, STOP, Verdict, ask, verdict_of

EXAMPLES = 20


@pytest.mark.parametrize(("name", "token"), [("as it likes", "s3cret"), ("If-Match: *", None)])
def test_every_answer_is_in_the_document(name: str, token: str | None) -> None:
    run = FakeRun()
    app = create_app(run, token=token)
    with serving(app) as url:
        verdict = ask(url, token=token, max_examples=EXAMPLES, options=[*PASSES[name], "--exclude-path", STOP])
    assert verdict.good, verdict.text
    assert verdict.operations == sum(len(methods) for methods in app.openapi()["paths"].values()) - 1
    assert verdict.requests > 5 * verdict.operations
    assert run.changes != [] or name != "If-Match: *", "no patch was applied"


def test_stop_too() -> None:
    with serving(create_app(FakeRun())) as url:
        verdict = ask(url, token=None, max_examples=EXAMPLES, options=["--include-path", STOP])
    assert verdict.good, verdict.text
    assert verdict.operations == 1


def test_what_breaks_the_document_is_found() -> None:
    run = FakeRun()
    run.broken = True
    with serving(create_app(run)) as url:
        verdict = ask(url, token=None, max_examples=EXAMPLES, options=["--include-path", "/v1/status"])
    assert verdict.failures > 0 and not verdict.good


@pytest.mark.parametrize(
    ("changed", "errors"),
    [({}, 0), ({"complete": False}, 1), ({"errors": ["the server went away"]}, 1), ({"operations": {"tested": 7, "selected": 8, "errored": 1}}, 2)],
)
def test_what_was_not_asked_to_the_end_is_an_error(changed: dict[str, object], errors: int) -> None:
    report: dict[str, object] = {
        "complete": True,
        "errors": [],
        "operations": {"tested": 8, "selected": 8, "errored": 0},
        "test_cases": {"generated": 90, "unique_failures": 0},
    }
    verdict = verdict_of(report | changed, "text")
    assert verdict.errors == errors and verdict.good == (errors == 0)


def test_nothing_asked_is_not_good() -> None:
    assert not Verdict(operations=0, requests=0, failures=0, errors=0, text="").good

import json
from typing import Any

import httpx
import pytest

PATCH = {"objective": {"divergence": {"name": "hellinger"}}}


def send(http: httpx.Client, body: Any, *, if_match: str | None = "*", content_type: str | None = "application/merge-patch+json") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name: value for name, value in (("If-Match", if_match), ("Content-Type", content_type)) if value is not None}
    return http.patch("/v1/config", content=content, headers=headers)


def assert_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert (answer.status_code, problem["status"], problem["type"]) == (status, status, f"urn:ftb-llm:problem:{kind}")
    assert problem["instance"] == "/v1/config"
    assert problem["title"]
    assert problem["detail"]
    return problem


def test_the_config_comes_with_an_etag(http: httpx.Client, run) -> None:
    answer = http.get("/v1/config")
    assert answer.json() == {"version": 1, "config": run.ledger.current.config.model_dump(mode="json")}
    assert answer.headers["etag"] == run.ledger.etag
    unchanged = http.get("/v1/config", headers={"If-None-Match": f'"other", {answer.headers["etag"]}'})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert http.get("/v1/config", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("content_type", [None, "application/json", "application/merge-patch+json; charset=utf-8", "application/x-www-form-urlencoded"])
def test_a_patch_takes_effect_at_the_next_step(http: httpx.Client, run, content_type: str | None) -> None:
    etag = http.get("/v1/config").headers["etag"]
    answer = send(http, PATCH, if_match=etag, content_type=content_type)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"config_version": 2, "effective_step": 12, "changed": {"objective.divergence.name": ["reverse_kl", "hellinger"]}}
    assert answer.headers["etag"] == http.get("/v1/config").headers["etag"] != etag
    assert [version.source for version in run.changes] == ["rest"]


def test_a_patch_that_changes_nothing_makes_no_version(http: httpx.Client, run) -> None:
    send(http, PATCH)
    answer = send(http, PATCH)
    assert answer.json() == {"config_version": 2, "effective_step": 12, "changed": {}}
    assert len(run.changes) == 1


def test_the_history_tells_who_changed_what(http: httpx.Client) -> None:
    send(http, PATCH)
    first, second = http.get("/v1/config/history").json()["versions"]
    assert (first["version"], first["source"], first["changed"]) == (1, "start", {})
    assert (second["version"], second["source"], second["effective_step"]) == (2, "rest", 12)
    assert second["changed"] == {"objective.divergence.name": ["reverse_kl", "hellinger"]}
    assert second["time"] >= first["time"]


def test_the_history_comes_in_pages(http: httpx.Client, run) -> None:
    for number in range(1, 25):
        run.ledger.patch({"objective": {"beta": number / 100}}, if_match="*", source="rest")

    def page(**query: int) -> tuple[list[int], int | None]:
        answer = http.get("/v1/config/history", params=query).json()
        assert answer["total"] == 25
        return [item["version"] for item in answer["versions"]], answer["next"]

    assert page() == (list(range(1, 26)), None)
    assert page(limit=3) == ([23, 24, 25], None), "the newest"
    assert page(limit=3, since=0) == ([1, 2, 3], 3)
    assert page(limit=3, since=3) == ([4, 5, 6], 6)
    assert page(since=24) == ([25], None)
    assert page(since=25) == page(since=1000) == ([], None)
    for query in ({"limit": 0}, {"limit": 1001}, {"since": -1}, {"since": 2**31}, {"limit": "many"}):
        answer = http.get("/v1/config/history", params=query)
        assert (answer.status_code, answer.json()["type"]) == (422, "urn:ftb-llm:problem:invalid-request")


def test_a_long_history_costs_no_more_than_a_page(http: httpx.Client, run) -> None:
    for number in range(300):
        run.ledger.patch({"objective": {"beta": 0.1 + number / 1000}}, if_match="*", source="rest")
    answer = http.get("/v1/config/history")
    assert (len(answer.json()["versions"]), answer.json()["versions"][-1]["version"], answer.json()["total"]) == (100, 301, 301)
    assert len(answer.content) < 20_000


def test_if_match_is_required(http: httpx.Client, run) -> None:
    problem = assert_problem(send(http, PATCH, if_match=None), 428, "precondition-required")
    assert run.ledger.etag in problem["detail"]


def test_a_conflict_is_refused_with_the_current_etag(http: httpx.Client, run) -> None:
    stale = http.get("/v1/config").headers["etag"]
    send(http, {"objective": {"beta": 0.25}}, if_match=stale)
    answer = send(http, PATCH, if_match=stale)
    assert assert_problem(answer, 412, "stale-config")["current_etag"] == run.ledger.etag == answer.headers["etag"]
    assert run.ledger.current.version == 2


def test_fixed_settings_are_refused(http: httpx.Client) -> None:
    problem = assert_problem(send(http, {"sampling": {"group_size": 64}, "learner": {"groups_per_step": 2}}), 409, "fixed-setting")
    assert {item["path"] for item in problem["errors"]} == {"sampling.group_size", "learner.groups_per_step"}


@pytest.mark.parametrize("custom", ["os:system", "my.members:one"])
def test_no_import_path_comes_over_http(http: httpx.Client, run, custom: str) -> None:
    problem = assert_problem(send(http, {"objective": {"custom": custom, "divergence": {"name": "custom"}}}), 409, "fixed-setting")
    assert [item["path"] for item in problem["errors"]] == ["objective.custom"]
    problem = assert_problem(send(http, {"objective": {"divergence": {"name": "custom"}}}), 422, "invalid-config")
    assert "objective.custom" in problem["detail"]
    assert run.changes == []


def test_a_ramp_and_a_schedule_take_effect_at_the_next_step(http: httpx.Client, run) -> None:
    ramp = {"from": 0.75, "to": 1.2, "over": 300}
    schedule = [{"step": 40, "name": "tv", "width": 0.5}]
    answer = send(http, {"objective": {"divergence": {"name": "alpha", "alpha": ramp, "schedule": schedule}}})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "config_version": 2,
        "effective_step": 12,
        "changed": {
            "objective.divergence.name": ["reverse_kl", "alpha"],
            "objective.divergence.alpha": [None, ramp],
            "objective.divergence.schedule": [[], [{"name": "tv", "alpha": None, "width": 0.5, "step": 40}]],
        },
    }
    read = http.get("/v1/config").json()["config"]
    assert read["objective"]["divergence"]["alpha"] == ramp
    assert send(http, read).json()["changed"] == {}, "what is read can be sent back"
    assert [run.ledger.objective_at(step).alpha for step in (12, 37, 40)] == [0.75, pytest.approx(0.75 + 0.45 * 25 / 300), None]


def test_another_member_needs_no_word_about_the_old_ones_settings(http: httpx.Client) -> None:
    send(http, {"objective": {"divergence": {"name": "alpha", "alpha": 0.5}}})
    answer = send(http, PATCH)
    assert answer.json()["changed"] == {"objective.divergence.name": ["alpha", "hellinger"], "objective.divergence.alpha": [0.5, None]}


def test_a_bad_ramp_is_refused_with_its_path(http: httpx.Client) -> None:
    problem = assert_problem(send(http, {"objective": {"divergence": {"name": "alpha", "alpha": {"from": 0, "to": 20}}}}), 422, "invalid-config")
    assert {item["path"]: item["message"] for item in problem["errors"]} == {
        "objective.divergence.alpha.to": "20 is wrong: it should be less than or equal to 10",
        "objective.divergence.alpha.over": "is required",
    }


def test_bad_values_are_refused_with_their_paths(http: httpx.Client) -> None:
    problem = assert_problem(send(http, {"objective": {"beta": -1, "betta": 2}, "run": {"max_steps": "many"}}), 422, "invalid-config")
    messages = {item["path"]: item["message"] for item in problem["errors"]}
    assert set(messages) == {"objective.beta", "objective.betta", "run.max_steps"}
    assert "-1" in messages["objective.beta"]
    assert "did you mean objective.beta?" in messages["objective.betta"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"objective.beta=1", "Expecting value"),
        (b'{"objective": {"beta": NaN}}', "NaN"),
        (b'{"objective": {"beta": Infinity}}', "Infinity"),
        (b'{"run": {"max_steps": 5, "max_steps": 6}}', "given twice"),
        (b'{"objective": {"beta": \xff}}', "utf-8"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"run": {"max_steps": ' + b"9" * 5000 + b"}}", "digits"),
    ],
    ids=["empty", "torn", "form", "nan", "infinity", "twice", "not-utf8", "deep", "digits"],
)
def test_broken_json_is_refused(http: httpx.Client, run, body: bytes, words: str) -> None:
    assert words in assert_problem(send(http, body), 400, "bad-json")["detail"]
    assert run.changes == []


@pytest.mark.parametrize(
    "body", [b"[]", b"5", b"null", b'"text"', b'{"objective": 5}', b'{"objective": {"beta": 1e999}}', b'{"objective": {"beta": "\\ud800"}}']
)
def test_json_of_the_wrong_shape_is_refused(http: httpx.Client, run, body: bytes) -> None:
    assert_problem(send(http, body), 422, "invalid-config")
    assert run.changes == []


def test_the_size_limit_is_64_kib(http: httpx.Client) -> None:
    room = b'{"objective": {"beta": 0.25}}'
    assert send(http, room + b" " * (64 * 1024 - len(room))).status_code == 200
    assert_problem(send(http, room + b" " * (64 * 1024 - len(room) + 1)), 413, "body-too-large")
    assert_problem(send(http, b" " * 2_000_000), 413, "body-too-large")


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("identity", 200), ("Identity", 200)])
def test_an_encoded_body_is_refused(http: httpx.Client, run, encoding: str, status: int) -> None:
    headers = {"If-Match": "*", "Content-Type": "application/json", "Content-Encoding": encoding}
    answer = http.patch("/v1/config", content=json.dumps(PATCH).encode(), headers=headers)
    assert answer.status_code == status
    if status == 415:
        assert "Content-Encoding" in assert_problem(answer, 415, "unsupported-media-type")["detail"]
        assert run.changes == []


def test_other_media_types_are_refused(http: httpx.Client) -> None:
    answer = send(http, PATCH, content_type="application/yaml")
    assert "application/yaml" in assert_problem(answer, 415, "unsupported-media-type")["detail"]
    assert "application/merge-patch+json" in answer.headers["accept-patch"]

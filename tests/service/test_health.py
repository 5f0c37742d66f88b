import httpx


def test_healthz_answers(http: httpx.Client) -> None:
    answer = http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_readyz_names_the_cause(http: httpx.Client, run) -> None:
    assert http.get("/readyz").json() == {"ready": True}
    run.cause = "no generator is alive: generator-0 failed its canary"
    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"] == run.cause
    assert answer.json()["type"] == "urn:ftb-llm:problem:not-ready"


def test_metrics_are_prometheus_text(http: httpx.Client) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nftb_llm_step 11.0\n" in answer.text


def test_status_is_complete_and_turns_nan_into_null(http: httpx.Client, run) -> None:
    answer = http.get("/v1/status")
    assert answer.status_code == 200
    reverse_kl, pearson = run.divergences["reverse_kl"], {**run.divergences["pearson"], "estimate": None, "stderr": None}
    assert answer.json() == {**run.status(), "divergences": {"reverse_kl": reverse_kl, "pearson": pearson}}

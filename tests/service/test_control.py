import httpx


def test_stop_is_accepted_once(http: httpx.Client, run) -> None:
    answer = http.post("/v1/control/stop")
    assert (answer.status_code, answer.json()["action"], answer.json()["poll"]) == (202, "stop", "/v1/status")
    again = http.post("/v1/control/stop")
    assert (again.status_code, again.json()["detail"]) == (409, "the run is already stopping")
    assert run.commands == [("stop", "rest")]


def test_checkpoint_is_accepted_while_training(http: httpx.Client, run) -> None:
    answer = http.post("/v1/control/checkpoint")
    assert (answer.status_code, answer.json()["poll"], answer.json()["after_step"]) == (202, "/v1/status", 12)
    run.state = "finished"
    refused = http.post("/v1/control/checkpoint")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:ftb-llm:problem:wrong-state")
    assert run.commands == [("checkpoint", "rest")]

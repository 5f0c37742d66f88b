"""The quickstart, shortened: real vLLM, real Ray, real HTTP. One run, looked at from every side."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest

from ftb_llm.api.client import Client
from tests.e2e.conftest import QUICKSTART, START_SECONDS

STEPS = 120
SWAP_AFTER_STEP = 30
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def seen():
    """What was observed while the run was alive."""
    return {"statuses": []}


@pytest.fixture(scope="module")
def run(launch, seen):
    """Start, watch, swap the divergence by PATCH and by `ftb-llm set`, ask for a checkpoint, and wait for the end."""
    run = launch(str(QUICKSTART), f"run.max_steps={STEPS}", "eval.every_steps=40", "logging.progress=plain")
    run.wait_until(lambda status: status["step"] >= SWAP_AFTER_STEP, START_SECONDS)
    seen["patch"] = swap_by_curl(run.url, "hellinger")
    seen["set"] = command(run.url, "set", "objective.divergence.name=forward_kl", "--json")
    seen["status"] = command(run.url, "status", "--json")
    seen["metrics_text"] = get(run.url + "/metrics")
    seen["ready"] = get(run.url + "/readyz")
    seen["docs"] = get(run.url + "/docs")
    with Client(run.url) as client:
        seen["checkpoint"] = client.checkpoint()
        while run.process.poll() is None and client.status()["step"] < STEPS - 5:
            seen["statuses"].append(client.status())
            time.sleep(0.2)
    assert run.exit_code(180) == 0, run.output()
    return run


def swap_by_curl(url: str, name: str) -> dict:
    """As the README shows it: read the ETag, send it back with the patch."""
    with urllib.request.urlopen(url + "/v1/config") as answer:
        etag = answer.headers["ETag"]
    body = json.dumps({"objective": {"divergence": {"name": name}}}).encode()
    request = urllib.request.Request(url + "/v1/config", data=body, method="PATCH", headers={"If-Match": etag})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def get(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


def command(url: str, *words: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "ftb_llm.cli.main", *words, "--url", url], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_exact_distance_to_the_target_falls(run):
    summary = run.summary()
    assert summary["exact_tv_start"] > 0.7
    assert summary["exact_tv_end"] < 0.7 * summary["exact_tv_start"]
    assert summary["reward_end"] > 2 * summary["reward_start"]


def test_every_step_stands_once_and_generation_was_asynchronous(run):
    steps = [row["step"] for row in run.metrics()]
    assert steps == list(range(STEPS + 1))
    assert run.summary()["mean_staleness_steps"] >= 1


def test_the_swaps_take_effect_at_the_announced_steps(run, seen):
    by_step = {row["step"]: row for row in run.metrics() if row["step"] > 0}
    first, second = seen["patch"]["effective_step"], seen["set"]["effective_step"]
    assert SWAP_AFTER_STEP < first <= second < STEPS
    for step, row in by_step.items():
        expected = "reverse_kl" if step < first else "hellinger" if step < second else "forward_kl"
        assert row["objective"]["divergence"] == expected, step
    assert [event["effective_step"] for event in run.events("config_change")] == [first, second]


def test_the_accounts_balance_at_every_look(run, seen):
    finals = [run.summary()["accounting"]]
    assert len(seen["statuses"]) > 3
    for accounts in [status["accounting"] for status in seen["statuses"]] + finals:
        assert accounts["generated"] == sum(accounts[state] for state in ("trained", "dropped_stale", "rejected", "buffered", "leased"))
    assert finals[0]["trained"] == 8 * STEPS and finals[0]["leased"] == 0


def test_every_push_was_delivered_and_confirmed(run):
    pushes = run.events("push")
    assert [push["version"] for push in pushes] == sorted({push["version"] for push in pushes}), "versions only grow"
    assert pushes[0]["version"] == 0 and pushes[-1]["version"] == STEPS
    assert run.events("push_failed") == []
    for push in pushes:
        assert abs(push["canary_engine"] - push["canary_learner"]) < 1e-3
    assert abs(pushes[-1]["canary_engine"] - pushes[-1]["canary_base"]) > 0.1, "the engine no longer answers as the base model"


def test_engine_and_learner_agree_on_fresh_samples(run):
    assert run.summary()["logprob_compared"] >= 100
    assert run.summary()["logprob_max_abs_diff"] < 1e-4


def test_the_control_plane_answered_while_it_trained(seen, run):
    assert seen["status"]["state"] == "training"
    assert seen["status"]["actors"][0]["version"] >= 0
    assert "ftb_llm_step" in seen["metrics_text"]
    assert "/v1/config" in seen["docs"]
    assert seen["checkpoint"]


def test_the_checkpoint_that_was_asked_for_was_written(run):
    checkpoints = [event["step"] for event in run.events("checkpoint")]
    assert any(step not in (100, STEPS) for step in checkpoints)


def test_the_run_folder_is_complete(run):
    for name in ("config.json", "metrics.jsonl", "events.jsonl", "run.db", "summary.json", "report.html", "eval/first.json", "eval/last.json"):
        assert (run.path / name).is_file(), name
    assert json.loads((run.path / "config.json").read_text())["objective"]["divergence"]["name"] == "forward_kl"


def test_the_report_needs_nothing_from_outside(run):
    page = (run.path / "report.html").read_text()
    assert "<svg" in page or "data:image/png" in page
    for attribute in ('src="http', 'href="http', "@import", "url(http"):
        assert attribute not in page


def test_the_adapter_loads_in_peft_unchanged(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ftb_llm.tasks.base_model import ensure_built

    adapter = run.path / "adapters" / f"v{STEPS:06d}"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ensure_built("hypergrid")), adapter)
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_the_outcome_is_shown(run):
    output = run.output()
    assert str(run.path) in output
    assert "exact" in output.lower()

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ftb_llm.api.prometheus import render
from tests.fakes import FakeLearner, make_run

STATUS: dict[str, Any] = {
    "run": 'a "quoted" run',
    "state": "training",
    "step": 12,
    "max_steps": 400,
    "policy_version": 8,
    "config_version": 2,
    "objective": {"kind": "ftb", "divergence": "hellinger", "alpha": None, "beta": 0.5, "tempered": False},
    "actors": [
        {"name": "generator-0", "version": 8, "push_pause_ms": None, "groups_in_flight": 4, "tokens_per_second": 900.0},
        {"name": "generator-1", "version": 4, "push_pause_ms": 91.5, "groups_in_flight": 0, "tokens_per_second": None},
    ],
    "buffer": {"groups": 3, "capacity": 32},
    "staleness": {"mean": None, "max": 4, "min": 1, "limit": None},
    "throughput": {"generate_tokens_per_second": 900.0, "learn_tokens_per_second": None, "steps_per_second": 1.5},
    "accounting": {"generated": 20, "trained": 11, "dropped_stale": 1, "rejected": 2, "buffered": 3, "leased": 3, "reasons": {"nan": 2}},
}
ROW = {
    "step": 12,
    "objective": {"kind": "ftb"},
    "reward/mean": 0.75,
    "reward/std": None,
    "divergence/estimate/hellinger": 0.1,
    "divergence/estimate/tv": 0.2,
    "divergence/stderr/tv": 0.05,
    "divergence/ess/tv": 250.0,
    "divergence/cosine/hellinger:tv": 0.875,
    "perf/queue_groups": 3,
    "off_policy/staleness_max": 4,
    "eval/exact_tv": 0.04,
}


def samples(status: dict[str, Any], row: dict[str, Any]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(render(status, row).decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def labelled(name: str, /, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"ftb_llm_{name}", frozenset(labels.items())


def test_numbers_of_the_run() -> None:
    found = samples(STATUS, ROW)
    assert found[labelled("step")] == 12
    assert found[labelled("buffer_groups")] == 3
    assert found[labelled("reward_mean")] == 0.75
    assert found[labelled("eval_exact_tv")] == 0.04
    assert found[labelled("perf_queue_groups")] == 3
    assert found[labelled("staleness_max_steps")] == 4
    assert found[labelled("info", run='a "quoted" run', divergence="hellinger")] == 1


def test_labels() -> None:
    found = samples(STATUS, ROW)
    assert found[labelled("groups_total", state="trained")] == 11
    assert found[labelled("groups_lost_total", reason="nan")] == 2
    assert found[labelled("actor_version", actor="generator-1")] == 4
    assert found[labelled("divergence", name="hellinger", quantity="estimate")] == 0.1
    assert found[labelled("divergence", name="tv", quantity="estimate")] == 0.2
    assert found[labelled("divergence", name="tv", quantity="stderr")] == 0.05
    assert found[labelled("divergence", name="tv", quantity="ess")] == 250
    assert found[labelled("divergence_cosine", a="hellinger", b="tv")] == 0.875
    assert found[labelled("state", state="training")] == 1
    assert sum(value for (name, _), value in found.items() if name == "ftb_llm_state") == 1


def test_what_is_not_known_is_left_out() -> None:
    found = samples(STATUS, ROW)
    for missing in (
        labelled("staleness_mean_steps"),
        labelled("staleness_limit_steps"),
        labelled("learn_tokens_per_second"),
        labelled("reward_std"),
        labelled("actor_push_pause_ms", actor="generator-0"),
        labelled("actor_tokens_per_second", actor="generator-1"),
    ):
        assert missing not in found


def test_before_the_first_step_there_is_no_row() -> None:
    found = samples({**STATUS, "actors": [], "accounting": {**STATUS["accounting"], "reasons": {}}}, {})
    assert found[labelled("step")] == 12
    assert not any(name in ("ftb_llm_divergence", "ftb_llm_divergence_cosine", "ftb_llm_actor_version", "ftb_llm_groups_lost_total") for name, _ in found)


async def test_a_real_run_shows_the_newest_value_of_every_metric(tmp_path) -> None:
    """The exact numbers are in one row of three here, and in every scrape."""
    settings = {
        "run": {"max_steps": 5},
        "sampling": {"group_size": 2},
        "buffer": {"capacity_groups": 4},
        "learner": {"groups_per_step": 2},
        "eval": {"every_steps": 3},
    }
    scraped: list[str] = []
    run = make_run(tmp_path / "run", settings, learner=FakeLearner(lambda request: scraped.append(run.metrics_text().decode())))
    await run.run()
    found = [[line.split()[1] for line in text.splitlines() if line.startswith("ftb_llm_eval_exact_tv ")] for text in scraped]
    assert found == [["0.8"], ["0.8"], ["0.8"], ["0.2"], ["0.2"]]
    assert "ftb_llm_reward_mean 0.5" in run.metrics_text().decode().splitlines()

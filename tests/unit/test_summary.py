import json
import tracemalloc

from ftb_llm.config import Config, build_config
from ftb_llm.run_dir import RunDir
from ftb_llm.summary import configured, objective_changes, summarise, switch_steps


def make_row(step, **metrics):
    return {
        "step": step,
        "reward/mean": float(step),
        "time/step_seconds": 0.5,
        "off_policy/staleness_mean": 2.0,
        "perf/generate_tokens_per_second": 10.0,
        "perf/learn_tokens_per_second": 20.0,
        **metrics,
    }


def trained(step, divergence, *, version=1, **changes):
    objective = {"kind": "ftb", "divergence": divergence, "alpha": None, "beta": 0.5, "tempered": False} | changes
    return make_row(step, config_version=version, objective=objective)


def summary_of(tmp_path, rows, events=(), config=None):
    run_dir = RunDir.create(tmp_path / "run")
    for row in rows:
        run_dir.append_metrics(row)
    for event in events:
        run_dir.append_event(event.pop("kind"), "", step=0, **event)
    return summarise(run_dir, config or Config(), state="finished", accounting={"generated": 4}, facts={"peak_rss_gib": 2.5})


def test_exact_numbers_come_from_the_first_and_last_evaluation(tmp_path):
    rows = [
        {"step": 0, "eval/exact_tv": 0.8, "eval/reward": 0.1},
        make_row(1),
        make_row(2, **{"eval/exact_tv": 0.04, "eval/reward": 1.9, "eval/target_reward": 2.0, "eval/modes_found": 16.0, "eval/modes_total": 16.0}),
    ]
    summary = summary_of(tmp_path, rows)
    assert (summary["exact_tv_start"], summary["exact_tv_end"]) == (0.8, 0.04)
    assert (summary["reward_start"], summary["reward_end"], summary["target_reward"]) == (0.1, 1.9, 2.0)
    assert summary["train_seconds"] == 1.0 and summary["steps"] == 2 and summary["mean_staleness_steps"] == 2.0
    assert summary["peak_rss_gib"] == 2.5 and summary["accounting"] == {"generated": 4}


def test_without_an_oracle_rewards_are_sampled_and_the_rest_is_null(tmp_path):
    summary = summary_of(tmp_path, [make_row(step) for step in range(1, 41)])
    assert summary["exact_tv_end"] is None and summary["target_reward"] is None
    assert summary["reward_start"] == 5.5 and summary["reward_end"] == 35.5


def test_pushes_are_summed_up_from_their_events(tmp_path):
    events = [
        {"kind": "push", "pause_ms": pause, "byte_count": 100, "canary_engine": -2.0, "canary_learner": -2.0 + offset}
        for pause, offset in ((10.0, 0.0), (30.0, 1e-5), (20.0, -2e-5))
    ]
    summary = summary_of(tmp_path, [make_row(1)], [*events, {"kind": "push_failed"}])
    assert (summary["push_pause_ms_p50"], summary["push_pause_ms_max"], summary["push_bytes"]) == (20.0, 30.0, 100)
    assert abs(summary["canary_max_abs_diff"] - 2e-5) < 1e-9
    assert (summary["pushes"], summary["pushes_failed"]) == (3, 1)


def test_an_empty_run_has_a_summary_too(tmp_path):
    summary = summary_of(tmp_path, [])
    assert summary["steps"] == 0 and summary["train_seconds"] == 0 and summary["push_pause_ms_p50"] is None and summary["reward_end"] is None
    assert summary["shadow_share"] is None


def test_the_share_of_the_shadow_divergences_is_of_the_learners_time(tmp_path):
    timed = {"time/learn_seconds": 0.25, "time/divergence_seconds": 0.0}
    rows = [make_row(1, **timed), make_row(2, **timed | {"time/divergence_seconds": 0.0625}), make_row(3)]
    assert summary_of(tmp_path, rows)["shadow_share"] == 0.125


def test_the_divergence_is_every_one_that_was_in_force(tmp_path):
    rows = [trained(1, "forward_kl"), trained(2, "forward_kl", version=2), trained(3, "tv", version=2), trained(4, "tv", version=3, tempered=True)]
    assert summary_of(tmp_path / "one", rows[:2])["divergence"] == "forward_kl"
    assert summary_of(tmp_path / "all", rows)["divergence"] == "forward_kl, then tv from step 3, then tv, tempered from step 4"
    assert summary_of(tmp_path / "grpo", [trained(1, "tv", kind="grpo")])["divergence"] == "grpo"


def test_many_changes_of_the_divergence_are_still_a_line(tmp_path):
    names = ("tv", "js")
    rows = [trained(step, names[step % 2], version=step) for step in range(1, 1001)]
    expected = "js, then tv from step 2, then js from step 3, then tv from step 4, then 995 changes more, then tv from step 1000"
    assert summary_of(tmp_path, rows)["divergence"] == expected
    schedule = [{"step": step, "name": names[step % 2]} for step in range(1, 1001)]
    told = configured(build_config({"objective": {"divergence": {"schedule": schedule}}}).objective)
    assert told == "reverse_kl, then js from step 1, then tv from step 2, then js from step 3, then 996 changes more, then tv from step 1000"


def test_an_alpha_that_drifts_along_its_ramp_is_no_change():
    rows = [
        trained(step, "alpha", alpha=alpha, version=version) for step, alpha, version in ((1, 0.5, 1), (2, 0.75, 1), (3, 1.5, 2), (4, 1.75, 2), (5, 0.25, 2))
    ]
    assert objective_changes(rows, {3}) == [(1, "alpha 0.5"), (3, "alpha 1.5")]
    assert objective_changes([{"step": 0}, *rows], {3, 5}) == [(1, "alpha 0.5"), (3, "alpha 1.5"), (5, "alpha 0.25")]


def test_before_the_first_step_the_divergence_is_what_the_config_says(tmp_path):
    ramp = {"name": "alpha", "alpha": {"from": 0.75, "to": 1.25, "over": 300}, "schedule": [{"step": 400, "name": "custom"}]}
    config = build_config({"objective": {"divergence": ramp, "custom": "my:member", "tempered": True, "log_z": "learned"}})
    expected = "alpha 0.75 to 1.25 over 300 steps, then custom my:member from step 400, tempered, learned log Z"
    assert summary_of(tmp_path, [], config=config)["divergence"] == expected


def test_only_a_change_of_the_divergence_itself_is_a_switch() -> None:
    versions = [
        {"effective_step": 1, "changed": {}},
        {"effective_step": 105, "changed": {"objective.divergence.alpha": [None, 1]}},
        {"effective_step": 106, "changed": {"learner.learning_rate": [1, 2]}},
    ]
    assert switch_steps({"divergence": {"schedule": [{"step": 7, "name": "tv"}]}}, versions) == {7, 105}


def test_a_push_failure_that_stands_for_many_counts_as_many(tmp_path):
    events = [{"kind": "push_failed"}, {"kind": "push_failed", "times": 40}, {"kind": "push_failed", "times": 3}]
    assert summary_of(tmp_path, [make_row(1)], events)["pushes_failed"] == 44


def test_the_whole_time_is_that_of_all_processes(tmp_path):
    """100 s of a run that was killed, 30 s of one that was stopped, and the present one, which took 50 s."""
    run_dir = RunDir.create(tmp_path / "run")
    times = [
        ("starting", 1000.0),
        ("started", 1040.0),
        ("checkpoint", 1100.0),
        ("starting", 5000.0),
        ("finished", 5030.0),
        ("config_change", 9000.0),
        ("starting", 9001.0),
        ("finished", 9050.0),
    ]
    lines = []
    for kind, time in times:
        row = {"kind": kind, "time": time, "step": 0, "message": ""}
        lines.append(json.dumps(row | ({"source": "resume", "changed": {}, "effective_step": 1} if kind == "config_change" else {})))
    (tmp_path / "run" / "events.jsonl").write_text("\n".join(lines) + "\n")
    facts = {"total_seconds": 50.0}
    summary = summarise(run_dir, Config(), state="finished", accounting={}, facts=facts)
    assert summary["total_seconds"] == 180.0
    assert summarise(run_dir, Config(), state="finished", accounting={}, facts={})["total_seconds"] is None


def test_a_long_run_is_summed_up_in_little_memory(tmp_path):
    run_dir = RunDir.create(tmp_path / "run")
    row = trained(1, "tv") | {f"divergence/estimate/m{number}": number / 7 for number in range(100)}
    with (tmp_path / "run" / "metrics.jsonl").open("w") as file:
        for step in range(1, 5001):
            file.write(json.dumps(row | {"step": step}) + "\n")
    tracemalloc.start()
    summary = summarise(run_dir, Config(), state="finished", accounting={}, facts={})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary["steps"] == 5000 and summary["train_seconds"] == 2500.0
    assert peak < 1_000_000 < (tmp_path / "run" / "metrics.jsonl").stat().st_size / 10

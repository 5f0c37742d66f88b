from ftb_llm.config import Config
from ftb_llm.run_dir import RunDir
from ftb_llm.summary import summarise


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


def summary_of(tmp_path, rows, events=()):
    run_dir = RunDir.create(tmp_path / "run")
    for row in rows:
        run_dir.append_metrics(row)
    for event in events:
        run_dir.append_event(event.pop("kind"), "", step=0, **event)
    return summarise(run_dir, Config(), state="finished", accounting={"generated": 4}, facts={"peak_rss_gib": 2.5})


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

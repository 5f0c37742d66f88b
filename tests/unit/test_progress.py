"""The progress display, fed with status dicts."""

import io
import json
import re
import time
from typing import Any

import pytest

from ftb_llm.panel import duration, panel_lines
from ftb_llm.progress import LiveProgress, PlainProgress, compact, make_progress, plain_line, status_rows
from ftb_llm.types import ObjectiveSpec


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def status(step: int = 120, **changes: Any) -> dict[str, Any]:
    return {
        "run": "hypergrid-1",
        "state": "training",
        "step": step,
        "max_steps": 400,
        "started_time": time.time() - 62,
        "policy_version": 118,
        "config_version": 3,
        "objective": {"kind": "ftb", "divergence": "alpha", "alpha": 0.5, "beta": 0.5, "tempered": True},
        "actors": [{"name": "generator-0", "state": "serving", "version": 116, "push_pause_ms": 91.3, "groups_in_flight": 8, "tokens_per_second": 3123.0}],
        "buffer": {"groups": 12, "capacity": 32},
        "staleness": {"mean": 4.24, "max": 9, "min": 1, "limit": 16},
        "throughput": {"generate_tokens_per_second": 3123.0, "learn_tokens_per_second": 2987.0, "steps_per_second": 2.0},
        "divergences": {},
        "optim": {"loss": 0.01234, "grad_norm": 0.451, "learning_rate": 0.003},
        "reward": {"mean": 1.931},
        "eval": {"exact_tv": 0.0812, "target_reward": 2.024, "modes_found": 15, "modes_total": 16},
        "accounting": {"generated": 1000, "trained": 960, "dropped_stale": 0, "rejected": 20, "buffered": 12, "leased": 8, "reasons": {}},
        "last_error": None,
        "url": "http://127.0.0.1:8000",
        "run_dir": "runs/hypergrid-1",
    } | changes


BARE = {
    "state": "starting",
    "started_time": None,
    "optim": {},
    "reward": {},
    "eval": {},
    "actors": [{"name": "generator-0", "state": "starting", "version": None, "push_pause_ms": None, "groups_in_flight": 0, "tokens_per_second": None}],
    "staleness": {"mean": None, "max": None, "min": None, "limit": None},
    "throughput": {"generate_tokens_per_second": None, "learn_tokens_per_second": None, "steps_per_second": None},
    "url": None,
}


def test_the_plain_line() -> None:
    expected = "step 120/400  reward 1.93 (target 2.02)  exact_tv 0.081  staleness 4.2 steps  queue 12/32 groups  gen 3.1k tok/s  learn 3.0k tok/s"
    assert plain_line(status()) == expected


def test_a_run_that_knows_nothing_yet() -> None:
    assert plain_line(status(0, **BARE)) == "step 0/400  starting  queue 12/32 groups  gen - tok/s  learn - tok/s"
    rows = dict(status_rows(status(0, **BARE)))
    assert rows["generator-0"] == "starting, no version, 0 groups in flight, - tok/s"
    assert not {"time", "training", "reward", "exact TV", "modes", "staleness", "control", "last error"} & set(rows)


def test_status_rows() -> None:
    rows = dict(status_rows(status(last_error="canary failed")))
    assert rows["objective"] == "alpha 0.5, tempered, beta 0.5"
    assert rows["time"] == "1:02"
    assert rows["training"] == "loss 0.01234, gradient norm 0.451, learning rate 0.003"
    assert rows["reward"] == "1.931 (target 2.02)"
    assert rows["modes"] == "15 of 16 found"
    assert rows["staleness"] == "mean 4.2, max 9 steps (limit 16)"
    assert rows["generator-0"] == "serving, version 116, 8 groups in flight, 3.1k tok/s, last push paused 91 ms"
    assert rows["last error"] == "canary failed"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "hellinger"),
        ({"tempered": True, "log_z": "learned"}, "hellinger, tempered, learned log Z"),
        ({"divergence": "alpha", "alpha": 0.75}, "alpha 0.75"),
        ({"divergence": "tv", "width": 0.1}, "tv of width 0.1"),
        ({"divergence": "custom", "custom": "my:member"}, "custom my:member"),
        ({"kind": "importance"}, "importance of hellinger"),
        ({"kind": "ppo_clip"}, "ppo_clip"),
        ({"kind": "grpo"}, "grpo"),
        ({"kind": "reinforce"}, "reinforce"),
    ],
)
def test_the_objective_is_named_for_what_trains(changes: dict[str, Any], expected: str) -> None:
    objective = {"kind": "ftb", "divergence": "hellinger", "alpha": None, "beta": 0.5, "tempered": False} | changes
    assert ObjectiveSpec(**objective).text == expected
    assert dict(status_rows(status(objective=objective)))["objective"] == f"{expected}, beta 0.5"


def steps_shown(stream: io.StringIO) -> list[str]:
    return [line.split("  ")[0] for line in stream.getvalue().splitlines()]


def test_plain_progress_prints_every_so_many_steps_and_the_last_one() -> None:
    stream = io.StringIO()
    with make_progress("plain", 25, stream, every_steps=10) as progress:
        for step in range(1, 26):
            progress.update(status(step, max_steps=25))
    assert steps_shown(stream) == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]


def test_plain_progress_prints_each_change_of_state() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_steps=100)
    for state in ("starting", "starting", "training", "training", "stopping", "stopped"):
        progress.update(status(3, state=state))
    assert [line.split("  ")[1] for line in stream.getvalue().splitlines()] == ["starting", "reward 1.93 (target 2.02)", "stopping", "stopped"]


def test_steps_that_jump_over_the_mark_are_shown() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, every_steps=10)
    for step in (8, 13, 17, 31):
        progress.update(status(step))
    assert steps_shown(stream) == ["step 8/400", "step 13/400", "step 31/400"]


def last_panel(stream: io.StringIO) -> list[str]:
    """The lines of the panel as it was drawn last, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "")
    return text[text.rindex("╭") :].splitlines()


@pytest.fixture
def small_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


SWAP = "config_change: config version 3 from step 121 on (cli): objective.divergence.name reverse_kl -> hellinger, objective.beta 0.5 -> 0.25"


def test_the_live_panel_shows_the_run_and_leaves_the_cursor_visible() -> None:
    stream = Terminal()
    with make_progress("auto", 400, stream) as progress:
        assert isinstance(progress, LiveProgress)
        progress.update(status(120))
        progress.line("config version 3 from step 121 [bold]not markup")
        progress.update(status(140))
    shown = stream.getvalue()
    for text in ("hypergrid-1 · training", "step 140/400", "mean 4.2, max 9 steps", "generator-0", "[bold]not markup", "1:02 elapsed", " left"):
        assert text in shown, text
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_panel_begins_with_the_first_status_and_what_comes_before_is_lines() -> None:
    stream = Terminal()
    with make_progress("live", 400, stream) as progress:
        progress.line("control plane at http://127.0.0.1:8000, its API page at http://127.0.0.1:8000/docs [bold]not markup")
        assert "╭" not in stream.getvalue()
        progress.update(status(700, max_steps=1075, state="starting"))
    assert "control plane at http://127.0.0.1:8000, its API page at http://127.0.0.1:8000/docs [bold]not markup\n" in stream.getvalue()
    assert "step 0/" not in stream.getvalue()
    assert "step 700/1075" in last_panel(stream)[1]


def test_a_start_that_fails_leaves_no_panel() -> None:
    stream = Terminal()
    with make_progress("live", 400, stream) as progress:
        progress.line("a remark")
    assert stream.getvalue() == "a remark\n"


@pytest.mark.parametrize("state", ["stopping", "stopped", "finished", "failed"])
def test_nothing_is_left_of_a_run_that_is_ending(state: str) -> None:
    stream = Terminal()
    with make_progress("live", 400, stream) as progress:
        progress.update(status(120))
        progress.update(status(140))
        progress.update(status(140, state=state))
    assert " left" not in "".join(last_panel(stream))
    assert "elapsed" in last_panel(stream)[1]


def test_on_a_small_terminal_the_newest_events_are_whole_and_facts_give_way(small_terminal: Terminal) -> None:
    with make_progress("live", 400, small_terminal) as progress:
        progress.update(status(120, last_error="generator-0: push of version 118 took longer than actors.push_timeout_seconds 60"))
        for step in range(8):
            progress.line(f"checkpoint: checkpoint of step {step} in runs/hypergrid-1/checkpoints/step_{step:08d}")
        progress.line(SWAP)
        progress.update(status(121, last_error="generator-0: push of version 118 took longer than actors.push_timeout_seconds 60"))
    panel = last_panel(small_terminal)
    assert len(panel) <= 23
    assert {len(line) for line in panel} == {80}
    text = " ".join(" ".join(line.strip("│ ") for line in panel).split())
    assert SWAP in text
    assert "checkpoint of step 7" in text
    assert "http://127.0.0.1:8000 " in text
    assert "took longer than actors.push_timeout_seconds 60" in text
    assert "training loss 0.01234, gradient norm 0.451, learning rate 0.003" in text
    assert "run folder" not in text


@pytest.mark.parametrize("height", [0, 1, 3, 8, 19, 40])
@pytest.mark.parametrize("width", [20, 76, 200])
def test_a_panel_is_never_larger_than_its_terminal(width: int, height: int) -> None:
    many = [{"name": f"generator-{index}", **{key: value for key, value in status()["actors"][0].items() if key != "name"}} for index in range(12)]
    lines = panel_lines(status_rows(status(actors=many)), [SWAP, "short", SWAP], width=width, height=height)
    assert len(lines) <= max(height, 0)
    if height >= 8 and width >= 76:
        shown = " ".join(line.text.strip() for line in lines if line.is_event)
        assert shown.endswith(SWAP)


def test_auto_is_plain_where_there_is_no_terminal() -> None:
    assert isinstance(make_progress("auto", 400, io.StringIO()), PlainProgress)


def test_json_progress_is_one_line_per_status() -> None:
    stream = io.StringIO()
    progress = make_progress("json", 400, stream)
    progress.update(status(1))
    progress.line("a remark")
    progress.update(status(2))
    assert [json.loads(line)["step"] for line in stream.getvalue().splitlines()] == [1, 2]


def test_off_shows_nothing_but_remembers_the_status() -> None:
    stream = io.StringIO()
    with make_progress("off", 400, stream) as progress:
        progress.line("a remark")
        progress.update(status(5))
    assert stream.getvalue() == ""
    assert progress.status["step"] == 5


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is wrong"):
        make_progress("loud", 400, io.StringIO())


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.4, "0"), (999.4, "999"), (3120, "3.1k"), (999_949, "999.9k"), (2_500_000, "2.5M")])
def test_compact(value: float | None, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3700, "1:01:40")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("mode", ["plain", "json"])
def test_a_reader_who_has_gone_ends_no_run(mode: str) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = make_progress(mode, 10, Gone(), every_steps=1)
    progress.line("a remark")
    progress.update(status(7))
    assert progress.status["step"] == 7

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from ftb_llm.bench.quickstart import Job, passed_on, plan, quickstart_table, run_jobs
from ftb_llm.config import load_config
from ftb_llm.errors import FtbError, InvalidConfig, SetupError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SUMMARY = {
    "state": "finished",
    "task": "hypergrid",
    "steps": 400,
    "exact_tv_start": 0.77,
    "exact_tv_end": 0.0312,
    "reward_start": 0.2,
    "reward_end": 2.01,
    "target_reward": 2.05,
    "modes_found": 16.0,
    "modes_total": 16.0,
    "mean_staleness_steps": 5.0,
    "train_seconds": 66.4,
    "total_seconds": 99.0,
}


class Train:
    """Writes what a run would leave behind."""

    def __init__(self, *, code: int = 0, state: str = "finished") -> None:
        self.calls: list[list[str]] = []
        self._code, self._state = code, state

    def __call__(self, words: Sequence[str]) -> int:
        self.calls.append(list(words))
        if words[0] == "--resume":
            folder = Path(words[1])
        else:
            config = load_config([words[0]])
            folder = Path(config.run.dir) / str(config.run.name)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(config.model_dump_json())
        (folder / "summary.json").write_text(json.dumps(SUMMARY | {"state": self._state}))
        return self._code


def jobs(folder: Path, *names: str) -> list[Job]:
    settings = {"tv": ["run.max_steps=9", "learner.learning_rate=0.001"]}
    return plan(QUICKSTART, names, lambda name: settings.get(name, ["run.max_steps=9"]), folder=folder)


def quiet(line: str) -> None:
    assert line


def test_each_objective_runs_with_its_own_settings(tmp_path: Path) -> None:
    train = Train()
    rows = list(run_jobs(jobs(tmp_path, "hellinger", "alpha:0.75", "tv"), train=train, say=quiet))
    configs = [load_config([words[0]]) for words in train.calls]
    assert [(config.objective.divergence.name, config.objective.divergence.alpha) for config in configs] == [
        ("hellinger", None),
        ("alpha", 0.75),
        ("tv", None),
    ]
    assert [config.learner.learning_rate for config in configs] == [0.003, 0.003, 0.001]
    assert {config.run.max_steps for config in configs} == {9}
    assert {config.actors.push_every_steps for config in configs} == {4}  # as the file says
    assert [(row["name"], row["learning_rate"], row["exact_tv_end"]) for row in rows] == [
        ("hellinger", 0.003, 0.0312),
        ("alpha:0.75", 0.003, 0.0312),
        ("tv", 0.001, 0.0312),
    ]


def test_a_finished_run_is_not_run_again_and_a_broken_one_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(jobs(tmp_path, "hellinger", "tv"), train=Train(code=130, state="stopped"), say=quiet))
    train = Train()
    rows = list(run_jobs(jobs(tmp_path, "hellinger", "tv"), train=train, say=quiet))
    assert train.calls[0] == ["--resume", rows[0]["run_dir"]]
    assert len(train.calls) == 2
    again = Train()
    assert list(run_jobs(jobs(tmp_path, "hellinger", "tv"), train=again, say=quiet)) == rows
    assert again.calls == []


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    first, second = (plan(QUICKSTART, ["js"], lambda _, beta=beta: [f"objective.beta={beta}"], folder=tmp_path)[0] for beta in (0.3, 0.4))
    assert first.run_dir != second.run_dir


def test_a_failed_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FtbError, match=r"^js: ftb-llm train ended with exit code 1$"):
        list(run_jobs(jobs(tmp_path, "js"), train=Train(code=1, state="failed"), say=quiet))


def test_a_run_that_was_stopped_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FtbError, match=r"^js: the run .* is stopped, not finished; start the bench again to go on with it$"):
        list(run_jobs(jobs(tmp_path, "js"), train=Train(state="stopped"), say=quiet))


def test_a_wrong_setting_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"^sampling\.temperature: "):
        plan(QUICKSTART, ["hellinger"], lambda _: ["sampling.temperature=9"], folder=tmp_path)


def test_the_table_tells_what_the_runs_reached(tmp_path: Path) -> None:
    table = quickstart_table(list(run_jobs(jobs(tmp_path, "tv"), train=Train(), say=quiet)))
    assert table.title == "Final exact TV of the real run, hypergrid"
    assert table.rows[1] == ["tv", "0.001", "0.770", "0.0312", "2.010 (2.050)", "16 of 16", "66"]


def test_a_task_without_an_oracle_has_dashes(tmp_path: Path) -> None:
    class Without(Train):
        def __call__(self, words: Sequence[str]) -> int:
            code = super().__call__(words)
            (summary,) = tmp_path.glob("*/summary.json")
            missing = dict.fromkeys(("exact_tv_start", "exact_tv_end", "target_reward", "modes_found", "modes_total"))
            summary.write_text(json.dumps(SUMMARY | missing))
            return code

    table = quickstart_table(list(run_jobs(jobs(tmp_path, "tv"), train=Without(), say=quiet)))
    assert table.rows[1] == ["tv", "0.001", "–", "–", "2.010 (–)", "– of –", "66"]


def test_a_folder_that_can_not_be_written_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    train = Train()
    with pytest.raises(SetupError, match=f"^--out: {tmp_path / 'file' / 'x'} can't be written: Not a directory$"):
        list(run_jobs(jobs(tmp_path / "file" / "x", "tv"), train=train, say=quiet))
    assert train.calls == []


def test_a_row_names_no_divergence_where_it_plays_no_part(tmp_path: Path) -> None:
    rows = list(run_jobs(jobs(tmp_path, "grpo", "importance:alpha:0.5"), train=Train(), say=quiet))
    assert [(row["objective"], row["divergence"], row["alpha"]) for row in rows] == [("grpo", None, None), ("importance", "alpha", 0.5)]


def test_ctrl_c_is_passed_on_and_the_exit_code_awaited() -> None:
    """The child stands in a session of its own, so a terminal's Ctrl-C reaches it through us alone."""
    script = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"
    before = signal.getsignal(signal.SIGINT)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) as process, passed_on(process):
        assert process.stdout is not None
        process.stdout.readline()
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        assert process.wait(timeout=60) == 7
    assert signal.getsignal(signal.SIGINT) is before

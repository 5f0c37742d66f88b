"""The quickstart once per divergence: the real `ftb-llm train`, one run after the other."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftb_llm.bench.spec import fingerprint, objective_columns, objective_settings
from ftb_llm.bench.tables import NONE, Table
from ftb_llm.bench.trials import writing
from ftb_llm.config import Config
from ftb_llm.config.load import build_config, merge, parse_override, read_yaml
from ftb_llm.errors import FtbError

INTERRUPTED = 130
FROM_SUMMARY = (
    "exact_tv_start",
    "exact_tv_end",
    "reward_start",
    "reward_end",
    "target_reward",
    "modes_found",
    "modes_total",
    "mean_staleness_steps",
    "train_seconds",
    "total_seconds",
)
Row = dict[str, Any]
Train = Callable[[Sequence[str]], int]  # words after `ftb-llm train`; returns the exit code


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: its name says which settings it has, so that it is found again."""

    objective: str
    tree: dict[str, Any]
    folder: Path  # that holds the run folders

    @property
    def run_dir(self) -> Path:
        return self.folder / f"{self.objective.replace(':', '-').replace('+', '-')}-{fingerprint(self.tree)[:8]}"

    def config(self) -> Config:
        return build_config(merge(self.tree, {"run": {"name": self.run_dir.name, "dir": str(self.folder)}}))


def plan(config_file: str | Path, objectives: Sequence[str], settings: Callable[[str], Sequence[str]], *, folder: Path) -> list[Job]:
    """A checked job per objective; `settings` gives its KEY=VALUE words."""
    jobs = []
    for objective in objectives:
        # The divergence is replaced, not merged: what the file says of another member does not go with this one.
        tree = merge(read_yaml(config_file), {"objective": {"divergence": None}})
        tree = merge(tree, {"objective": objective_settings(objective)})
        for word in settings(objective):
            tree = merge(tree, parse_override(word))
        jobs.append(Job(objective=objective, tree=tree, folder=folder))
    for job in jobs:
        job.config()
    return jobs


def run_jobs(jobs: Sequence[Job], *, train: Train, say: Callable[[str], None]) -> Iterator[Row]:
    """Each run's row as it ends. One that is finished in the folder is not run again, one that was broken off goes on."""
    for count, job in enumerate(jobs, start=1):
        summary = read_summary(job.run_dir)
        if summary.get("state") != "finished":
            words = words_for(job)
            say(f"{count}/{len(jobs)} {job.objective}: {job.run_dir}")
            code = train(words)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code != 0:
                raise FtbError(f"{job.objective}: ftb-llm train ended with exit code {code}")
            summary = read_summary(job.run_dir)
            if (state := summary.get("state")) != "finished":
                raise FtbError(f"{job.objective}: the run {job.run_dir} is {state}, not finished; start the bench again to go on with it")
        yield row_of(job, summary)


def words_for(job: Job) -> list[str]:
    """What `ftb-llm train` is told: the settings as one file, or to go on."""
    if (job.run_dir / "config.json").is_file():
        return ["--resume", str(job.run_dir)]
    file = job.folder / f"{job.run_dir.name}.yaml"
    with writing(job.folder):
        file.write_text(job.config().model_dump_json(indent=2), encoding="utf-8")  # JSON is YAML
    return [str(file)]


def read_summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def row_of(job: Job, summary: dict[str, Any]) -> Row:
    config = job.config()
    row = {
        "task": summary["task"],
        **objective_columns(config.objective),
        "name": job.objective,
        "seed": config.run.seed,
        "steps": summary["steps"],
        "learning_rate": config.learner.learning_rate,
    }
    return row | {name: summary[name] for name in FROM_SUMMARY} | {"run_dir": str(job.run_dir)}


def quickstart_table(rows: Sequence[Row]) -> Table:
    """The runs' first and last numbers; a task without an oracle has no exact ones."""
    header = ["objective", "learning rate", "exact TV at start", "at end", "reward (target)", "modes found", "seconds"]
    body = [
        [
            row["name"],
            f"{row['learning_rate']:g}",
            _number(row["exact_tv_start"], ".3f"),
            _number(row["exact_tv_end"], ".4f"),
            f"{_number(row['reward_end'], '.3f')} ({_number(row['target_reward'], '.3f')})",
            f"{_number(row['modes_found'], 'g')} of {_number(row['modes_total'], 'g')}",
            _number(row["train_seconds"], ".0f"),
        ]
        for row in rows
    ]
    return Table(title=f"Final exact TV of the real run, {rows[0]['task']}", rows=[header, *body])


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def train_in_a_process(words: Sequence[str]) -> int:
    """`ftb-llm train` in a process of its own; Ctrl-C reaches it once, as if it stood alone, and its exit code is awaited."""
    command = [sys.executable, "-m", "ftb_llm.cli.main", "train", *words]
    with subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as process, passed_on(process):
        return process.wait()


@contextmanager
def passed_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Signals that ask this process to end go to that one."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What the disk, the network's users and our own mistakes do to a run: the real controller over fakes."""

import asyncio
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftb_llm import line_file, run_dir
from ftb_llm.api.models import Status
from ftb_llm.controller import Controller
from ftb_llm.errors import InvalidConfig, WrongState
from ftb_llm.generation import Generation
from ftb_llm.run_dir import RunDir
from ftb_llm.state import GeneratorPhase, Phase
from tests.fakes import FakeGenerator, FakeLearner, FakeProgress, make_run

SETTINGS = {
    "run": {"max_steps": 6},
    "sampling": {"group_size": 2},
    "actors": {"groups_in_flight": 2, "push_every_steps": 2, "push_retry_seconds": 0.1},
    "buffer": {"capacity_groups": 4},
    "learner": {"groups_per_step": 2, "warmup_steps": 1},
    "eval": {"every_steps": 3},
    "checkpoint": {"every_steps": 4},
}
BETA = {"objective": {"beta": 0.1}}


async def to_end(run: Controller) -> Controller:
    async with asyncio.timeout(30):
        await run.run()
    return run


def events(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in RunDir(path).events() if event["kind"] in kinds]


class Disk:
    """While it is `broken`, reports can be neither appended to nor replaced; checkpoints and run.db are elsewhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.broken = False
        self._number = number
        monkeypatch.setattr(line_file.os, "write", self._or_error(os.write))
        monkeypatch.setattr(run_dir.os, "fsync", self._or_error(os.fsync))

    def _or_error(self, works: Any) -> Any:
        def call(*values: Any) -> Any:
            if self.broken:
                raise OSError(self._number, os.strerror(self._number))
            return works(*values)

        return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE])
async def test_a_run_outlives_reports_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    disk, progress, seen = Disk(monkeypatch, number), FakeProgress(), []

    def on_step(request: Any) -> None:
        disk.broken = request.step in (2, 3, 4)
        seen.append(run.status()["reports"])

    run = await to_end(run := make_run(tmp_path / "run", SETTINGS, learner=FakeLearner(on_step), progress=progress))
    assert run.state.phase is Phase.FINISHED
    assert [row["step"] for row in RunDir(tmp_path / "run").metrics()] == list(range(7))
    assert json.loads((tmp_path / "run/eval/last.json").read_text())["step"] == 6
    assert [report["ok"] for report in seen] == [True, True, False, False, False, True]
    assert seen[3]["waiting"] > seen[2]["waiting"] > 0 and os.strerror(number) in seen[2]["problem"]
    told = [event["kind"] for event in events(tmp_path / "run", "warning", "reports_back")]
    assert told == ["warning", "reports_back"]
    assert len([line for line in progress.lines if "can't be written" in line]) == 1
    assert run.status()["reports"] == {"ok": True, "waiting": 0, "lost": 0, "problem": None}
    assert len(events(tmp_path / "run", "started", "finished")) == 2


async def test_a_run_whose_reports_are_never_written_ends_well_and_says_so(tmp_path: Path) -> None:
    """/dev/full is a real full disk for whoever writes to it."""
    progress = FakeProgress()
    run = make_run(tmp_path / "run", SETTINGS, progress=progress)
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / "run" / name).symlink_to("/dev/full")
    await to_end(run)
    assert run.state.phase is Phase.FINISHED
    assert progress.lines[-1].startswith("warning: ") and "No space left on device" in progress.lines[-1]


EMFILE_SCRIPT = """
import asyncio, os, resource, sys
from pathlib import Path
from tests.fakes import FakeLearner, make_run
from tests.unit.test_controller_faults import SETTINGS

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

def on_step(request):
    if request.step == 2:  # nothing can be opened any more: the lowest free number is above the limit
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            open("/dev/null")
        except OSError as error:
            print("errno", error.errno)
    if request.step == 5:
        print("reports", run.status()["reports"]["ok"], run.status()["reports"]["problem"])
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

run = make_run(Path(sys.argv[1]), SETTINGS, learner=FakeLearner(on_step))
asyncio.run(run.run())
print("ended", run.state.phase.value)
"""


def test_a_process_out_of_file_descriptors_keeps_training(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EMFILE_SCRIPT, str(tmp_path / "run")], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [
        f"errno {errno.EMFILE}",
        "reports False eval/last.json: Too many open files",
        "ended finished",
    ], done.stderr
    assert [row["step"] for row in RunDir(tmp_path / "run").metrics()] == list(range(7))
    assert json.loads((tmp_path / "run/eval/last.json").read_text())["step"] == 6


class Patcher:
    """Patches the run as often as the loop lets it, and keeps what was promised."""

    def __init__(self) -> None:
        self.promised: list[int] = []
        self.refused: list[str] = []

    async def patch_forever(self, run: Controller) -> None:
        for number in range(1_000_000):
            try:
                version = run.ledger.patch({"objective": {"beta": 0.1 + number * 1e-7}}, if_match="*", source="test")
                self.promised.append(version.effective_step)
            except WrongState as error:
                self.refused.append(str(error))
            await asyncio.sleep(0)


@pytest.mark.parametrize("stop_at", [None, 3])
async def test_a_patch_that_is_taken_gets_its_step(tmp_path: Path, stop_at: int | None) -> None:
    learner = FakeLearner(lambda request: request.step == stop_at and run.request_stop("test"))
    run, patcher = make_run(tmp_path / "run", SETTINGS, learner=learner), Patcher()
    patching = asyncio.ensure_future(patcher.patch_forever(run))
    await to_end(run)
    patching.cancel()
    steps = [request.step for request in learner.requests]
    assert steps == list(range(1, (stop_at or 6) + 1))
    assert patcher.promised and patcher.refused
    late = [step for step in patcher.promised if step > steps[-1]]
    assert late == [] if stop_at is None else len(late) <= 2, "one may be taken in the step in which the stop comes"
    assert learner.requests[-1].config_version == max(change.version for change in run.ledger.history() if change.effective_step <= steps[-1])


async def test_a_patch_in_the_last_step_is_refused_unless_it_adds_steps(tmp_path: Path) -> None:
    refused: list[str] = []

    def on_step(request: Any) -> None:
        if request.step == 6:
            with pytest.raises(WrongState) as caught:
                run.ledger.patch(BETA, if_match="*", source="test")
            refused.append(str(caught.value))
            assert run.ledger.patch(BETA | {"run": {"max_steps": 8}}, if_match="*", source="test").effective_step == 7

    learner = FakeLearner(on_step)
    run = await to_end(run := make_run(tmp_path / "run", SETTINGS, learner=learner))
    assert refused == ["no step will follow: step 6 is the last one with run.max_steps 6; raise run.max_steps in the same patch to go on"]
    assert [request.step for request in learner.requests] == list(range(1, 9))
    assert [request.objective.beta for request in learner.requests[5:]] == [0.5, 0.1, 0.1]


async def test_after_a_stop_and_after_the_end_patches_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SETTINGS)
    run.request_stop("test")
    with pytest.raises(WrongState, match="no step will follow: the run is stopping"):
        run.ledger.patch(BETA, if_match="*", source="test")
    await to_end(run)
    with pytest.raises(WrongState, match="no step will follow: the run is stopped"):
        run.ledger.patch(BETA, if_match="*", source="test")
    assert run.ledger.current.version == 1


async def test_max_steps_lowered_while_groups_are_waited_for_ends_the_run_there(tmp_path: Path) -> None:
    class Lowering(FakeGenerator):
        async def generate(self, request: Any) -> Any:
            if run.state.step == 3 and run.ledger.current.version == 1:
                run.ledger.patch({"run": {"max_steps": 3}}, if_match="*", source="test")
            return await super().generate(request)

    learner = FakeLearner()
    run = make_run(tmp_path / "run", SETTINGS | {"buffer": {"capacity_groups": 2}}, generators=[Lowering()], learner=learner)
    await to_end(run)
    assert [request.step for request in learner.requests] == [1, 2, 3]
    accounts = run.status()["accounting"]
    assert accounts["leased"] == 0 and accounts["trained"] == 6


async def test_a_fault_of_our_own_while_a_request_is_built_ends_the_run_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Generation, number: int) -> Any:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(Generation, "request", broken)
    run = make_run(tmp_path / "run", SETTINGS)
    with pytest.raises(KeyError, match="a bug of ours") as caught:
        await to_end(run)
    assert caught.traceback[-1].name == "broken"
    assert run.state.last_error == "KeyError: 'a bug of ours'"
    assert [generator.phase for generator in run.state.generators] == [GeneratorPhase.SERVING], "no generator is blamed"
    assert events(tmp_path / "run", "actor_out") == []


async def test_an_unanswered_push_does_not_outlive_the_run(tmp_path: Path) -> None:
    class Hanging(FakeGenerator):
        async def push(self, adapter: Any, payload: Any) -> Any:
            if adapter.version == 2:
                await asyncio.Event().wait()
            return await super().push(adapter, payload)

    settings = SETTINGS | {"actors": SETTINGS["actors"] | {"push_timeout_seconds": 1}}
    run = make_run(tmp_path / "run", settings, generators=[Hanging("generator-0"), FakeGenerator("generator-1")])
    before = asyncio.all_tasks()
    await to_end(run)
    assert asyncio.all_tasks() == before
    assert run.state.phase is Phase.FINISHED
    (warning,) = events(tmp_path / "run", "push_failed")
    assert warning["message"].endswith("push of version 2 took longer than actors.push_timeout_seconds = 1")


async def test_the_status_tells_of_the_last_checkpoint_and_the_last_error(tmp_path: Path) -> None:
    asked: list[int] = []
    checkpoints: list[int | None] = []

    def on_step(request: Any) -> None:
        checkpoints.append(run.status()["last_checkpoint"])
        if request.step == 2:
            asked.append(run.request_checkpoint("test")["after_step"])
        if request.step == 3:
            run.emit("warning", "something")

    run = await to_end(run := make_run(tmp_path / "run", SETTINGS, learner=FakeLearner(on_step)))
    assert asked == [2] and checkpoints == [None, None, 2, 2, 4, 4]
    status = run.status()
    assert (status["last_checkpoint"], status["last_error"], status["last_error_step"]) == (6, "something", 2)
    (event,) = events(tmp_path / "run", "warning")
    assert status["last_error_time"] == pytest.approx(event["time"], abs=5)


async def test_a_checkpoint_asked_for_at_a_steps_end_is_the_one_that_was_promised(tmp_path: Path) -> None:
    """Asked for while step 2 is being published: its own end is too near, the next step's is promised."""
    promised: list[int] = []

    class Asking(FakeLearner):
        async def publish(self, version: int) -> Any:
            if version == 2:
                promised.append(run.request_checkpoint("test")["after_step"])
            if version == 6:
                promised.append(run.request_checkpoint("test")["after_step"])
            return await super().publish(version)

    learner = Asking()
    run = await to_end(run := make_run(tmp_path / "run", SETTINGS, learner=learner))
    assert promised == [3, 6] and learner.checkpoints == [3, 4, 6]


async def test_the_status_document_is_the_one_that_the_control_plane_describes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SETTINGS)
    for status in (run.status(), (await to_end(run)).status()):
        described = Status.model_validate(status)
        assert set(status) == set(Status.model_fields), "a field is not described, or not given"
        for actor in described.actors:
            assert not actor.model_extra
    assert run.status()["actors"][0]["version"] == 6
    fresh = make_run(tmp_path / "fresh", SETTINGS)
    assert fresh.status()["actors"][0]["version"] is None


async def test_a_resume_names_and_skips_what_is_damaged(tmp_path: Path) -> None:
    first = make_run(tmp_path / "run", SETTINGS, learner=FakeLearner(lambda request: request.step == 3 and first.request_stop("test")))
    await to_end(first)
    first._journal.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        path = tmp_path / "run" / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0], '{"st\n', *lines[1:], '{"torn": ']))
    progress = FakeProgress()
    run = make_run(tmp_path / "run", SETTINGS, progress=progress, resume_from=tmp_path / "run/checkpoints/step_000003")
    await to_end(run)
    assert [event["message"] for event in events(tmp_path / "run", "warning")] == [
        "metrics.jsonl: line 2 can't be read and is skipped",
        "events.jsonl: line 2 can't be read and is skipped",
    ]
    assert [row["step"] for row in RunDir(tmp_path / "run").metrics()] == list(range(7))
    assert all(line.endswith("}") for line in (tmp_path / "run/events.jsonl").read_text().splitlines()[2:])


async def test_a_patch_of_a_bad_value_is_still_named_before_the_state(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SETTINGS)
    for key, least in (("push_timeout_seconds", 1), ("push_retry_seconds", 0.1)):
        with pytest.raises(InvalidConfig, match=rf"actors\.{key}: 1e-09 is wrong: .* greater than or equal to {least}"):
            run.ledger.patch({"actors": {key: 1e-9}}, if_match="*", source="test")

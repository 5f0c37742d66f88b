"""Two ranks of the learner in a real Ray: they compute together, and when one dies the other is not waited for."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ftb_llm.config import Config
from ftb_llm.errors import ProcessDied, RemoteError, SetupError
from ftb_llm.remote import RemoteLearner, RemoteReference, reserved
from learner.ray_actor import LearnerActor, ReferenceActor
from learner.reference import Reference
from tests import tiny_llama

pytestmark = pytest.mark.usefixtures("local_ray")

RANKS = {"groups_per_step": 4, "micro_batch_tokens": 20, "ranks": 2, "cpus": 0.5, "sharding": "fsdp2", "collective_timeout_seconds": 10.0}
WITHIN_SECONDS = 20.0


@pytest.fixture
def actors(tmp_path: Path) -> Iterator[list[Any]]:
    config = tiny_llama.tiny_config(learner=RANKS)
    path = tiny_llama.build(tmp_path / "model")
    handles = [start(path, tmp_path, config) for _ in range(config.learner.ranks)]
    yield handles
    for handle in handles:
        ray.kill(handle)


def start(path: Path, run_dir: Path, config: Config) -> Any:
    options = LearnerActor.options(num_cpus=config.learner.cpus)  # type: ignore[attr-defined]
    return options.remote(config, model_path=path, run_dir=run_dir, prompts=tiny_llama.PROMPTS, task_name=None)


def gone(pid: int) -> bool:
    """Whether the process ends in time."""
    try:
        psutil.Process(pid).wait(timeout=WITHIN_SECONDS)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


def test_a_rank_that_dies_ends_the_group_at_once(actors: list[Any], tmp_path: Path) -> None:
    async def drive() -> list[int]:
        learner = RemoteLearner(actors)
        facts = await learner.start()
        pids = ray.get([actor.info.remote() for actor in actors])
        assert [(fact["rank"], fact["threads"]) for fact in pids] == [(0, 1), (1, 1)]
        assert facts["rss_bytes"] > 1.5 * pids[0]["rss_bytes"]  # of both
        report = await learner.step(tiny_llama.step_request(1))
        assert (report.step, len(report.logp_GK)) == (1, 4)
        adapter, payload = await learner.publish(1)
        assert (Path(adapter.path) / "adapter_model.safetensors").read_bytes() == ray.get(payload)
        await learner.save_checkpoint(1)
        os.kill(pids[1]["pid"], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(ProcessDied, match=r"^learner rank 1 of 2 died: ") as caught:
            await learner.step(tiny_llama.step_request(2))  # in which rank 0 gathers weights from rank 1
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began < WITHIN_SECONDS
        return [fact["pid"] for fact in pids]

    assert all(gone(pid) for pid in asyncio.run(drive()))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]  # what a resumed run goes on from


def test_a_rank_that_hangs_ends_the_group_after_the_timeout(actors: list[Any]) -> None:
    async def drive() -> None:
        learner = RemoteLearner(actors)
        await learner.start()
        stuck = ray.get(actors[1].info.remote())["pid"]
        os.kill(stuck, signal.SIGSTOP)
        try:
            with pytest.raises(RemoteError, match=r"^learner rank 0 of 2: RuntimeError: .*[Tt]imed out") as caught:
                await learner.step(tiny_llama.step_request(1))
        finally:
            os.kill(stuck, signal.SIGKILL)
        assert "\n" not in str(caught.value)

    began = time.monotonic()
    asyncio.run(drive())
    assert time.monotonic() - began < 3 * WITHIN_SECONDS


def test_a_place_is_taken_and_given_back() -> None:
    with reserved({"CPU": 0.5}, count=2, strategy="pack") as place:
        assert place is not None
        assert place.bundle_specs == [{"CPU": 0.5}, {"CPU": 0.5}]
        identity = place.id.hex()
        assert ray.util.placement_group_table()[identity]["state"] == "CREATED"
    deadline = time.monotonic() + WITHIN_SECONDS
    while ray.util.placement_group_table()[identity]["state"] != "REMOVED":
        assert time.monotonic() < deadline, "the placement group was not removed"
    with reserved({"CPU": 1.0}, count=1, strategy="pack") as place:
        assert place is None


def test_a_place_that_no_node_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftb_llm.remote._PLACEMENT_SECONDS", 1.0)
    refusal = r"learner\.placement: strict_spread finds no place for learner\.ranks 2 with 0\.5 CPU each on this cluster's nodes; try pack"
    with pytest.raises(SetupError, match=refusal), reserved({"CPU": 0.5}, count=2, strategy="strict_spread"):
        pass


async def test_reference_actors_score_groups_in_turn_and_a_dead_one_is_named(tmp_path: Path) -> None:
    config = tiny_llama.tiny_config()
    path = tiny_llama.build(tmp_path / "model")
    handles = [ReferenceActor.options(num_cpus=0.5).remote(config, model_path=path) for _ in range(2)]  # type: ignore[attr-defined]
    remote, own = RemoteReference(handles), Reference(config, path)
    await remote.start()
    groups = [tiny_llama.scored_group(seed).group for seed in range(3)]
    for group, rows in zip(groups, await asyncio.gather(*(remote.score(group) for group in groups)), strict=True):
        assert [value for row in rows for value in row] == pytest.approx([value for row in own.score(group) for value in row], abs=1e-5)
    await remote.stop()
    with pytest.raises(ProcessDied, match="a reference actor died"):
        await remote.score(groups[0])

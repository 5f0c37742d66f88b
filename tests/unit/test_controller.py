import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from ftb_llm.config import build_config
from ftb_llm.controller import Controller
from ftb_llm.datasets import PromptOrder
from ftb_llm.errors import FtbError, InvalidConfig, ProcessDied, RequestRefused, WrongState
from ftb_llm.journal import Journal
from ftb_llm.run_dir import RunDir
from ftb_llm.state import GeneratorPhase, Phase
from ftb_llm.types import FinishReason
from tests.fakes import FakeGenerator, FakeLearner, FakeProgress, FakeRewards, make_prompt

SETTINGS = {
    "run": {"max_steps": 6},
    "sampling": {"group_size": 2},
    "actors": {"groups_in_flight": 2, "push_every_steps": 2, "push_retry_seconds": 0.1},
    "buffer": {"capacity_groups": 4},
    "learner": {"groups_per_step": 2, "warmup_steps": 1},
    "eval": {"every_steps": 3},
    "checkpoint": {"every_steps": 4},
}


class Run:
    """A controller over fakes, in a folder of its own."""

    def __init__(self, path, *, settings=SETTINGS, generators=None, learner=None, rewards=None, resume_from=None):
        self.run_dir = RunDir(path) if resume_from else RunDir.create(path)
        self.journal = Journal(path / "run.db")
        self.generators = generators or [FakeGenerator()]
        self.learner = learner or FakeLearner()
        self.progress = FakeProgress()
        config = build_config(settings)
        self.controller = Controller(
            config=config,
            config_history=self.journal.past_configs(),
            run_dir=self.run_dir,
            journal=self.journal,
            prompts=PromptOrder([make_prompt(index) for index in range(5)], seed=0, shuffle=True),
            generators=self.generators,
            learner=self.learner,
            rewards=rewards or FakeRewards(),
            progress=self.progress,
            resume_from=Path(resume_from) if resume_from else None,
        )

    async def to_end(self):
        async with asyncio.timeout(20):
            await self.controller.run()
        return self

    def events(self, kind):
        return [event for event in self.run_dir.events() if event["kind"] == kind]


async def test_a_run_goes_to_its_last_step_and_keeps_its_books(tmp_path):
    run = await Run(tmp_path / "run").to_end()
    controller = run.controller
    assert controller.state.phase is Phase.FINISHED
    assert [request.step for request in run.learner.requests] == [1, 2, 3, 4, 5, 6]
    rows = list(run.run_dir.metrics())
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval/exact_tv" in row] == [0, 3, 6]
    assert run.learner.published == [0, 2, 4, 6]
    assert run.learner.checkpoints == [4, 6]
    accounts = controller.status()["accounting"]
    assert accounts["trained"] == 12 and accounts["leased"] == 0
    assert accounts["generated"] == sum(accounts[state] for state in ("trained", "dropped_stale", "rejected", "buffered", "leased"))
    assert controller.facts["logprob_max_abs_diff"] == 0.25
    assert controller.facts["speed_after_push_ratio"] == 1.0


async def test_a_model_that_takes_the_slow_way_is_a_warning(tmp_path):
    class Slow(FakeLearner):
        async def start(self):
            return {"packed": False}

    run = await Run(tmp_path / "slow", learner=Slow()).to_end()
    assert ["full logits" in event["message"] for event in run.events("warning")] == [True]
    assert not (await Run(tmp_path / "fast").to_end()).events("warning")


async def test_every_group_is_a_different_one_of_the_prompt_order(tmp_path):
    run = await Run(tmp_path / "run").to_end()
    trained = [scored.group.id for request in run.learner.requests for scored in request.groups]
    assert len(set(trained)) == 12
    order = PromptOrder([make_prompt(index) for index in range(5)], seed=0, shuffle=True)
    for request in run.learner.requests:
        for scored in request.groups:
            assert scored.group.prompt == order[int(scored.group.id[1:])]


async def test_staleness_is_counted_from_the_version_of_the_tokens(tmp_path):
    run = await Run(tmp_path / "run").to_end()
    for row, request in zip([row for row in run.run_dir.metrics() if row["step"] > 0], run.learner.requests, strict=True):
        ages = [request.step - 1 - scored.group.min_version for scored in request.groups]
        assert row["off_policy/staleness_max"] == max(ages)
        assert sum(row["staleness_counts"].values()) == 2


async def test_a_patch_takes_effect_at_the_announced_step(tmp_path):
    announced = []

    def patch_during_step_3(request):
        if request.step == 3:
            patch = {"objective": {"divergence": {"name": "hellinger"}}}
            announced.append(run.controller.ledger.patch(patch, if_match="*", source="test").effective_step)

    run = Run(tmp_path / "run", learner=FakeLearner(patch_during_step_3))
    await run.to_end()
    assert announced == [4]
    assert [request.objective.divergence for request in run.learner.requests] == ["reverse_kl"] * 3 + ["hellinger"] * 3
    assert [row["objective"]["divergence"] for row in run.run_dir.metrics() if row["step"] > 0] == ["reverse_kl"] * 3 + ["hellinger"] * 3
    (event,) = run.events("config_change")
    assert event["effective_step"] == 4 and event["changed"] == {"objective.divergence.name": ["reverse_kl", "hellinger"]}
    assert run.run_dir.read_json("config.json")["objective"]["divergence"]["name"] == "hellinger"
    assert [change.version for change in run.journal.past_configs().changes] == [1, 2]


async def test_a_rejected_group_is_counted_and_the_run_goes_on(tmp_path):
    run = await Run(tmp_path / "run", rewards=FakeRewards(bad={1, 4})).to_end()
    accounts = run.controller.status()["accounting"]
    assert accounts["rejected"] == 2 and accounts["reasons"] == {"raised": 2} and accounts["trained"] == 12
    assert len(run.events("rejected")) == 2


async def test_a_stop_ends_the_run_after_its_step_with_a_checkpoint(tmp_path):
    run = Run(tmp_path / "run", learner=FakeLearner(lambda request: request.step == 3 and run.controller.request_stop("test")))
    await run.to_end()
    assert run.controller.state.phase is Phase.STOPPED
    assert run.controller.state.step == 3
    assert run.learner.checkpoints == [3]
    with pytest.raises(WrongState, match="already stopped"):
        run.controller.request_stop("test")


async def test_a_stop_while_starting_still_leaves_a_checkpoint(tmp_path):
    run = Run(tmp_path / "run")
    run.controller.request_stop("test")
    await run.to_end()
    assert run.controller.state.phase is Phase.STOPPED and run.learner.checkpoints == [0] and run.learner.requests == []


async def test_a_checkpoint_on_request_comes_at_the_next_boundary(tmp_path):
    run = Run(tmp_path / "run", learner=FakeLearner(lambda request: request.step == 2 and run.controller.request_checkpoint("test")))
    await run.to_end()
    assert run.learner.checkpoints == [2, 4, 6]


async def test_a_resumed_run_goes_on_where_the_checkpoint_was(tmp_path):
    first = Run(tmp_path / "run", learner=FakeLearner(lambda request: request.step == 3 and first.controller.request_stop("test")))
    await first.to_end()
    generated = set(first.journal.group_ids())
    first.journal.close()

    second = await Run(tmp_path / "run", resume_from="checkpoints/step_000003").to_end()
    assert [request.step for request in second.learner.requests] == [4, 5, 6]
    assert [row["step"] for row in second.run_dir.metrics()] == list(range(7))
    trained_before = {scored.group.id for request in first.learner.requests for scored in request.groups}
    trained_after = {scored.group.id for request in second.learner.requests for scored in request.groups}
    assert not trained_before & trained_after
    assert generated - trained_before <= trained_after, "groups left in the buffer are trained first"
    numbers = sorted(int(identifier[1:]) for identifier in second.journal.group_ids())
    assert numbers == list(range(len(numbers))), "no group number, hence no prompt, is skipped"


async def test_one_dead_generator_leaves_the_others_working(tmp_path):
    run = await Run(tmp_path / "run", generators=[FakeGenerator("generator-0", dies_after=1), FakeGenerator("generator-1")]).to_end()
    assert run.controller.state.phase is Phase.FINISHED
    assert [state.phase for state in run.controller.state.generators] == [GeneratorPhase.DEAD, GeneratorPhase.SERVING]
    assert run.events("actor_out")[0]["message"] == "generator-0 died: engine died"


async def test_when_every_generator_is_dead_the_run_fails_instead_of_waiting(tmp_path):
    run = Run(tmp_path / "run", generators=[FakeGenerator(dies_after=1)])
    with pytest.raises(FtbError, match="every generator is dead: generator-0: engine died"):
        await run.to_end()
    assert run.controller.state.phase is Phase.FAILED
    assert "every generator is dead" in run.controller.state.last_error


async def test_a_step_that_fails_gives_its_groups_back(tmp_path):
    def fail(request):
        raise FtbError("gradient is not finite at step 1")

    run = Run(tmp_path / "run", learner=FakeLearner(fail))
    with pytest.raises(FtbError, match="not finite"):
        await run.to_end()
    accounts = run.controller.status()["accounting"]
    assert accounts["leased"] == 0 and accounts["trained"] == 0 and accounts["buffered"] >= 2
    assert accounts == run.journal.accounting().as_dict()


async def test_readiness_names_what_it_waits_for(tmp_path):
    run = Run(tmp_path / "run")
    assert run.controller.not_ready_cause() == "the run is starting"
    (generator,) = run.controller.state.generators
    run.controller.state.phase = Phase.TRAINING
    generator.enter(GeneratorPhase.SERVING)
    assert run.controller.not_ready_cause() is None
    run.controller.state.last_progress -= 200
    assert "no step for 200 s; waiting for groups; serving generators: generator-0" in run.controller.not_ready_cause()


async def test_a_run_without_a_serving_generator_is_not_ready_at_once(tmp_path):
    run = Run(tmp_path / "run", generators=[FakeGenerator("generator-0"), FakeGenerator("generator-1")])
    first, second = run.controller.state.generators
    run.controller.state.phase = Phase.TRAINING
    first.enter(GeneratorPhase.OUT, "canary failed at version 4")
    second.enter(GeneratorPhase.SERVING)
    assert run.controller.not_ready_cause() is None
    second.enter(GeneratorPhase.DEAD, "engine died")
    cause = "no generator serves; generator-0 is out: canary failed at version 4; generator-1 is dead: engine died"
    assert run.controller.not_ready_cause() == cause


async def test_a_failed_audit_is_a_warning_about_a_run_that_is_saved(tmp_path):
    class Fading(FakeGenerator):
        async def push(self, adapter, payload):
            self.bad_pushes = 1 if adapter.version == 6 else 0
            return await super().push(adapter, payload)

    run = await Run(tmp_path / "run", generators=[Fading()]).to_end()
    assert run.controller.state.phase is Phase.FINISHED
    assert run.learner.checkpoints == [4, 6]
    assert "logprob_max_abs_diff" not in run.controller.facts
    assert "could not be compared" in run.events("warning")[0]["message"]


async def test_a_run_whose_generators_all_died_keeps_its_last_step(tmp_path):
    run = Run(tmp_path / "run", generators=[FakeGenerator(dies_after=7)])
    with pytest.raises(FtbError, match="every generator is dead"):
        await run.to_end()
    assert run.learner.checkpoints == [3]


async def test_an_actor_that_dies_in_a_push_is_dead_and_does_not_hold_the_run_up(tmp_path):
    class DiesInPush(FakeGenerator):
        async def push(self, adapter, payload):
            if adapter.version > 0:
                self.serving = False
                raise ProcessDied("the actor is gone")
            return await super().push(adapter, payload)

    run = Run(tmp_path / "run", generators=[DiesInPush()])
    with pytest.raises(FtbError, match="every generator is dead: generator-0: the actor is gone"):
        await run.to_end()


async def test_a_first_adapter_that_nobody_takes_fails_the_start(tmp_path):
    run = Run(tmp_path / "run", generators=[FakeGenerator(bad_pushes=99)])
    with pytest.raises(FtbError, match="no generator took its first adapter: generator-0: canary failed"):
        await run.to_end()


async def test_a_prompt_the_engine_refuses_costs_its_group_and_no_generator(tmp_path):
    class Picky(FakeGenerator):
        async def generate(self, request):
            if request.group_id.endswith("3"):
                raise RequestRefused("the engine refused a request: no")
            return await super().generate(request)

    run = await Run(tmp_path / "run", generators=[Picky()]).to_end()
    assert run.controller.state.phase is Phase.FINISHED
    assert run.controller.status()["accounting"]["reasons"]["refused"] >= 1


async def test_rewards_that_never_work_end_the_run(tmp_path):
    run = Run(tmp_path / "run", rewards=FakeRewards(bad=set(range(1000))))
    with pytest.raises(FtbError, match="the first 32 groups were all rejected, the last one because: raised"):
        await run.to_end()
    printed = [line for line in run.progress.lines if line.startswith("rejected")]
    assert len(printed) == 6, "1, 2, 4, 8, 16, 32"


class Cutting(FakeGenerator):
    """Cuts one completion of each group whose number is in `cut`."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    async def generate(self, request):
        group = await super().generate(request)
        if int(group.id[1:]) not in self.cut:
            return group
        first, *others = group.completions
        return replace(group, completions=(replace(first, finish_reason=FinishReason.LENGTH), *others))


@pytest.mark.parametrize("truncated", ["keep", "mask"])
async def test_a_cut_completion_stays_with_its_group(tmp_path, truncated):
    settings = SETTINGS | {"objective": {"truncated": truncated}}
    run = await Run(tmp_path / "run", generators=[Cutting({1, 4})], settings=settings).to_end()
    assert run.controller.status()["accounting"]["rejected"] == 0
    assert {request.objective.truncated for request in run.learner.requests} == {truncated}
    trained = {scored.group.id for request in run.learner.requests for scored in request.groups}
    assert {"g000000001", "g000000004"} <= trained


async def test_a_truncated_group_is_rejected_where_the_config_says_so(tmp_path):
    settings = SETTINGS | {"objective": {"truncated": "reject"}}
    run = await Run(tmp_path / "run", generators=[Cutting({1, 4})], settings=settings, rewards=FakeRewards(bad={2})).to_end()
    accounts = run.controller.status()["accounting"]
    assert accounts["reasons"] == {"truncated": 2, "raised": 1}
    assert accounts["generated"] == sum(accounts[state] for state in ("trained", "dropped_stale", "rejected", "buffered", "leased"))
    trained = {scored.group.id for request in run.learner.requests for scored in request.groups}
    assert not {"g000000001", "g000000002", "g000000004"} & trained
    assert {event["reason"] for event in run.events("rejected")} == {"truncated", "raised"}


async def test_a_run_whose_groups_are_all_truncated_ends(tmp_path):
    run = Run(tmp_path / "run", generators=[Cutting(set(range(1000)))], settings=SETTINGS | {"objective": {"truncated": "reject"}})
    with pytest.raises(FtbError, match=r"the first 32 groups were all rejected, .* truncated: 1 of 2 .* raise sampling\.max_tokens"):
        await run.to_end()


async def test_a_ramp_goes_on_through_a_stop_and_an_unrelated_change(tmp_path):
    ramp = {"name": "alpha", "alpha": {"from": 0.0, "to": 1.0, "over": 4}}

    def change(request):
        if request.step == 1:
            first.controller.ledger.patch({"objective": {"divergence": ramp}}, if_match="*", source="test")
        if request.step == 3:
            first.controller.ledger.patch({"learner": {"learning_rate": 1e-4}}, if_match="*", source="test")
            first.controller.request_stop("test")

    first = Run(tmp_path / "run", learner=FakeLearner(change))
    await first.to_end()
    first.journal.close()
    settings = first.run_dir.read_json("config.json")
    second = await Run(tmp_path / "run", resume_from="checkpoints/step_000003", settings=settings).to_end()
    rows = [row for row in second.run_dir.metrics() if row["step"] > 0]
    assert [row["objective"]["alpha"] for row in rows] == [None, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert [request.objective.alpha for request in second.learner.requests] == [0.5, 0.75, 1.0]
    assert second.controller.status()["objective"]["alpha"] == 1.0


async def test_the_schedule_changes_the_divergence_at_its_steps(tmp_path):
    divergence = {"name": "js", "schedule": [{"step": 3, "name": "tv", "width": 0.5}, {"step": 5, "name": "hellinger"}]}
    run = await Run(tmp_path / "run", settings=SETTINGS | {"objective": {"divergence": divergence}}).to_end()
    found = [(request.objective.divergence, request.objective.width) for request in run.learner.requests]
    assert found == [("js", None)] * 2 + [("tv", 0.5)] * 2 + [("hellinger", None)] * 2


@pytest.mark.parametrize("patch", [{"sampling": {"max_tokens": 511}}, {"objective": {"beta": 1e-310}}, {"staleness": {"max_steps": 0}}])
async def test_a_patch_that_no_step_could_live_with_is_refused(tmp_path, patch):
    run = Run(tmp_path / "run")
    with pytest.raises(InvalidConfig):
        run.controller.ledger.patch(patch, if_match="*", source="test")
    assert run.controller.ledger.current.version == 1


async def test_max_steps_lowered_to_the_step_in_progress_still_ends_with_that_step(tmp_path):
    def lower(request):
        if request.step == 4:
            run.controller.ledger.patch({"run": {"max_steps": 4}}, if_match="*", source="test")

    run = Run(tmp_path / "run", learner=FakeLearner(lower), settings=SETTINGS | {"actors": SETTINGS["actors"] | {"push_every_steps": 3}})
    await run.to_end()
    assert run.learner.published == [0, 3, 4] and run.learner.checkpoints[-1] == 4
    assert "eval/exact_tv" in list(run.run_dir.metrics())[-1]


async def test_a_stop_between_steps_still_evaluates_the_last_one(tmp_path):
    class Slow(FakeGenerator):
        async def generate(self, request):
            if int(request.group_id[1:]) >= 8:
                run.controller.request_stop("test") if run.controller.state.phase is Phase.TRAINING else None
                await asyncio.sleep(0.01)
            return await super().generate(request)

    run = Run(tmp_path / "run", generators=[Slow()])
    await run.to_end()
    rows = list(run.run_dir.metrics())
    assert [row["step"] for row in rows] == list(range(run.controller.state.step + 1))
    assert "eval/exact_tv" in rows[-1]


async def test_a_resumed_run_with_another_config_says_from_which_step(tmp_path):
    first = Run(tmp_path / "run", learner=FakeLearner(lambda request: request.step == 3 and first.controller.request_stop("test")))
    await first.to_end()
    first.journal.close()
    second = Run(tmp_path / "run", resume_from="checkpoints/step_000003", settings=SETTINGS | {"objective": {"beta": 0.25}})
    assert [(version.version, version.effective_step) for version in second.controller.ledger.history()] == [(1, 1), (2, 4)]
    assert second.events("config_change")[-1]["effective_step"] == 4

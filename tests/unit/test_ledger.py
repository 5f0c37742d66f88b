import gc
import json
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftb_llm.config import Config, build_config
from ftb_llm.config.ledger import ConfigLedger, ConfigVersion, PastVersions
from ftb_llm.errors import FixedSetting, InvalidConfig, StaleConfig, WrongState


class Bench:
    """A ledger at a step that the test moves."""

    def __init__(self, tree: dict[str, Any] | None = None, step: int = 0, past: PastVersions | None = None) -> None:
        self.step = step
        self.changes: list[ConfigVersion] = []
        self.ledger = ConfigLedger(build_config(tree or {}), next_step=lambda: self.step + 1, on_change=self.changes.append, past=past)

    def patch(self, patch: Any, if_match: str = "*") -> ConfigVersion:
        return self.ledger.patch(patch, if_match=if_match, source="test")


def problems(bench: Bench, patch: Any) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        bench.patch(patch)
    assert bench.changes == []
    assert bench.ledger.current.version == 1
    return {problem.key: problem.message for problem in caught.value.problems}


def test_the_first_version_is_the_start() -> None:
    bench = Bench()
    first = bench.ledger.current
    assert (first.version, first.effective_step, first.source, first.changed, first.config) == (1, 1, "start", {}, Config())
    assert bench.ledger.history() == (first.change,)
    assert bench.changes == []


def test_a_patch_is_a_version_that_starts_at_the_next_step() -> None:
    bench = Bench(step=11)
    version = bench.patch({"objective": {"beta": 0.25, "divergence": {"name": "alpha", "alpha": 0.5}}})
    assert (version.version, version.effective_step, version.source) == (2, 12, "test")
    assert version.changed == {"objective.divergence.name": ("reverse_kl", "alpha"), "objective.divergence.alpha": (None, 0.5), "objective.beta": (0.5, 0.25)}
    assert bench.ledger.current is version
    assert bench.changes == [version]


RAMP = {"name": "alpha", "alpha": {"from": 0.0, "to": 1.0, "over": 4}}


def alphas(ledger: ConfigLedger, *steps: int) -> list[float | None]:
    return [ledger.objective_at(step).alpha for step in steps]


def patch_divergence(bench: Bench, step: int, **divergence: Any) -> ConfigVersion:
    """While `step` is in progress, so that it takes effect at the next."""
    bench.step = step
    return bench.patch({"objective": {"divergence": divergence}})


def test_a_ramp_begins_where_it_comes_into_force() -> None:
    bench = Bench()
    patch_divergence(bench, 149, **RAMP)
    assert bench.ledger.objective_at(149).divergence == "reverse_kl"
    assert alphas(bench.ledger, 150, 151, 153, 154, 400) == [0.0, 0.25, 0.75, 1.0, 1.0]
    assert alphas(Bench({"objective": {"divergence": RAMP}}).ledger, 1, 2, 5) == [0.0, 0.25, 1.0]


def test_a_change_elsewhere_does_not_start_a_ramp_anew() -> None:
    bench = Bench()
    patch_divergence(bench, 9, **RAMP)
    bench.patch({"learner": {"learning_rate": 1e-4}})  # before the ramp's first step
    bench.step = 11
    bench.patch({"objective": {"beta": 0.25}})
    patch_divergence(bench, 11, schedule=[{"step": 30, "name": "js"}])
    assert bench.ledger.current.version == 5
    assert alphas(bench.ledger, 10, 11, 12, 13, 14) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_another_ramp_begins_anew() -> None:
    bench = Bench({"objective": {"divergence": RAMP}})
    version = patch_divergence(bench, 9, alpha={"to": 2.0})
    assert version.changed == {"objective.divergence.alpha": (RAMP["alpha"], {"from": 0.0, "to": 2.0, "over": 4})}
    assert alphas(bench.ledger, 9, 10, 11, 14) == [1.0, 0.0, 0.5, 2.0]


def test_a_ramp_that_was_away_begins_anew() -> None:
    bench = Bench({"objective": {"divergence": RAMP}})
    patch_divergence(bench, 4, name="js")
    patch_divergence(bench, 6, **RAMP)
    assert alphas(bench.ledger, 4, 5, 6, 7, 8) == [0.75, None, None, 0.0, 0.25]


def test_a_member_that_never_governed_a_step_interrupts_nothing() -> None:
    bench = Bench({"objective": {"divergence": RAMP}})
    patch_divergence(bench, 1, name="js")
    patch_divergence(bench, 1, **RAMP)
    assert alphas(bench.ledger, 1, 2, 3) == [0.0, 0.25, 0.5]


def test_a_first_member_that_the_schedule_replaced_begins_anew() -> None:
    bench = Bench({"objective": {"divergence": RAMP | {"schedule": [{"step": 3, "name": "js"}]}}})
    patch_divergence(bench, 5, schedule=[])
    assert alphas(bench.ledger, 2, 3, 5, 6, 7) == [0.25, None, None, 0.0, 0.25]


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_has_the_alpha_of_the_same_step(step: int) -> None:
    before = Bench()
    patch_divergence(before, 1, **RAMP)
    before.step = 2
    before.patch({"objective": {"beta": 0.25}})
    expected = alphas(before.ledger, 2, 3, 4, 5)
    same = Bench(before.ledger.current.config.model_dump(mode="json"), step=step, past=before.ledger.past())
    assert same.ledger.history() == before.ledger.history()
    assert alphas(same.ledger, 2, 3, 4, 5) == expected == [0.0, 0.25, 0.5, 0.75]
    other = Bench(same.ledger.current.config.model_dump(mode="json") | {"run": {"max_steps": 99}}, step=step, past=before.ledger.past())
    assert len(other.ledger.history()) == 4
    assert alphas(other.ledger, 2, 3, 4, 5) == expected


def test_a_ramp_of_an_abandoned_future_begins_at_the_resumed_step() -> None:
    before = Bench(step=90)
    first = before.ledger.past()
    patch_divergence(before, 90, **RAMP)
    resumed = Bench({"objective": {"divergence": RAMP}}, step=50, past=first)
    abandoned = Bench({"objective": {"divergence": RAMP}}, step=50, past=before.ledger.past())
    for bench in (resumed, abandoned):
        assert alphas(bench.ledger, 51, 52, 91) == [0.0, 0.25, 1.0]


def test_an_abandoned_change_elsewhere_does_not_start_a_ramp_anew() -> None:
    before = Bench({"objective": {"divergence": RAMP}})
    before.step = 90
    before.patch({"objective": {"beta": 0.25}})
    resumed = Bench(before.ledger.current.config.model_dump(mode="json"), step=2, past=before.ledger.past())
    assert resumed.ledger.current.effective_step == 3
    assert alphas(resumed.ledger, 3, 4, 5) == [0.5, 0.75, 1.0]


def test_another_member_drops_what_belonged_to_the_old_one() -> None:
    bench = Bench({"objective": {"divergence": {"name": "alpha", "alpha": 0.5}}})
    assert patch_divergence(bench, 1, name="tv", width=0.5).changed == {
        "objective.divergence.name": ("alpha", "tv"),
        "objective.divergence.alpha": (0.5, None),
        "objective.divergence.width": (None, 0.5),
    }
    assert patch_divergence(bench, 2, name="hellinger").changed == {"objective.divergence.name": ("tv", "hellinger"), "objective.divergence.width": (0.5, None)}


def test_naming_the_same_member_keeps_what_belongs_to_it() -> None:
    bench = Bench({"objective": {"divergence": RAMP}})
    assert patch_divergence(bench, 1, name="alpha").version == 1


def test_null_puts_the_member_back_to_the_default() -> None:
    bench = Bench({"objective": {"divergence": {"name": "alpha", "alpha": 0.5}}})
    assert patch_divergence(bench, 1, name=None).config.objective.divergence.text == "reverse_kl"


def test_what_does_not_go_together_is_refused_where_the_patch_says_it() -> None:
    bench = Bench({"objective": {"divergence": {"name": "js"}}})
    assert "alpha 0.5 only goes with name alpha, not with js" in problems(bench, {"objective": {"divergence": {"alpha": 0.5}}})["objective.divergence"]
    wrong = {"objective": {"divergence": {"name": "tv", "alpha": 0.5}}}
    assert "alpha 0.5 only goes with name alpha, not with tv" in problems(bench, wrong)["objective.divergence"]


SCHEDULE = [{"step": 5, "name": "js"}, {"step": 9, "name": "alpha", "alpha": 0.5}]


@pytest.mark.parametrize(("step", "divergences"), [(3, ["hellinger", "js", "js", "alpha"]), (4, ["hellinger", "hellinger", "hellinger", "alpha"])])
def test_a_new_member_takes_the_place_of_the_one_in_force(step: int, divergences: list[str]) -> None:
    bench = Bench({"objective": {"divergence": {"schedule": SCHEDULE}}})
    patch_divergence(bench, step, name="hellinger")
    assert [bench.ledger.objective_at(at).divergence for at in (4, 5, 8, 9)] == (["reverse_kl"] if step == 4 else divergences[:1]) + divergences[1:]


def test_what_a_patch_says_about_the_schedule_holds() -> None:
    bench = Bench({"objective": {"divergence": {"schedule": SCHEDULE}}})
    patch_divergence(bench, 7, name="hellinger", schedule=SCHEDULE)
    assert [bench.ledger.objective_at(at).divergence for at in (8, 9)] == ["js", "alpha"]


def test_a_patch_elsewhere_leaves_the_schedule_alone() -> None:
    bench = Bench({"objective": {"divergence": {"schedule": SCHEDULE}}}, step=7)
    assert bench.patch({"objective": {"beta": 0.25}}).changed == {"objective.beta": (0.5, 0.25)}
    assert bench.patch(bench.ledger.current.config.model_dump(mode="json")).version == 2


def test_the_rest_of_the_config_stays() -> None:
    bench = Bench({"learner": {"groups_per_step": 4}, "sampling": {"temperature": 0.5}})
    config = bench.patch({"sampling": {"top_p": 0.5}}).config
    assert config == build_config({"learner": {"groups_per_step": 4}, "sampling": {"temperature": 0.5, "top_p": 0.5}})


def test_null_puts_a_setting_back_to_its_default() -> None:
    bench = Bench({"staleness": {"max_steps": 8}, "run": {"max_steps": 50}})
    assert bench.patch({"staleness": {"max_steps": None}, "run": {"max_steps": None}}).changed == {"staleness.max_steps": (8, None), "run.max_steps": (50, 400)}


def test_a_patch_that_changes_nothing_returns_the_current_version() -> None:
    bench = Bench()
    first = bench.ledger.current
    for patch in ({}, {"objective": {}}, {"objective": {"beta": 0.5}}, {"sampling": {"group_size": 32}}, first.config.model_dump(mode="json")):
        assert bench.patch(patch) is first
    assert bench.changes == []


def test_if_match() -> None:
    bench = Bench()
    stale = bench.ledger.etag
    for if_match in (stale, "*", f'"x", {bench.ledger.etag}', stale.strip('"')):
        bench.patch({}, if_match)
    bench.patch({"objective": {"beta": 0.25}}, stale)
    for if_match in (stale, "", '""', f"W/{bench.ledger.etag}", bench.ledger.etag[:-2]):
        with pytest.raises(StaleConfig) as caught:
            bench.patch({"objective": {"beta": 0.75}}, if_match)
        assert caught.value.current == bench.ledger.etag
    assert bench.ledger.current.version == 2


def test_the_etag_tells_versions_and_contents_apart() -> None:
    bench, other = Bench(), Bench({"objective": {"beta": 0.25}})
    tags = [bench.ledger.etag, other.ledger.etag]
    for beta in (0.25, 0.5):
        tags.append(bench.patch({"objective": {"beta": beta}}).etag)
    assert len(set(tags)) == 4
    assert tags[0] == Bench().ledger.etag
    assert [tag[:3] for tag in tags] == ['"1-', '"1-', '"2-', '"3-']


@pytest.mark.parametrize(
    ("patch", "keys"),
    [
        ({"sampling": {"group_size": 64}}, ["sampling.group_size"]),
        ({"sampling": {"group_size": "a lot"}}, ["sampling.group_size"]),
        ({"buffer": {"capacity_groups": 1}, "learner": {"groups_per_step": 1000}}, ["buffer.capacity_groups", "learner.groups_per_step"]),
        ({"run": {"name": None}}, ["run.name"]),
        ({"rewards": {"functions": []}}, ["rewards.functions"]),
        ({"sampling": {"group_size": 64, "temperature": 0.5}}, ["sampling.group_size"]),
        ({"objective": {"custom": "os:system", "divergence": {"name": "custom"}}}, ["objective.custom"]),
        ({"objective": {"kind": "grpo", "log_z": "learned"}}, ["objective.kind", "objective.log_z"]),
    ],
)
def test_fixed_settings_are_refused(patch: dict[str, Any], keys: list[str]) -> None:
    bench = Bench({"run": {"name": "named"}})
    with pytest.raises(FixedSetting) as caught:
        bench.patch(patch)
    assert caught.value.keys == keys
    assert bench.changes == []


def test_unknown_keys_name_the_nearest() -> None:
    assert problems(Bench(), {"objective": {"betta": 0.1}}) == {"objective.betta": "unknown setting; did you mean objective.beta?"}
    assert problems(Bench(), {"objective": {"betta": None}}) == {"objective.betta": "unknown setting; did you mean objective.beta?"}
    assert "did you mean objective?" in problems(Bench(), {"objectiv": {"beta": 0.1}})["objectiv"]


@pytest.mark.parametrize("patch", [None, [], 5, "objective.beta=1"])
def test_a_patch_is_an_object(patch: Any) -> None:
    assert "must be a JSON object" in problems(Bench(), patch)[""]


def test_bad_values_name_the_setting() -> None:
    assert set(problems(Bench(), {"objective": {"beta": 0}, "sampling": {"temperature": "hot"}})) == {"objective.beta", "sampling.temperature"}
    assert set(problems(Bench(), {"objective": 5})) == {"objective"}
    assert "needs alpha" in problems(Bench(), {"objective": {"divergence": {"name": "alpha"}}})["objective.divergence"]
    assert "actors.max_model_len" in problems(Bench(), {"sampling": {"max_tokens": 100_000}})[""]


def test_max_steps_may_not_lie_behind() -> None:
    bench = Bench(step=57)
    assert problems(bench, {"run": {"max_steps": 56}}) == {"run.max_steps": "56 is below the current step 57; it must be at least 57"}
    assert bench.patch({"run": {"max_steps": 57}}).config.run.max_steps == 57


def test_the_newest_version_in_effect_governs_a_step() -> None:
    bench = Bench()
    first = bench.ledger.current
    bench.step = 9
    bench.patch({"objective": {"beta": 0.1}})
    later = bench.patch({"objective": {"beta": 0.2}})
    bench.step = 19
    last = bench.patch({"objective": {"beta": 0.3}})
    assert [bench.ledger.at_step(step) for step in (1, 9, 10, 19, 20, 999)] == [first, first, later, later, last, last]
    with pytest.raises(ValueError, match="step 0"):
        bench.ledger.at_step(0)


def test_a_change_that_can_not_be_recorded_does_not_count() -> None:
    def refuse(version: ConfigVersion) -> None:
        raise OSError("disk full")

    ledger = ConfigLedger(Config(), next_step=lambda: 1, on_change=refuse)
    with pytest.raises(OSError, match="disk full"):
        ledger.patch({"objective": {"beta": 0.1}}, if_match="*", source="test")
    assert ledger.current.version == 1


def test_no_patch_when_no_step_follows() -> None:
    bench = Bench()
    is_over: list[bool] = []

    def next_step() -> int:
        if is_over:
            raise WrongState("the run is over")
        return 1

    ledger = ConfigLedger(Config(), next_step=next_step, on_change=bench.changes.append)
    is_over.append(True)
    with pytest.raises(WrongState):
        ledger.patch({"objective": {"beta": 0.1}}, if_match="*", source="test")
    assert ledger.current.version == 1


def test_the_newest_config_of_an_abandoned_future_holds_from_the_resumed_step_on() -> None:
    before = Bench(step=90)
    before.patch({"objective": {"beta": 0.1}})
    resumed = Bench({"objective": {"beta": 0.1}}, step=50, past=before.ledger.past())
    assert resumed.ledger.at_step(51).config.objective.beta == 0.1
    assert resumed.ledger.current.effective_step == 51


def test_a_resumed_ledger_goes_on() -> None:
    before = Bench()
    before.patch({"objective": {"beta": 0.1}})
    same = Bench({"objective": {"beta": 0.1}}, step=30, past=before.ledger.past())
    assert same.ledger.history() == before.ledger.history()
    other = Bench({"objective": {"beta": 0.2}}, step=30, past=before.ledger.past())
    added = other.ledger.history()[2:]
    assert [(version.version, version.effective_step, version.source, version.changed) for version in added] == [
        (3, 31, "resume", {"objective.beta": (0.1, 0.2)})
    ]
    assert other.changes == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["objective", "divergence", "beta", "name", "alpha", "from", "schedule", "step", "run", "max_steps", "dir", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_json_is_a_version_or_one_of_the_announced_errors(patch: Any) -> None:
    bench = Bench()
    with suppress(InvalidConfig, FixedSetting):
        bench.patch(patch)
    assert [version.change for version in bench.changes] == list(bench.ledger.history()[1:])
    config = bench.ledger.current.config
    assert build_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_the_history_is_read_in_pages() -> None:
    bench = Bench()
    for number in range(9):
        bench.patch({"objective": {"beta": 0.1 + number / 100}})
    ledger = bench.ledger
    assert ledger.count == 10
    assert [change.version for change in ledger.history()] == list(range(1, 11))
    assert [change.version for change in ledger.history(since=7)] == [8, 9, 10]
    assert [change.version for change in ledger.history(since=3, limit=4)] == [4, 5, 6, 7]
    assert ledger.history(since=10) == ledger.history(limit=0) == ()
    pages = [ledger.history(since=since, limit=3) for since in (0, 3, 6, 9)]
    assert tuple(change for page in pages for change in page) == ledger.history()


def test_an_old_version_is_put_together_again_from_what_changed() -> None:
    bench = Bench({"objective": {"divergence": {"schedule": SCHEDULE}}})
    configs = {1: bench.ledger.current.config}
    patches = [
        {"objective": {"divergence": {"name": "tv", "width": 0.5, "schedule": []}}},
        {"sampling": {"temperature": 0.5}, "objective": {"beta": 0.25}},
        {"objective": {"divergence": RAMP}},
        {"staleness": {"max_steps": 8}},
        {"objective": {"divergence": {"name": "js", "schedule": [{"step": 90, "name": "tv"}]}}},
        {"staleness": {"max_steps": None}},
    ]
    for step, patch in enumerate(patches, start=1):
        bench.step = step
        configs[step + 1] = bench.patch(patch).config
    resumed = Bench(configs[7].model_dump(mode="json"), step=6, past=bench.ledger.past())
    for ledger in (bench.ledger, resumed.ledger):
        assert {step: ledger.at_step(step).config for step in configs} == configs
        assert [ledger.objective_at(step).divergence for step in configs] == ["reverse_kl", "tv", "tv", "alpha", "alpha", "js", "js"]


def test_thousands_of_versions_need_little_memory_and_time() -> None:
    """A script that tunes something at every step; each whole config takes more than 10 kB."""
    step = 0
    ledger = ConfigLedger(
        build_config({"run": {"max_steps": 2000}}), next_step=lambda: step + 1, on_change=lambda version: None
    )

    def patch_each_step(last: int) -> None:
        nonlocal step
        while step < last:
            step += 1
            ledger.patch({"objective": {"beta": 0.1 + step * 1e-6}}, if_match="*", source="test")

    patch_each_step(20)
    tracemalloc.start()
    patch_each_step(520)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown / 500 < 2000
    assert ledger.at_step(300).config.objective.beta == 0.1 + 299 * 1e-6


def test_the_ledger_imports_nothing_heavy() -> None:
    code = (
        "import sys, ftb_llm.config.ledger, ftb_llm.api.client; print(sorted({'torch', 'vllm', 'ray', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"

import json
import math
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from ftb_llm.config import Config, build_config, load_config
from ftb_llm.config.load import all_settings, is_live, merge, parse_override, settings
from ftb_llm.config.schema import DIVERGENCES, OBJECTIVES, TOKEN_LEVEL, MemberName, Objective
from ftb_llm.errors import InvalidConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS = dict(settings())
RAMP = {"from": 0.75, "to": 1.2, "over": 300}


def problems(tree: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        build_config(tree)
    return {problem.key: problem.message for problem in caught.value.problems}


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_the_defaults_are_a_valid_config() -> None:
    config = build_config({})
    assert config == Config() == build_config(config.model_dump(mode="json"))


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_described_and_marked(key: str) -> None:
    field = SETTINGS[key]
    assert field.description
    assert field.description.strip().endswith(".")
    assert isinstance(is_live(key), bool)


@pytest.mark.parametrize("key", [key for key, field in SETTINGS.items() if field.annotation in (int, float)])
def test_every_number_has_a_range_and_is_finite(key: str) -> None:
    if SETTINGS[key].annotation is float:
        for value in (math.inf, math.nan):
            assert key in problems(nested(key, value))
    if key != "rewards.functions.weight":
        assert key in problems(nested(key, -1))


def test_live_and_fixed_are_what_they_should_be() -> None:
    live = {key for key in SETTINGS if is_live(key)}
    assert {"run.max_steps", "objective.beta", "learner.learning_rate"} <= live
    assert not live & {"run.seed", "model.path", "sampling.group_size", "actors.count", "learner.groups_per_step", "control.port"}
    assert {key for key in live if key.startswith("objective.")} == {
        *(f"objective.divergence.{name}" for name in ("name", "alpha", "width", "schedule")),
        *(f"objective.{name}" for name in ("beta", "tempered", "log_z_rate", "clip_range", "truncated")),
    }


def test_names_are_written_down_once_for_the_code_and_once_for_the_types() -> None:
    assert get_args(MemberName) == (*DIVERGENCES, "custom")
    assert get_args(Objective.model_fields["kind"].annotation) == OBJECTIVES
    assert set(TOKEN_LEVEL) <= set(OBJECTIVES)


def test_what_lies_inside_a_setting_has_a_key_too() -> None:
    inner = [key for key, _ in all_settings() if key not in SETTINGS]
    assert inner == [
        *(f"rewards.functions[].{name}" for name in ("function", "weight")),
        *(f"objective.divergence.alpha.{name}" for name in ("from", "to", "over")),
        *(f"objective.divergence.schedule[].{name}" for name in ("name", "alpha", "alpha.from", "alpha.to", "alpha.over", "width", "step")),
    ]


@pytest.mark.parametrize(
    ("tree", "key", "guess"),
    [
        ({"objective": {"betta": 1}}, "objective.betta", "objective.beta"),
        ({"objectives": {"beta": 1}}, "objectives", "objective"),
        ({"learner": {"group_size": 1}}, "learner.group_size", "sampling.group_size"),
        ({"objective": {"divergence": {"nam": "tv"}}}, "objective.divergence.nam", "objective.divergence.name"),
        ({"learning_rate": 0.1}, "learning_rate", "learner.learning_rate"),
        ({"rewards": {"functions": [{"function": "a:b", "wieght": 1.0}]}}, "rewards.functions.0.wieght", "rewards.functions[].weight"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tree: dict[str, Any], key: str, guess: str) -> None:
    assert problems(tree) == {key: f"unknown setting; did you mean {guess}?"}


def test_an_unknown_key_like_nothing_known() -> None:
    assert problems({"zzzzqqqq": 1}) == {"zzzzqqqq": "unknown setting"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("objective.beta", "0.1", ['"0.1"', "number"]),
        ("objective.beta", True, ["true", "number"]),
        ("objective.beta", 0, ["0", "greater than or equal to 0.000001"]),
        ("run.max_steps", 1.5, ["1.5", "integer"]),
        ("run.max_steps", 0, ["0", "greater than or equal to 1"]),
        ("run.max_steps", 10**100, ["less than"]),
        ("run.name", "../elsewhere", ["../elsewhere", "match"]),
        ("sampling.group_size", 1, ["1", "greater than or equal to 2"]),
        ("objective.divergence.name", "hellinge", ['"hellinge"', "'hellinger'"]),
        ("model.dtype", "float16", ['"float16"', "'bfloat16'"]),
        ("control.port", 65536, ["65536", "65535"]),
        ("data.shuffle", "yes", ['"yes"', "boolean"]),
        ("rewards.functions", [], ["at least 1"]),
        ("objective", 5, ["5"]),
        ("objective", None, ["null"]),
    ],
)
def test_a_bad_value_names_key_value_and_what_would_be_right(key: str, value: Any, words: list[str]) -> None:
    found = problems(nested(key, value))
    assert list(found) == [key]
    for word in words:
        assert word in found[key]
    assert "\n" not in found[key]


def test_a_reward_is_an_import_path() -> None:
    found = problems({"rewards": {"functions": [{"function": "reward"}, {"weight": 2.0}]}})
    assert "package.module:function" in found["rewards.functions.0.function"]
    assert found["rewards.functions.1.function"] == "is required"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"buffer": {"capacity_groups": 2}}, ["buffer.capacity_groups 2", "learner.groups_per_step 8", "at least"]),
        ({"sampling": {"max_tokens": 512}}, ["sampling.max_tokens 512", "actors.max_model_len 512", "smaller"]),
        ({"control": {"host": "0.0.0.0"}}, ["control.host 0.0.0.0", "control.token_env"]),
        ({"objective": {"divergence": {"name": "alpha"}}}, ["objective.divergence", "needs alpha"]),
        ({"objective": {"divergence": {"name": "tv", "alpha": 0.5}}}, ["alpha 0.5", "tv"]),
        ({"objective": {"divergence": {"name": "js", "width": 0.5}}}, ["objective.divergence", "width 0.5", "tv", "js"]),
        ({"objective": {"divergence": {"schedule": [{"step": 5, "name": "alpha"}]}}}, ["objective.divergence.schedule.0", "needs alpha"]),
        ({"objective": {"divergence": {"schedule": [{"step": 5, "name": "tv", "alpha": RAMP}]}}}, ["schedule.0", "alpha 0.75 to 1.2 over 300 steps", "tv"]),
        ({"objective": {"divergence": {"name": "custom"}}}, ["objective.divergence.name custom", "objective.custom", "package.module:object"]),
        ({"objective": {"divergence": {"schedule": [{"step": 5, "name": "custom"}]}}}, ["objective.divergence.name custom", "objective.custom"]),
        ({"objective": {"kind": "grpo", "log_z": "learned"}}, ["objective.log_z learned", "objective.kind ftb", "grpo", "batch"]),
        ({"objective": {"kind": "importance", "tempered": True}}, ["objective.tempered true", "objective.kind ftb", "importance", "false"]),
        ({"objective": {"kind": "ppo_clip"}, "sampling": {"temperature": 0.7}}, ["sampling.temperature 0.7", "objective.kind ppo_clip", "must be 1"]),
        ({"objective": {"kind": "importance"}, "sampling": {"top_p": 0.9}}, ["sampling.top_p 0.9", "objective.kind importance", "must be 1"]),
    ],
)
def test_an_impossible_combination_names_both_settings(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as caught:
        build_config(tree)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("objective", [{"kind": "ftb", "log_z": "learned"}, {"kind": "grpo", "divergence": {"name": "js"}}, {"custom": "my.members:one"}])
def test_a_possible_combination(objective: dict[str, Any]) -> None:
    build_config({"objective": objective})


def test_another_temperature_is_fine_for_f_trajectory_balance() -> None:
    build_config({"objective": {"kind": "ftb"}, "sampling": {"temperature": 0.7, "top_p": 0.9}})


@pytest.mark.parametrize(
    ("alpha", "key", "message"),
    [
        ("high", "", '"high" is wrong: it should be a valid number'),
        (True, "", "true is wrong: it should be a valid number"),
        ([0.75, 1.2], "", "[0.75, 1.2] is wrong: it should be a valid number"),
        (10.5, "", "10.5 is wrong: it should be less than or equal to 10"),
        ({"from": 0.75, "to": 1.2}, ".over", "is required"),
        (RAMP | {"over": 0}, ".over", "0 is wrong: it should be greater than or equal to 1"),
        (RAMP | {"over": 1.5}, ".over", "1.5 is wrong: it should be a valid integer"),
        (RAMP | {"from": -11}, ".from", "-11 is wrong: it should be greater than or equal to -10"),
        (RAMP | {"to": None}, ".to", "null is wrong: it should be a valid number"),
        (RAMP | {"form": 1.0}, ".form", "unknown setting; did you mean objective.divergence.alpha.from?"),
    ],
)
def test_a_wrong_alpha_is_one_line(alpha: Any, key: str, message: str) -> None:
    found = problems({"objective": {"divergence": {"name": "alpha", "alpha": alpha}}})
    assert found == {f"objective.divergence.alpha{key}": message}


@pytest.mark.parametrize(
    ("schedule", "key", "message"),
    [
        ({"step": 5}, "", '{"step": 5} is wrong: it should be a valid list'),
        ([{"step": 9, "name": "js"}, {"step": 9, "name": "tv"}], "", "step 9 stands after step 9; the steps must increase"),
        ([{"step": 9, "name": "js"}, {"step": 5, "name": "tv"}], "", "step 5 stands after step 9; the steps must increase"),
        ([{"step": 0, "name": "js"}], ".0.step", "0 is wrong: it should be greater than or equal to 1"),
        ([{"name": "js"}], ".0.step", "is required"),
        ([{"step": 5}], ".0.name", "is required"),
        ([{"step": 5, "name": "tv", "width": 0}], ".0.width", "0 is wrong: it should be greater than 0"),
        ([{"step": 5, "name": "alpha", "alpha": "high"}], ".0.alpha", '"high" is wrong: it should be a valid number'),
        ([{"step": 5, "name": "alpha", "alpha": RAMP | {"to": 11}}], ".0.alpha.to", "11 is wrong: it should be less than or equal to 10"),
        ([{"step": 5, "nane": "js", "name": "js"}], ".0.nane", "unknown setting; did you mean objective.divergence.schedule[].name?"),
        ([{"step": 5, "name": "js", "schedule": []}], ".0.schedule", "unknown setting; did you mean objective.divergence.schedule?"),
    ],
)
def test_a_wrong_schedule_is_one_line(schedule: Any, key: str, message: str) -> None:
    assert problems({"objective": {"divergence": {"schedule": schedule}}}) == {f"objective.divergence.schedule{key}": message}


def test_ramps_and_schedules_are_written_as_they_are_read() -> None:
    divergence = {
        "name": "alpha",
        "alpha": RAMP,
        "width": None,
        "schedule": [
            {"step": 200, "name": "tv", "alpha": None, "width": 0.1},
            {"step": 300, "name": "alpha", "alpha": {"from": 2.0, "to": -1.0, "over": 1}, "width": None},
        ],
    }
    config = build_config({"objective": {"divergence": divergence}})
    assert config.model_dump(mode="json")["objective"]["divergence"] == divergence
    for tree in (config.model_dump(), config.model_dump(mode="json"), json.loads(config.model_dump_json())):
        assert build_config(tree) == config
    file = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert build_config(file) == config


@pytest.mark.parametrize(
    ("divergence", "text"),
    [
        ({"name": "hellinger"}, "hellinger"),
        ({"name": "alpha", "alpha": 0.5}, "alpha 0.5"),
        ({"name": "alpha", "alpha": RAMP}, "alpha 0.75 to 1.2 over 300 steps"),
        ({"name": "tv", "width": 0.1}, "tv of width 0.1"),
    ],
)
def test_a_member_in_a_few_words(divergence: dict[str, Any], text: str) -> None:
    assert build_config({"objective": {"divergence": divergence}}).objective.divergence.text == text


def test_a_custom_member_is_an_import_path() -> None:
    found = problems({"objective": {"custom": "my_divergences"}})
    assert found == {"objective.custom": "must be written package.module:object, for example my_divergences:member"}


def test_every_problem_is_reported_at_once() -> None:
    assert set(problems({"objective": {"beta": -1}, "run": {"seed": "x"}, "bufer": {}})) == {"objective.beta", "run.seed", "bufer"}


def test_errors_survive_pickling() -> None:
    with pytest.raises(InvalidConfig) as caught:
        build_config({"objective": {"beta": -1}})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


def test_a_config_is_immutable() -> None:
    with pytest.raises(ValidationError):
        Config().objective.beta = 1.0


@pytest.mark.parametrize(
    ("word", "tree"),
    [
        ("objective.beta=0.1", {"objective": {"beta": 0.1}}),
        ("learner.learning_rate=1e-4", {"learner": {"learning_rate": 1e-4}}),
        ("staleness.max_steps=null", {"staleness": {"max_steps": None}}),
        ("data.shuffle=false", {"data": {"shuffle": False}}),
        ("model.lora.targets=[q_proj, v_proj]", {"model": {"lora": {"targets": ["q_proj", "v_proj"]}}}),
        ("model.path=/data/a=b", {"model": {"path": "/data/a=b"}}),
        ("run.max_steps=5", {"run": {"max_steps": 5}}),
        (
            "objective.divergence={name: alpha, alpha: {from: 5e-1, to: 1.2, over: 300}}",
            {"objective": {"divergence": {"name": "alpha", "alpha": {"from": 0.5, "to": 1.2, "over": 300}}}},
        ),
        (
            "objective.divergence.schedule=[{step: 5, name: tv, width: 1e-1}]",
            {"objective": {"divergence": {"schedule": [{"step": 5, "name": "tv", "width": 0.1}]}}},
        ),
    ],
)
def test_overrides_are_yaml(word: str, tree: dict[str, Any]) -> None:
    assert parse_override(word) == tree
    build_config(tree)


@pytest.mark.parametrize("word", ["objective.beta", "=1", ""])
def test_an_override_needs_a_key_and_a_value(word: str) -> None:
    with pytest.raises(InvalidConfig, match=r"section\.key=value"):
        load_config([], [word])


def test_files_go_left_to_right_and_overrides_last(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("objective: {beta: 0.1, tempered: true}\nrun: {max_steps: 10}\n", encoding="utf-8")
    second.write_text("objective: {beta: 0.2}\nrun: {seed: 3}\n", encoding="utf-8")
    config = load_config([first, second], ["run.seed=4"])
    assert (config.objective.beta, config.objective.tempered, config.run.max_steps, config.run.seed) == (0.2, True, 10, 4)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n", encoding="utf-8")
    assert load_config([tmp_path / "empty.yaml"]) == Config()


@pytest.mark.parametrize(
    ("content", "words"), [(b"a: [", "not YAML"), (b"\xff\xfe\x00", "not YAML"), (b"- 1\n- 2\n", "holds a list"), (b"just text", "holds a str")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=words) as caught:
        load_config([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"nowhere\.yaml can't be read: No such file"):
        load_config([tmp_path / "nowhere.yaml"])


def test_merge_touches_neither_side() -> None:
    base, patch = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": [1]}
    assert merge(base, patch) == {"a": {"b": 3, "c": 2}, "d": [1]}
    assert (base, patch) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": [1]})


def test_every_shipped_config_loads() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {"base.yaml", "quickstart.yaml", "sums.yaml"} <= {file.name for file in files}
    for file in files:
        load_config([file])


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ({"ranks": 9}, "learner.ranks 9 leaves ranks without a group of learner.groups_per_step 8; it must be at most that, since a group is never split"),
        ({"sharding": "fsdp2"}, "learner.sharding fsdp2 has nothing to share with learner.ranks 1; it must be replicated, or learner.ranks at least 2"),
        (
            {"ranks": 2, "gpus": 0.5},
            "learner.gpus 0.5 is for each of learner.ranks 2, and a rank uses one GPU of its own; it must be 1, or 0 without GPUs",
        ),
        ({"ranks": 2, "cpus": 0}, "learner.cpus 0 and learner.gpus 0 reserve no place for learner.ranks 2; one of them must be above 0"),
    ],
)
def test_ranks_have_work_and_a_place(learner: dict[str, Any], message: str) -> None:
    assert list(problems({"learner": learner}).values()) == [message]


@pytest.mark.parametrize("learner", [{"ranks": 8, "sharding": "fsdp2"}, {"ranks": 2, "gpus": 1, "cpus": 0}, {"gpus": 0.5}])
def test_ranks_that_go_together(learner: dict[str, Any]) -> None:
    assert build_config({"learner": learner})

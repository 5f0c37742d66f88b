"""`section.key=value` words: the value is what the setting is."""

from typing import Any

import pytest

from ftb_llm.config import build_config, load_config
from ftb_llm.config.load import merge_overrides, parse_override
from ftb_llm.errors import InvalidConfig


def value_of(word: str) -> Any:
    value: Any = parse_override(word)
    for part in word.partition("=")[0].split("."):
        value = value[part]
    return value


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.name=007", "007"),
        ("run.name=1e5", "1e5"),
        ("run.name=2026-01-01", "2026-01-01"),
        ("run.name=12:30", "12:30"),
        ("run.name=true", "true"),
        ("run.name='007'", "007"),
        ("run.name=null", None),
        ("control.host=::", "::"),
        ("control.host=::1", "::1"),
        ("data.path=s3: //bucket", "s3: //bucket"),
        ("model.lora.targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.lora.targets=all-linear", "all-linear"),
        ("run.max_steps=1e6", 1_000_000),
        ("run.max_steps=1_000", 1000),
        ("run.max_steps=1.5", 1.5),
        ("run.seed=010", 10),
        ("objective.beta=1e-1", 0.1),
        ("objective.beta=1", 1),
        ("staleness.max_steps=~", None),
        ("data.shuffle=no", False),
        ("objective.divergence.alpha=5e-1", 0.5),
    ],
)
def test_a_value_is_read_as_what_the_setting_is(word: str, value: Any) -> None:
    found = value_of(word)
    assert (found, type(found)) == (value, type(value))


def test_such_values_make_a_config() -> None:
    config = load_config((), ["run.name=007", "run.max_steps=1e6", "control.host=::", "control.token_env=TOKEN"])
    assert (config.run.name, config.run.max_steps, config.control.host) == ("007", 1_000_000, "::")


@pytest.mark.parametrize("word", ["objective.divergence=hellinger", "objective.divergence.name=hellinger", "objective.divergence={name: hellinger}"])
def test_the_name_of_a_divergence_stands_for_it(word: str) -> None:
    assert parse_override(word) == {"objective": {"divergence": {"name": "hellinger"}}}


def test_the_short_form_goes_with_what_else_is_said_of_the_divergence() -> None:
    config = load_config((), ["objective.divergence=tv", "objective.divergence.width=0.1"])
    assert config.objective.divergence.text == "tv of width 0.1"


def test_a_file_may_write_numbers_as_people_do(tmp_path) -> None:
    path = tmp_path / "numbers.yaml"
    ramp = "{name: alpha, alpha: {from: 1e-1, to: 1.2, over: 300}, schedule: [{step: 500, name: tv, width: 1e-2}]}"
    path.write_text(f"run: {{name: 1e5, max_steps: 1e6}}\nlearner: {{learning_rate: 1e-4}}\nobjective: {{divergence: {ramp}}}\n")
    config = load_config([path])
    assert (config.run.name, config.run.max_steps, config.learner.learning_rate) == ("1e5", 1_000_000, 1e-4)
    assert config.objective.divergence.text == "alpha 0.1 to 1.2 over 300 steps"
    assert config.objective.divergence.schedule[0].width == 0.01


def test_the_short_form_in_a_file(tmp_path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("objective: {divergence: hellinger}\n")
    assert load_config([path]).objective.divergence.name == "hellinger"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("objective.beta=", "objective.beta: has no value after the =, as when a shell variable is not set; write objective.beta=null where none is meant"),
        ("run.name=  ", "run.name: has no value after the =, as when a shell variable is not set; write run.name=null where none is meant"),
        ("objective.beta=.inf", 'objective.beta: ".inf" is wrong: it should be a finite number'),
        ("objective.beta=1e999", 'objective.beta: "1e999" is wrong: it should be a finite number'),
        (".objective=5", "'.objective=5' is not a setting; write it section.key=value, for example objective.beta=0.1"),
        ("objective..beta=5", "'objective..beta=5' is not a setting; write it section.key=value, for example objective.beta=0.1"),
        ("run.max_steps=1.5", "run.max_steps: 1.5 is wrong: it should be a valid integer"),
        ("nonsense=1", "nonsense: unknown setting"),
        ("objective=5", "objective: 5 is wrong: it should be a mapping of settings, such as objective.kind"),
        ("objective.divergence=5", "objective.divergence: 5 is wrong: it should be a mapping of settings, such as objective.divergence.name"),
        (
            "objective.divergence={name: js, name: tv}",
            "name: is given more than once in objective.divergence, in line 1; write it once, with all that belongs to it",
        ),
    ],
)
def test_what_is_wrong_is_one_line(word: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config((), [word])
    assert str(caught.value) == message


def test_a_wrong_value_is_shown_in_part_when_it_is_long() -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config((), [f"objective.beta={'[' * 5000}"])
    assert len(str(caught.value)) < 300


def test_a_key_without_a_name_is_shown() -> None:
    with pytest.raises(InvalidConfig) as caught:
        build_config({"": 5})
    assert str(caught.value) == '"": unknown setting'


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("objective.beta", "objective.beta=0.3", "objective.beta=0.35"),
        ("objective.divergence.name", "objective.divergence=tv", "objective.divergence.name=js"),
        ("objective.divergence.name", "objective.divergence={name: tv, width: 0.1}", "objective.divergence=js"),
    ],
)
def test_a_setting_that_is_given_twice_is_a_mistake(key: str, first: str, second: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        merge_overrides({}, [first, "run.seed=1", second])
    assert str(caught.value) == f"{key}: is given more than once: {first} and {second}; give it once"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_every_address_of_this_machine_alone_needs_no_token(host: str) -> None:
    assert build_config({"control": {"host": host}}).control.host == host


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.name=exp #3", "exp #3"),
        ("run.name=#1", "#1"),
        ("run.name=&a b", "&a b"),
        ("run.name='quoted'", "quoted"),
        ("data.path=/d/set #2.jsonl", "/d/set #2.jsonl"),
    ],
)
def test_text_stays_as_it_stands(word: str, value: str) -> None:
    section, _, name = word.partition("=")[0].partition(".")
    assert parse_override(word)[section][name] == value


def test_a_number_means_the_same_in_a_file_as_in_a_word(tmp_path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("run: {max_steps: 010}\n")
    assert load_config([path]).run.max_steps == parse_override("run.max_steps=010")["run"]["max_steps"] == 10
    path.write_text("run: {max_steps: 1:30}\n")
    with pytest.raises(InvalidConfig, match=r"run\.max_steps"):
        load_config([path])
    with pytest.raises(InvalidConfig, match=r"objective\.beta"):
        build_config(parse_override("objective.beta=1:30.5"))

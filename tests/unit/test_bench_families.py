"""The bench of model families: its verdicts and table, its configurations, and real tiny models through it, right ones and one that is not."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftb_llm.bench.families import FAMILIES, Row, Verdict, counts, documents, families_table, judged, measure, row_of, trial_told
from ftb_llm.bench.family_spec import Errors, Family, Found, Task, family, routed
from ftb_llm.cli.main import main
from learner import family_judge
from learner.family_judge import gradient_error, judge, sum_error, token_error
from learner.family_models import build, config_of, load_naive
from learner.head import chosen_logprobs

ROOT = Path(__file__).parents[2]
LLAMA = family("llama")
SMALL = Errors(value=1e-7, reference=1e-7, gradient=1e-6)
GOOD = Found(packed=True, adapted=1.0, ours=SMALL, naive=SMALL, merged=1e-7)
FLOAT32, BFLOAT16 = Task(family=LLAMA, dtype="float32"), Task(family=LLAMA, dtype="bfloat16")


def answer(task: Task) -> Found:
    """Of a process: one family of each verdict, and one that dies."""
    return {"llama": GOOD, "gpt2": Found(refused="not it"), "phi": Found(failed="ValueError: no")}[task.family.name]


def no_export(run: Path, out: Path) -> None:
    raise AssertionError("nothing is exported in bfloat16 or where the model is refused")


def test_what_is_as_near_as_the_naive_loop_is_right() -> None:
    assert judged(FLOAT32, GOOD) == (Verdict.RIGHT, "")


@pytest.mark.parametrize("name", ["value", "reference", "gradient"])
@pytest.mark.parametrize("far", [0.1, math.nan, math.inf])
def test_each_number_that_is_off_is_wrong_and_named(name: str, far: float) -> None:
    verdict, why = judged(FLOAT32, replace(GOOD, ours=replace(SMALL, **{name: far})))
    assert verdict is Verdict.WRONG
    assert why.startswith(name)


def test_a_merged_export_that_is_another_model_is_wrong() -> None:
    assert judged(FLOAT32, replace(GOOD, merged=0.01))[0] is Verdict.WRONG


def test_where_rounding_is_large_for_everyone_it_may_be_for_us() -> None:
    rough = Errors(value=1e-7, reference=1e-7, gradient=1e-3)
    assert judged(FLOAT32, replace(GOOD, naive=rough, ours=replace(rough, gradient=9e-3)))[0] is Verdict.RIGHT
    assert judged(FLOAT32, replace(GOOD, naive=rough, ours=replace(rough, gradient=2e-2)))[0] is Verdict.WRONG


def test_a_naive_loop_that_breaks_excuses_nothing() -> None:
    broken = Errors(value=math.inf, reference=math.nan, gradient=math.inf)
    assert judged(FLOAT32, replace(GOOD, naive=broken, ours=replace(SMALL, value=0.5)))[0] is Verdict.WRONG


def test_routers_get_more_room_in_bfloat16() -> None:
    naive = Errors(value=0.01, reference=0.01, gradient=0.1)
    found = replace(GOOD, naive=naive, ours=replace(naive, value=0.05), merged=None)
    assert judged(BFLOAT16, found)[0] is Verdict.WRONG
    assert judged(replace(BFLOAT16, family=routed("mixtral")), found)[0] is Verdict.RIGHT


def test_families_are_judged_in_turn_in_a_process() -> None:
    said: list[str] = []
    rows = measure([LLAMA, family("gpt2"), family("phi"), family("opt")], dtype="float32", judge=answer, say=said.append)
    assert [row.verdict for row in rows] == [Verdict.RIGHT, Verdict.REFUSED, Verdict.FAILED, Verdict.FAILED]
    assert [row.why for row in rows[:3]] == ["", "not it", "ValueError: no"]
    assert "the process died" in rows[3].why  # a KeyError in the process's own loop ends it
    assert said[1] == "2/4 gpt2: refused (not it)"
    assert counts(rows) == {"right": 1, "refused": 1, "wrong": 0, "failed": 2}


def test_the_table_says_what_was_compared() -> None:
    rows = [row_of(FLOAT32, GOOD), row_of(replace(FLOAT32, family=family("gpt2")), Found(refused="not it"))]
    table = families_table(rows)
    assert table.title.startswith("1 right, 1 refused, 0 wrong, 0 failed (float32, torch ")
    assert table.rows[1:] == [
        ["llama", "llama", "right", "yes", "100%", "1e-07 (1e-07)", "1e-06 (1e-06)", "1e-07", ""],
        ["gpt2", "gpt2", "refused", "–", "–", "–", "–", "–", "not it"],
    ]
    assert documents(rows)["counts"]["refused"] == 1


def test_the_trial_has_a_goal() -> None:
    assert trial_told(0.5) == "trial at load of a 135 M model, float32: 0.50 s (goal: under 2 s; met)"
    assert trial_told(2.5).endswith("missed)")


def test_names_are_unique_and_every_config_can_be_made() -> None:
    names = [one.name for one in FAMILIES]
    assert names == sorted(set(names))
    for one in FAMILIES:
        assert config_of(one).model_type == one.model_type


def test_the_page_has_a_row_for_every_family_and_none_is_wrong() -> None:
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    _header, *rows = re.findall(r"^\| (\w+) \| ([\w-]+) \| (\w+) \|", page, flags=re.MULTILINE)
    assert [(name, kind) for name, kind, _ in rows] == [(one.name, one.model_type) for one in FAMILIES]
    assert {verdict for *_, verdict in rows} == {"right", "refused"}
    told = re.findall(r"(\d+) right, (\d+) refused, 0 wrong, 0 failed", page)
    assert (str(sum(verdict == "right" for *_, verdict in rows)), str(sum(verdict == "refused" for *_, verdict in rows))) in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "lama"], "argument --only: lama is no family of this bench; docs/families.md lists them"),
        (["--dtype", "int8"], "argument --dtype: int8 is no dtype of this bench; it should be float32 or bfloat16"),
    ],
)
def test_the_users_mistakes_are_one_clear_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "families", *words]) == 2
    assert capsys.readouterr().err.strip() == f"ftb-llm: error: {message}"


def test_one_command_judges_and_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(families: list[Family], **_: object) -> list[Row]:
        return [row_of(Task(family=one, dtype="float32"), GOOD if one.name == "llama" else Found(failed="no")) for one in families]

    monkeypatch.setattr("ftb_llm.bench.families.measure", measured)
    assert main(["bench", "families", "--only", "llama", "--markdown"]) == 0
    assert "| llama | llama | right | yes |" in capsys.readouterr().out
    assert main(["bench", "families", "--only", "llama", "phi"]) == 1


def test_errors_are_of_sums_tokens_and_the_worst_tensor() -> None:
    truth = [torch.tensor([-1.0, -9.0]), torch.tensor([-0.25])]
    found = [torch.tensor([-1.0, -8.0]), torch.tensor([-0.75])]
    assert sum_error(found, truth) == 0.5  # of -0.25, which counts as if it were -1; of -10 it is 0.1
    assert token_error(found, truth) == pytest.approx(math.sqrt(1.25 / 3))
    assert sum_error([torch.tensor([math.nan])], [torch.tensor([1.0])]) == math.inf
    assert gradient_error({"a": torch.tensor([3.0]), "b": torch.tensor([1e-6])}, {"a": torch.tensor([2.0]), "b": torch.tensor([0.0])}) == 0.5


def test_a_model_is_built_the_same_at_every_call_with_nothing_at_rest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(LLAMA, "float32", tmp_path / name)
    one, two = (load_naive(tmp_path / name, torch.float32, "eager").state_dict() for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not any(bool((tensor == 1).all()) for tensor in one.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_llama_is_right(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_judge, "exported", lambda *_, **__: 0.0)
    task = Task(family=LLAMA, dtype=dtype)
    found = judge(task, tmp_path, no_export)
    assert judged(task, found) == (Verdict.RIGHT, ""), found
    assert found.packed
    assert found.adapted == 1.0


def test_a_learner_that_scores_another_distribution_is_found_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_judge, "exported", lambda *_, **__: 0.0)

    def warmer(*args: object, **kwargs: object) -> torch.Tensor:
        return 1.01 * chosen_logprobs(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("learner.ways.chosen_logprobs", warmer)
    monkeypatch.setattr("learner.logprobs.take_packed", lambda model, **_: bool(model.set_attn_implementation("ftb_packed")) or True)
    verdict, why = judged(FLOAT32, judge(FLOAT32, tmp_path, no_export))
    assert verdict is Verdict.WRONG
    assert re.match(r"value .*reference .*gradient ", why)


def test_what_is_raised_after_the_check_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_judge, "AdaptedModel", lambda *_: 1 // 0)
    assert judge(FLOAT32, tmp_path, no_export).failed == "ZeroDivisionError: integer division or modulo by zero"

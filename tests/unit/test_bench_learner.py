"""The bench of the learner's step: its operations against torch's own count, its rows, and ours beside full logits for real."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from ftb_llm.bench import trl
from ftb_llm.bench.learner import Failed, check_memory, in_a_process, measure, row_of, summary
from ftb_llm.bench.random_model import ensure_model
from ftb_llm.bench.step_cases import CASES, COMPILED, CONTENDERS, Case, Shape
from ftb_llm.bench.step_flops import case_flops, step_flops
from ftb_llm.bench.step_report import learner_picture, learner_tables
from ftb_llm.errors import FtbError, SetupError
from learner.contenders import matmul_rate, run
from tests.tiny_llama import needs_compiler
from tools.check_lock import read_pins

ROOT = Path(__file__).parents[2]
SHAPE = Shape(hidden=128, layers=2, vocabulary=96, rank=4)
CASE = Case(size="small", shape=SHAPE, groups=2, group_size=3, prompt_tokens=8, completion_tokens=8)
SECONDS = {"ours": 1.0, "full logits": 2.0, "TRL": 5.0, COMPILED: 0.8}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTB_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = ensure_model(SHAPE)
        assert ensure_model(SHAPE) == folder
    return folder


def found(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What a contender's process would print."""
    rows = [len(prompt) + len(own) for prompt, group in zip(spec["prompts"], spec["completions"], strict=True) for own in group]
    taken = spec["warmup"] + spec["steps"]
    result: dict[str, Any] = {
        "seconds": [100.0] * spec["warmup"] + [SECONDS[name]] * spec["steps"],
        "losses": None if name == "TRL" else [0.5] * taken,
        "loaded_bytes": 2**30,
        "peak_bytes": 2**30 + int(SECONDS[name] * 2**30),
        "tokens_per_step": sum(rows),
        "versions": {"torch": "2"},
        "others_cores": 0.0 if name == "ours" else 1.5,
    }
    return result | {"matmul": {"square": 1e9, "feed_forward": 2e9}} if name == "ours" else result


def measured(*cases: Case, call: Any = found, names: Sequence[str] = CONTENDERS) -> dict[str, Any]:
    return measure(cases, steps=3, threads=2, call=call, model=lambda shape: Path("model"), say=lambda line: None, names=names)


def test_the_formula_is_what_torch_counts(model_path: Path) -> None:
    """On one row without a mask, whose eager attention counts every pair: the square of the tokens."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=SHAPE.rank, target_modules="all-linear"))
    ids = torch.arange(20).view(1, -1)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids, logits_to_keep=7)
        model(input_ids=ids, logits_to_keep=7).logits.sum().backward()
    assert counter.get_total_flops() == step_flops(SHAPE, tokens=20, predicting=7, pairs=20 * 20)


def test_a_case_counts_each_prompt_once_and_no_token_after_the_last() -> None:
    # one completion token: it is predicted by the prompt's last position, and goes in nowhere
    alone = Case(size="x", shape=SHAPE, groups=1, group_size=5, prompt_tokens=4, completion_tokens=1)
    assert case_flops(alone) == step_flops(SHAPE, tokens=4, predicting=1, pairs=10)
    # two: each completion's first token attends to the prompt and itself
    two = replace(alone, completion_tokens=2, groups=3)
    assert case_flops(two) == 3 * step_flops(SHAPE, tokens=4 + 5, predicting=6, pairs=10 + 5 * 5)


def test_ours_and_full_logits_do_the_same(model_path: Path) -> None:
    spec = CASE.spec(model_path=str(model_path), warmup=0, steps=3, threads=torch.get_num_threads())
    ours, full = (run(spec | {"contender": name}) for name in ("ours", "full logits"))
    assert ours["losses"] == pytest.approx(full["losses"], rel=1e-4)
    assert ours["losses"][0] != pytest.approx(ours["losses"][2])  # the optimizer moved
    assert len(ours["seconds"]) == 3
    assert ours["peak_bytes"] > 0
    assert ours["tokens_per_step"] == full["tokens_per_step"] == CASE.tokens_per_step == 96
    assert set(ours["matmul"]) == {"square", "feed_forward"}


@needs_compiler
def test_the_compiled_step_does_the_same(model_path: Path) -> None:
    spec = CASE.spec(model_path=str(model_path), warmup=0, steps=2, threads=torch.get_num_threads())
    ours, compiled = (run(spec | {"contender": name}) for name in ("ours", COMPILED))
    assert compiled["losses"] == pytest.approx(ours["losses"], rel=1e-4)


def test_the_rate_is_of_the_product() -> None:
    assert 1e6 < matmul_rate(64, 64, 64) < 1e13


def test_contenders_take_turns_and_warm_up() -> None:
    asked: list[tuple[str, int]] = []

    def call(name: str, spec: dict[str, Any]) -> dict[str, Any]:
        asked.append((name, spec["steps"]))
        return found(name, spec)

    rows = measured(CASE, call=call)["rows"]
    assert asked == [(name, 2) for name in CONTENDERS] * 2  # three steps in two turns are two each
    assert [row["seconds_each"] for row in rows] == [[SECONDS[name]] * 4 for name in CONTENDERS]
    assert [row["speedup"] for row in rows] == [1.0, 2.0, 5.0]
    assert [row["tokens_per_second"] for row in rows] == [96.0, 48.0, 19.2]
    assert rows[0]["matmul_fraction"] == pytest.approx(case_flops(CASE) / 1e9)


def test_the_compiled_step_is_measured_when_asked_for() -> None:
    told = measured(CASE, names=(*CONTENDERS, COMPILED))
    assert [(row["contender"], row["speedup"]) for row in told["rows"]][3:] == [(COMPILED, 0.8)]
    assert told["loss_difference"] == 0.0
    assert COMPILED in learner_picture(told)


def test_the_summary_takes_each_number_from_its_case() -> None:
    told = measured(CASE, replace(CASE, prompt_tokens=64), replace(CASE, size="large"), replace(CASE, size="vocabulary", completion_tokens=16))
    assert (told["speedup_vs_trl_1to1"], told["speedup_vs_full_logits_8to1"], told["speedup_size"]) == (5.0, 2.0, "small")
    assert told["peak_memory_ratio_vs_full_logits"] == 0.5
    assert told["matmul_fraction"] == pytest.approx(case_flops(CASE) / 1e9)
    assert told["loss_difference"] == 0.0
    assert {"cores", "threads", "torch", "date"} <= set(told["machine"])
    json.dumps(told)


def test_the_memory_told_is_that_of_the_worst_case() -> None:
    rows = measured(replace(CASE, size="vocabulary"), replace(CASE, size="vocabulary", prompt_tokens=64))["rows"]
    rows[0]["step_bytes"] *= 1.5
    assert summary(rows)["peak_memory_ratio_vs_full_logits"] == 0.75
    assert summary(rows[::-1])["peak_memory_ratio_vs_full_logits"] == 0.75
    assert summary(rows[:1] + rows[3:])["peak_memory_ratio_vs_full_logits"] == 0.5


def test_what_was_not_measured_is_null() -> None:
    def call(name: str, spec: dict[str, Any]) -> dict[str, Any]:
        if name == "TRL":
            raise Failed("no environment")
        return found(name, spec)

    told = measured(CASE, call=call)
    assert told["rows"][2]["error"] == "no environment"
    assert told["rows"][2]["seconds"] is told["speedup_vs_trl_1to1"] is told["matmul_fraction"] is told["peak_memory_ratio_vs_full_logits"] is None
    assert told["speedup_vs_full_logits_1to1"] == 2.0
    lines = learner_tables(told)[0].rows
    assert lines[3][2:6] == ["TRL", "–", "–", "–"]
    assert summary([])["speedup_size"] is None


def test_ours_must_succeed() -> None:
    def call(name: str, spec: dict[str, Any]) -> dict[str, Any]:
        raise Failed("broken")

    with pytest.raises(Failed, match="broken"):
        measured(CASE, call=call)


def test_a_contender_that_took_other_samples_is_no_contender() -> None:
    spec = CASE.spec(model_path="", warmup=1, steps=1, threads=1)
    with pytest.raises(FtbError, match="TRL took steps of 7 tokens, not of the case's 96"):
        row_of(CASE, "TRL", [found("TRL", spec) | {"tokens_per_step": 7}], error=None)


def test_full_logits_is_not_started_where_it_would_not_fit() -> None:
    huge = replace(CASE, groups=10**9)
    check_memory(huge, "ours")
    with pytest.raises(Failed, match=r"needs about \d+ GiB, and \d+ GiB are free"):
        check_memory(huge, "full logits")


def test_tables_and_picture() -> None:
    told = measured(CASE, replace(CASE, prompt_tokens=64))
    rows, rates, short = learner_tables(told)
    assert "tokens are prompt and completion of every row" in rows.title
    assert [line[5] for line in rows.rows[1:]] == ["–", "2.00", "5.00"] * 2
    assert len(rates.rows) == 1 + 2
    assert ["speedup_vs_trl_8to1", "5"] in short.rows
    root = ElementTree.fromstring(learner_picture(told))
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"small 1:1", "small 8:1", "ours", "full logits", "TRL", "Seconds a step"} <= words


def test_a_busy_machine_is_said() -> None:
    said: list[str] = []
    measure([CASE], steps=2, threads=2, call=found, model=lambda shape: Path("model"), say=said.append)
    assert ["so the time means little" in line for line in said] == [False, True, True]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(Failed, match="its process ended with exit code 1: ValueError: no such thing"):
        in_a_process([sys.executable, "-c", "raise ValueError('no such thing')"], {"threads": 1})
    assert in_a_process([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"], {"threads": 1})["a"] == 1


def test_without_a_checkout_trl_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(trl, "ROOT", tmp_path)
    monkeypatch.setattr(trl, "SCRIPT", tmp_path / "tools/trl_step.py")
    with pytest.raises(SetupError):
        trl.trl_python(said.append)
    assert trl.interpreter(said.append) == "tools/trl_step.py is only in a checkout"
    assert said == ["TRL is left out: tools/trl_step.py is only in a checkout"]


def test_trl_is_pinned_to_what_we_run_on() -> None:
    own, problems = read_pins(ROOT / "requirements/trl.txt")
    cpu, _ = read_pins(ROOT / "requirements/cpu.txt")
    assert problems == []
    assert {name for name, version in own.items() if cpu.get(name) != version} == {"trl"}


def test_the_cases_hold_what_the_headlines_need() -> None:
    named = {(case.size, case.ratio) for case in CASES}
    assert {("small", "1:1"), ("small", "8:1"), ("large", "1:1")} <= named
    assert all(case.full_logits_bytes < 18 * 2**30 for case in CASES)

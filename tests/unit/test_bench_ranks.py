"""The bench of the learner's ranks: its rows, headline and notes, and two ranks for real."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.bench.random_model import ensure_model
from ftb_llm.bench.ranks import measure, pairs, ranks_tables, row_of, summary
from ftb_llm.bench.step_cases import RANK_CASES, Case, Shape
from ftb_llm.config import Config
from learner.rank_bench import run

SHAPE = Shape(hidden=128, layers=2, vocabulary=96, rank=4)
CASE = Case(size="tiny", shape=SHAPE, groups=3, group_size=2, prompt_tokens=4, completion_tokens=4)
MANY = 1000  # ranks, more than any machine's cores


def found(spec: dict[str, Any]) -> dict[str, Any]:
    """What a process would print: a slow step to warm up, then steps of a second, the last rank's a little longer."""

    def step(seconds: float) -> dict[str, float]:
        several = {"time/communication_seconds": 0.01 * spec["ranks"], "time/rank_wait_seconds": 0.1}
        return {"seconds": seconds} | (several if spec["ranks"] > 1 else {})

    steps = [step(100.0)] * spec["warmup"] + [step(1.0)] * spec["steps"]
    ranks = [{"steps": steps, "adapter_difference": 1e-7} for _ in range(spec["ranks"] - 1)]
    last = {"steps": [one | {"seconds": 2 * one["seconds"]} for one in steps], "adapter_difference": 0.0 if spec["ranks"] == 1 else 3e-7}
    return {"ranks": [*ranks, last], "gradient_bytes": 4096, "others_cores": 0.0}


def measured(*counts: int, call: Callable[[dict[str, Any]], dict[str, Any]] = found, said: list[str] | None = None) -> dict[str, Any]:
    return measure(CASE, counts=counts, steps=3, call=call, model=lambda shape: Path("model"), say=[].append if said is None else said.append)


def test_one_rank_comes_first_and_is_never_sharded() -> None:
    assert pairs([4, 2]) == [(1, "replicated"), (2, "replicated"), (2, "fsdp2"), (4, "replicated"), (4, "fsdp2")]


def test_every_process_gets_the_same_samples_and_its_share_of_the_cores() -> None:
    specs: list[dict[str, Any]] = []

    def call(spec: dict[str, Any]) -> dict[str, Any]:
        specs.append(spec)
        return found(spec)

    measured(1, 2, MANY, call=call)
    assert len({json.dumps([spec["prompts"], spec["completions"], spec["rewards"]]) for spec in specs}) == 1
    assert len({spec["adapter"] for spec in specs}) == 1
    assert specs[0]["threads"] >= specs[1]["threads"] >= specs[-1]["threads"] == 1


def test_a_row_is_of_the_slowest_rank_and_without_the_warm_up() -> None:
    alone, two, _ = measured(1, 2)["rows"]
    assert (alone["seconds"], alone["communication_share"], alone["wait_share"], alone["gradient_bytes"]) == (2.0, 0.0, 0.0, 0)
    assert two["seconds_each"] == [2.0] * 3
    assert two["tokens_per_second"] == CASE.tokens_per_step / 2.0
    assert (two["communication_seconds"], two["wait_seconds"], two["gradient_bytes"]) == (0.02, 0.1, 4096)
    assert (two["communication_share"], two["wait_share"]) == pytest.approx((0.01, 0.05))
    assert two["adapter_difference"] == 3e-7


def test_the_headline_is_the_largest_share_of_replicated_ranks() -> None:
    rows = [
        {"ranks": ranks, "sharding": sharding, "communication_share": share, "adapter_difference": difference, "others_cores": 0.0}
        for ranks, sharding, share, difference in (
            (1, "replicated", 0.0, 0.0),
            (2, "replicated", 0.02, 1e-7),
            (2, "fsdp2", 0.3, 2e-7),
            (4, "replicated", 0.01, 0.0),
        )
    ]
    assert summary(rows, cores=4) == {"communication_share": 0.02, "adapter_difference": 2e-7, "notes": []}
    assert summary(rows[:1], cores=4) == {"communication_share": None, "adapter_difference": None, "notes": []}


def test_more_ranks_than_cores_and_a_busy_machine_are_said() -> None:
    said: list[str] = []
    told = measured(MANY, call=lambda spec: found(spec) | {"others_cores": 1.0}, said=said)
    crowded, busy = told["notes"]
    assert crowded.startswith(f"{MANY} ranks on ")
    assert crowded.endswith("cores: the step's time says nothing about scaling, only the shares do")
    assert "mean little" in busy
    assert said[-2:] == told["notes"]
    assert crowded in ranks_tables(told)[0].title


def test_the_tables() -> None:
    told = measured(1, 2)
    json.dumps(told)
    rows, short = ranks_tables(told)
    assert [line[:2] for line in rows.rows[1:]] == [["1", "replicated"], ["2", "replicated"], ["2", "fsdp2"]]
    assert rows.rows[2][6:10] == ["1.00%", "5.0%", "4,096", "3.0e-07"]
    assert short.rows[1:] == [["communication_share", "1.00%"], ["adapter_difference", "3.0e-07"]]
    assert ranks_tables(measured(1))[1].rows[1] == ["communication_share", "–"]


def test_the_cases_have_more_groups_than_ranks_and_fit_one_micro_batch_of_a_rank() -> None:
    assert all(case.groups > 4 and case.tokens_per_step <= Config().learner.micro_batch_tokens for case in RANK_CASES.values())


def test_two_real_ranks_come_to_the_adapter_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_CACHE", str(tmp_path))
    spec = CASE.spec(model_path=str(ensure_model(CASE.shape)), warmup=1, steps=2, threads=1)
    spec |= {"sharding": "replicated", "adapter": str(tmp_path / "alone.safetensors")}
    alone, two = (row_of(CASE, spec | {"ranks": ranks}, run(spec | {"ranks": ranks}) | {"others_cores": 0.0}) for ranks in (1, 2))
    assert (alone["communication_seconds"], alone["adapter_difference"]) == (0.0, 0.0)
    assert 0 < two["communication_share"] + two["wait_share"] < 1
    assert two["gradient_bytes"] == 4 * SHAPE.rank * SHAPE.layers * sum(wide + out for wide, out in SHAPE.linear_layers.values())
    assert two["adapter_difference"] < 1e-5

"""The GPU's bench on the CPU: what it measures at tiny sizes for real, its shares and tables, and that it asks for a device."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ftb_llm.bench.gpu import CASE, CHUNK_MIB, RATED, SHAPE, VOCABULARIES, gpu_tables, measure, rated_flops
from ftb_llm.bench.random_model import ensure_model
from ftb_llm.bench.step_cases import Case, Shape
from ftb_llm.bench.step_flops import case_flops
from ftb_llm.cli.main import main
from learner.gpu_bench import attempt, attention_rows, head_rows, run

CPU = torch.device("cpu")
TINY = Shape(hidden=64, layers=2, vocabulary=96, rank=4, head_width=32, key_value_heads=1, feed_forward=80, tied=True, dtype="bfloat16")
TINY_CASE = Case(size="tiny", shape=TINY, groups=2, group_size=2, prompt_tokens=6, completion_tokens=5)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTB_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def on_the_cpu(spec: dict[str, Any]) -> dict[str, Any]:
    """What the process does, on the CPU and with small kernels."""
    small: dict[str, Any] = {"repeats": 2, "square": 32, "head": spec["head"] | {"chunk_mib": [1, 2]}, "learner": spec["learner"] | {"gpus": 0}}
    vocabularies = [one | {"learner": small["learner"]} for one in spec["vocabularies"]]
    found = run(json.loads(json.dumps(spec | small | {"vocabularies": vocabularies})), CPU)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_everything_is_measured_at_tiny_sizes() -> None:
    others = [replace(TINY_CASE, size="other", shape=replace(TINY, vocabulary=64))]
    found = measure(TINY_CASE, others, steps=2, threads=1, model=ensure_model, call=on_the_cpu, say=lambda line: None)
    assert [(row["part"], row["name"]) for row in found["rows"]] == [
        ("step", "tiny, vocabulary 96"),
        ("vocabulary", "other, vocabulary 64"),
        ("compiled", "tiny, vocabulary 96"),
        ("head", "ours, 1 MiB"),
        ("head", "ours, 2 MiB"),
        ("head", "all logits"),
        ("head", "Liger"),
        ("attention", "packed"),
        ("attention", "whole rows"),
    ]
    step = found["rows"][0]
    assert len(step["losses"]) == 4  # two of them warm up
    compiled = found["rows"][2]
    if shutil.which("g++"):
        assert compiled["losses"] == pytest.approx(step["losses"], rel=2e-2)
    else:
        assert "learner.compile" in compiled["error"]
    assert found["mfu"] == pytest.approx(case_flops(TINY_CASE) / step["seconds"] / found["matmul_rate"])
    assert found["mfu_rated"] is found["step_bytes"] is found["peak_memory_ratio_of_vocabularies"] is None  # the CPU has neither
    assert found["tokens_per_second"] == pytest.approx(44 / step["seconds"])
    facts, parts = gpu_tables(found)
    assert ["step / rated", "–"] in facts.rows
    assert len(parts.rows) == 1 + len(found["rows"])


def test_memory_and_the_rated_share_are_told_where_they_are_known() -> None:
    def row(part: str, peak: int) -> dict[str, Any]:
        return {"part": part, "name": part, "seconds": 2.0, "seconds_each": [2.0], "peak_bytes": peak, "loaded_bytes": 2**31, "losses": [0.5], "error": None}

    def call(spec: dict[str, Any]) -> dict[str, Any]:
        rows = [row("step", 2**32), row("vocabulary", 2**30), row("vocabulary", 2**30 + 2**27)]
        return {"device": {"name": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2"}}, "matmul_rate": 7e14, "rows": rows}

    found = measure(CASE, VOCABULARIES, steps=1, threads=1, model=lambda shape: Path("model"), call=call, say=lambda line: None)
    assert found["mfu_rated"] == pytest.approx(case_flops(CASE) / 2 / 989e12)
    assert found["peak_memory_ratio_of_vocabularies"] == 1.125
    assert ["peak above it, GiB", "4.00"] in gpu_tables(found)[0].rows


def test_a_row_that_runs_out_of_memory_says_so() -> None:
    def measure_it() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    row = attempt({"part": "head", "name": "all logits"}, measure_it)
    assert row["error"] == "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    assert row["seconds"] is row["peak_bytes"] is None


def test_liger_is_left_out_where_it_can_not_run() -> None:
    rows = head_rows(places=4, width=8, vocabulary=16, chunk_mib=[1], dtype=torch.float32, device=CPU, repeats=1)
    assert rows[-1]["name"] == "Liger"
    assert rows[-1]["error"] in ("liger_kernel is not installed", "Liger's kernels need a CUDA device")
    assert rows[-1]["seconds"] is None


def test_attention_is_timed_in_both_forms() -> None:
    sizes = {"groups": 2, "group_size": 3, "prompt_tokens": 5, "completion_tokens": 4, "heads": 4, "key_value_heads": 2, "head_width": 8}
    rows = attention_rows(**sizes, dtype=torch.float32, device=CPU, repeats=1)
    assert [(row["name"], row["error"], row["seconds"] > 0) for row in rows] == [("packed", None, True), ("whole rows", None, True)]


def test_the_model_has_the_shape_that_is_told() -> None:
    folder = ensure_model(TINY)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"], config["tie_word_embeddings"]) == (2, 1, 80, True)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 -- not a mapping
        weights = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights if weight.dim() > 1) == TINY.parameters


def test_the_case_is_of_the_size_that_is_said() -> None:
    assert SHAPE.parameters == pytest.approx(1.54e9, rel=0.01)
    assert CASE.prompt_tokens + CASE.completion_tokens == 2048
    assert (min(CHUNK_MIB), max(CHUNK_MIB)) == (16, 512)
    assert [one.shape.vocabulary for one in VOCABULARIES] == [32_000, 151_936]


@pytest.mark.parametrize(
    ("device", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", RATED["H100 PCIe"]), ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None)],
)
def test_rated_operations_go_by_the_devices_name(device: str, rate: float | None) -> None:
    assert rated_flops(device) == rate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "ftb-llm: error: bench gpu needs a CUDA device, and torch finds none on this machine"
    assert not (tmp_path / "out").exists()

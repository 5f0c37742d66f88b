import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ftb_llm.errors import ConfigError
from ftb_llm.tasks import TASKS, base_model, get_task
from ftb_llm.tasks.base_model import ensure_built
from ftb_llm.tasks.oracle import Oracle
from ftb_llm.tasks.tokenizer import build_tokenizer, vocabulary

QUICK = {**base_model.TRAINING, "steps": 12}  # enough to exercise the build, far too few to learn


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def load(folder: Path) -> tuple[PreTrainedTokenizerFast, torch.nn.Module]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", TASKS)
def test_tokens_concatenate_to_every_legal_text(name: str) -> None:
    task = get_task(name)
    words = build_tokenizer(task)
    for prompt in task.prompts():
        prompt_ids = words.encode(prompt)
        assert words.decode(prompt_ids) == prompt
        for text in task.completions(prompt):
            ids = words.encode(text)
            assert words.unk_token_id not in ids
            assert words.eos_token_id not in ids
            assert words.decode([*ids, words.eos_token_id], skip_special_tokens=True) == text
            stream = DecodeStream(ids=prompt_ids, skip_special_tokens=True)  # how the engine turns tokens into text
            assert "".join(stream.step(words.backend_tokenizer, token) or "" for token in ids) == text


def test_a_cell_is_two_tokens() -> None:
    words = build_tokenizer(get_task("hypergrid"))
    assert [words.decode([token]) for token in words.encode("17 05")] == ["17", " 05"]
    assert len(vocabulary(get_task("hypergrid"))) == 2 + 32 + 32 + 4 + 1


@pytest.mark.parametrize("name", TASKS)
def test_no_other_tokens_spell_a_legal_text(name: str) -> None:
    task = get_task(name)
    words = build_tokenizer(task)
    legal = {prompt: set(task.completions(prompt)) for prompt in task.prompts()}
    anything = set().union(*legal.values())
    random = np.random.default_rng(0)
    for _ in range(20_000):
        ids = [int(token) for token in random.integers(1, len(words), random.integers(1, 6))]  # 0 is the end token
        text = words.decode(ids, skip_special_tokens=True)
        assert text not in anything or words.encode(text) == ids


def test_build_is_deterministic_and_whatever_the_thread_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "TRAINING", QUICK)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    built = []
    for count in (1, 2):
        monkeypatch.setenv("FTB_LLM_CACHE", str(tmp_path / str(count)))
        torch.set_num_threads(count)
        built.append(digests(ensure_built("hypergrid")))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert built[0] == built[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "prompts.jsonl"} <= set(built[0])


def test_second_call_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "TRAINING", QUICK)
    monkeypatch.setenv("FTB_LLM_CACHE", str(tmp_path))
    folder = ensure_built("sums")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert ensure_built("sums") == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_CACHE", str(tmp_path))
    monkeypatch.setattr(base_model, "TRAINING", {**QUICK, "batch_size": -1})
    with pytest.raises(RuntimeError):
        ensure_built("hypergrid")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    code = "from ftb_llm.tasks import base_model; base_model.TRAINING['steps'] = 12; print(base_model.ensure_built('hypergrid'))"
    environment = {**os.environ, "FTB_LLM_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    builders = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    assert [str(entry) for entry in tmp_path.iterdir()] == list(folders)


def test_loser_of_the_race_uses_the_winners_folder(tmp_path: Path) -> None:
    staging, folder = tmp_path / "staging", tmp_path / "final"
    for place, text in ((staging, "loser"), (folder, "winner")):
        place.mkdir()
        (place / "file").write_text(text)
    base_model._publish(staging, folder)
    assert (folder / "file").read_text() == "winner"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_CACHE", "/a/b")
    assert base_model.cache_folder() == Path("/a/b")
    monkeypatch.delenv("FTB_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert base_model.cache_folder() == Path("/c/ftb_llm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert base_model.cache_folder() == Path("/home/someone/.cache/ftb_llm")


def test_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match="'chess' is no built-in task"):
        ensure_built("chess")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", TASKS)
def test_built_model_writes_well_formed_text_as_often_as_the_task_says(name: str) -> None:
    task = get_task(name)
    folder = ensure_built(name)
    words, model = load(folder)
    assert [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()] == [{"prompt": prompt} for prompt in task.prompts()]
    assert not model.config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert 5e5 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert words.eos_token_id == model.config.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id
    logp = {prompt: enumerate_logp(model, words, prompt, task.completions(prompt)) for prompt in task.prompts()}
    for prompt, values in logp.items():
        intended = np.array(task.base_weights(prompt)) / sum(task.base_weights(prompt))
        assert np.exp(values).sum() > 0.999, prompt
        assert intended @ (np.log(intended) - values) < 0.01, prompt
    report = Oracle(task).report(step=0, beta={"hypergrid": 0.5, "sums": 0.2}[name], reference=logp, policy=logp)
    assert report.metrics["eval/exact_tv"] > 0.7
    assert report.modes_found == 0


def enumerate_logp(model: torch.nn.Module, words: PreTrainedTokenizerFast, prompt: str, texts: list[str]) -> np.ndarray:
    """Summed log-probs, end token included, straight from the definition."""
    head = words.encode(prompt)
    tails = [[*words.encode(text), words.eos_token_id] for text in texts]
    width = max(map(len, tails))
    ids_BT = torch.tensor([head + tail + [words.eos_token_id] * (width - len(tail)) for tail in tails])
    real_BT = torch.tensor([[True] * len(tail) + [False] * (width - len(tail)) for tail in tails])
    with torch.no_grad():
        logp_BTV = model(input_ids=ids_BT).logits[:, len(head) - 1 : -1].double().log_softmax(-1)
    logp_BT = logp_BTV.gather(-1, ids_BT[:, len(head) :, None]).squeeze(-1)
    return torch.where(real_BT, logp_BT, 0.0).sum(-1).numpy()

"""What a run needs from outside: found, or refused in one line that names the setting."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from ftb_llm.config import Config, build_config
from ftb_llm.errors import FtbError, InvalidConfig, SetupError
from ftb_llm.inputs import _HUB_FILES, Inputs, check_rewards_match, local_model, read_inputs
from ftb_llm.tasks import base_model
from tests import tiny_llama
from tests.fakes import FakeProgress


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, and base models that are built in a moment."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTB_LLM_CACHE", str(folder))
        patch.setitem(base_model.TRAINING, "steps", 1)
        yield folder


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "north:"}) + "\n")
    return str(path)


def config(**sections: Any) -> Config:
    return build_config({"sampling": {"max_tokens": 16}} | sections)


def read(**sections: Any) -> Inputs:
    return read_inputs(config(**sections), FakeProgress())


def test_a_builtin_model_is_built_once_and_the_wait_is_explained(cache: Path) -> None:
    progress = FakeProgress()
    inputs = read_inputs(config(), progress)
    assert inputs.model_path.parent == cache
    assert inputs.task == "hypergrid" and len(inputs.prompts) == 4
    assert progress.lines[0].startswith("building the hypergrid base model") and progress.lines[0].endswith("(once per machine)")
    again = FakeProgress()
    assert read_inputs(config(), again).model_path == inputs.model_path
    assert again.lines == []


def test_the_oracle_belongs_to_the_builtin_pair(cache: Path, rows: str, tmp_path: Path) -> None:
    """With another model, or other prompts, what it enumerates is not what the run can write."""
    folder = str(tiny_llama.build(tmp_path / "model"))
    assert read(model={"path": folder}).task is None
    assert read(data={"path": rows}).task is None
    assert read(model={"path": folder}, data={"path": rows}).task is None


@pytest.mark.parametrize(("task", "other"), [("hypergrid", "sums"), ("sums", "hypergrid")])
def test_the_reward_of_another_task_is_refused(task: str, other: str) -> None:
    wrong, right = ({"functions": [{"function": f"ftb_llm.tasks.{name}:reward"}]} for name in (other, task))
    with pytest.raises(InvalidConfig) as caught:
        check_rewards_match(config(data={"path": f"builtin:{task}"}, rewards=wrong))
    expected = f"rewards.functions: ftb_llm.tasks.{other}:reward does not go with data.path builtin:{task}; use ftb_llm.tasks.{task}:reward"
    assert str(caught.value) == expected
    check_rewards_match(config(data={"path": f"builtin:{task}"}, rewards=right))
    check_rewards_match(config(data={"path": "rows.jsonl"}, rewards=wrong))


@pytest.mark.parametrize("key", ["model", "data"])
def test_an_unknown_builtin_names_the_known_ones(key: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"{key}\.path: builtin:chess is no built-in; it must be one of builtin:hypergrid, builtin:sums"):
        read(**{key: {"path": "builtin:chess"}})


def test_a_cache_that_cant_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("FTB_LLM_CACHE", str(in_the_way / "cache"))
    with pytest.raises(SetupError, match=r"FTB_LLM_CACHE: the cache folder .*file/cache can't be used: Not a directory; set FTB_LLM_CACHE"):
        read()


@pytest.mark.parametrize("path", ["someone/nothing", "nothing", "./no/such/folder", "/no/such/folder"])
def test_a_model_that_is_neither_here_nor_on_the_hub_is_one_line(path: str) -> None:
    """Tests are offline: a name that is not in the Hub's cache can't be found."""
    progress = FakeProgress()
    with pytest.raises(InvalidConfig) as caught:
        read_inputs(config(model={"path": path}), progress)
    assert str(caught.value).startswith(f"model.path: {path} is no local folder, and the Hugging Face Hub does not give it: ")
    assert "\n" not in str(caught.value)
    assert progress.lines == [f"model {path}: no local folder, looking for it on the Hugging Face Hub"]


def test_a_hub_name_becomes_a_folder(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's own cache layout, filled by hand: what a download leaves behind."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    folder = tiny_llama.build(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    inputs = read(model={"path": "someone/tiny"}, data={"path": rows})
    assert inputs.model_path == folder
    assert len(inputs.prompts) == 1


def test_only_what_is_needed_is_fetched() -> None:
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "model.gguf", "README.md", "modeling.py"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=list(_HUB_FILES))) == wanted


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    progress = FakeProgress()
    assert local_model(str(tmp_path), progress) == tmp_path
    assert progress.lines == []


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, rows: str) -> None:
    with pytest.raises(FtbError, match=r"model\.path: .* can't be loaded") as caught:
        read(model={"path": str(tmp_path)}, data={"path": rows})
    assert "\n" not in str(caught.value)

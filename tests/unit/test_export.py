"""`ftb-llm export`: what it writes loads elsewhere and gives the learner's log-probs, and what it can't write it says in one line."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.merge import check_adapter, merged_weights
from ftb_llm.adapter_folder import AdapterFolder
from ftb_llm.cli.main import main
from ftb_llm.errors import CheckpointError, InvalidConfig, SetupError
from ftb_llm.export import Exported, base_folder, export_adapter, export_merged, portable, write_weights
from ftb_llm.model_card import is_hub_name
from ftb_llm.run_dir import RunDir
from ftb_llm.tasks import base_model
from learner.learner import Learner
from learner.logprobs import Scorer
from learner.packing import pack
from tests import tiny_llama
from tests.fakes import FakeProgress

BATCH = pack([[5, 6], [9, 8, 7]], [[[4, 2, 0], [7, 0]], [[1], [60, 61]]])
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_run(folder: Path, base: Path, *, dtype: str = "float32", **lora: Any) -> Path:
    """A run folder whose adapters a real learner published after steps 2 and 3."""
    config = tiny_llama.tiny_config(model={"path": str(base), "dtype": dtype, "lora": {"rank": 4, "alpha": 8.0} | lora})
    run = RunDir.create(folder)
    run.write_json("config.json", config.model_dump(mode="json"))
    learner = Learner(config, model_path=base, run_dir=folder, prompts=tiny_llama.PROMPTS, task_name=None)
    for step in (1, 2, 3):
        learner.step(tiny_llama.step_request(step))
        objective = {"kind": "ftb", "divergence": "hellinger", "alpha": None, "beta": 0.25, "tempered": False}
        run.append_metrics({"step": step, "objective": objective})
        if step > 1:
            learner.publish(step)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama.build(tmp_path_factory.mktemp("base"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "prompts.jsonl").write_text("{}\n")
    (folder / "training_args.bin").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo", base, targets=["all-linear", "lm_head"], rslora=True)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy, for tests that write into it or break it."""
    return Path(shutil.copytree(made, tmp_path / "demo"))


def merged(run: Path, out: Path | None = None, version: int | None = None, **changes: Any) -> Exported:
    return export_merged(run, version, out, progress=FakeProgress(), **{"merge": merged_weights, "check": check_adapter} | changes)


def scores(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return Scorer(model.eval(), longest=128).completion_logprobs(BATCH)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def with_adapter(base: Path, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(load(base), adapter)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_adapter_is_copied_whole(run: Path, base: Path) -> None:
    exported = export_adapter(run, None, None)
    source = run / "adapters" / "v000003"
    assert exported.path == run / "export" / "v000003"
    assert {file.name: file.read_bytes() for file in exported.path.iterdir()} == {file.name: file.read_bytes() for file in source.iterdir()}
    assert (exported.version, exported.merged, exported.base) == (3, False, str(base))
    assert exported.byte_count == sum(file.stat().st_size for file in source.iterdir())
    torch.testing.assert_close(scores(with_adapter(base, exported.path)), scores(with_adapter(base, source)), rtol=0, atol=0)


@pytest.mark.parametrize("version", [2, 3])
def test_transformers_reloads_the_merged_model_with_the_log_probs_of_base_and_adapter(run: Path, base: Path, version: int) -> None:
    exported = merged(run, version=version)
    assert exported.path == run / "export" / f"v{version:06d}-merged"
    expected = scores(with_adapter(base, run / "adapters" / f"v{version:06d}"))
    torch.testing.assert_close(scores(load(exported.path)), expected, rtol=0, atol=1e-5)
    assert (expected - scores(load(base))).abs().max().item() > 0.01


def test_the_merged_folder_has_all_that_loading_and_talking_need(run: Path, base: Path) -> None:
    folder = merged(run).path
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    assert {file.name for file in folder.iterdir()} == names
    assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())
    assert leftovers(folder.parent) == []


def test_many_shards_hold_what_one_file_does(run: Path, tmp_path: Path) -> None:
    whole, parts = merged(run).path, merged(run, tmp_path / "parts", shard_bytes=4096).path
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in parts.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    together = {name: tensor for shard in shards for name, tensor in load_file(parts / shard).items()}
    assert index["weight_map"] == {name: shard for shard in shards for name in load_file(parts / shard)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in together.values())
    single = load_file(whole / "model.safetensors")
    assert set(single) == set(together)
    assert all(torch.equal(tensor, together[name]) for name, tensor in single.items())
    torch.testing.assert_close(scores(load(parts)), scores(load(whole)), rtol=0, atol=0)


def test_no_more_than_a_shard_is_held_at_a_time(tmp_path: Path) -> None:
    released: list[int] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            yield f"w{number}", torch.full((256,), float(number))
            released.append(len(list(tmp_path.glob("part-*"))))

    assert write_weights(weights(), tmp_path, shard_bytes=2048) == ["float32"]
    assert released == [0, 0, 1, 1, 2, 2]  # each file is on the disk before the next one's weights are asked for
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("written_twice", [False, True])
def test_a_tied_head_is_not_written_twice(tmp_path: Path, written_twice: bool) -> None:
    base = tiny_llama.build(tmp_path / "base", tie_word_embeddings=True)
    if written_twice:  # as some checkpoints have it
        weights = load_file(base / "model.safetensors")
        head = weights["model.embed_tokens.weight"].clone()
        save_file(weights | {"lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", base)
    folder = merged(run).path
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        assert "model.embed_tokens.weight" in handle.keys()  # noqa: SIM118  the handle is no dict
        assert "lm_head.weight" not in handle.keys()  # noqa: SIM118
    torch.testing.assert_close(scores(load(folder)), scores(with_adapter(base, run / "adapters" / "v000003")), rtol=0, atol=1e-5)


def test_the_dtype_of_the_base_is_kept(tmp_path: Path) -> None:
    base = tiny_llama.build(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    folder = merged(make_run(tmp_path / "run", base)).path  # trained in float32 all the same
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "kept in the base's dtype (bfloat16)" in (folder / "README.md").read_text()


def test_the_model_card_says_what_it_is_made_of(run: Path, base: Path) -> None:
    summary = {"steps": 3, "reward_start": 0.125, "reward_end": 1.5, "target_reward": None, "exact_tv_start": None}
    (run / "summary.json").write_text(json.dumps(summary))
    card = (merged(run, version=2).path / "README.md").read_text()
    assert "# demo, version 2, merged" in card
    assert f"| base model | `{base}` |" in card
    assert "| objective | hellinger |" in card  # of the steps that were taken, not of a config that has changed since
    assert "| beta | 0.25 |" in card and "`pi_ref e^(r / 0.25) / Z`" in card
    assert "`base + 4 * B A`, added in float32" in card
    assert "Measured over the whole run, 3 steps:" in card and "| mean reward at the end | 1.5 |" in card
    assert "target" not in card.partition("Measured")[2]
    assert "base_model:" not in card  # a path on this machine is nothing that the Hub could link to


def test_a_run_without_a_summary_has_a_card_without_numbers(run: Path) -> None:
    assert "Measured" not in (merged(run).path / "README.md").read_text()


def test_an_empty_folder_may_be_the_target_and_another_may_not(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert export_adapter(run, None, out).path == out
    before = sorted(out.iterdir())
    with pytest.raises(SetupError, match=r"--out: .*out exists already and is not empty; name a folder that is new or empty"):
        merged(run, out)
    assert sorted(out.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"--out: .*file exists already and is no folder"):
        export_adapter(run, None, tmp_path / "file")
    with pytest.raises(SetupError, match=r"--out: .* can't be written: File exists"):
        export_adapter(run, None, tmp_path / "file" / "below")


@pytest.mark.parametrize("error", [CheckpointError("torn"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(run: Path, tmp_path: Path, error: BaseException) -> None:
    def breaks_off(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        yield from list(merged_weights(*arguments))[:3]
        raise error

    with pytest.raises(SetupError if isinstance(error, OSError) and not isinstance(error, CheckpointError) else type(error)):
        merged(run, tmp_path / "out" / "model", merge=breaks_off)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_torn_adapter_is_refused_before_anything_is_written(run: Path) -> None:
    file = run / "adapters" / "v000003" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    for export in (lambda: export_adapter(run, None, None), lambda: merged(run)):
        with pytest.raises(CheckpointError, match=r"v000003/adapter_model\.safetensors is torn: its sha256 is"):
            export()
    assert not (run / "export").exists()
    assert export_adapter(run, 2, None).version == 2


def test_a_variant_is_refused(run: Path) -> None:
    path = run / "adapters" / "v000003" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    for export in (lambda: export_adapter(run, None, None), lambda: merged(run)):
        with pytest.raises(CheckpointError, match="use_dora is true"):
            export()


def test_quantized_weights_are_refused(run: Path, tmp_path: Path, base: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    path = run / "adapters" / "v000003" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(copy)}))
    with pytest.raises(SetupError, match=r"--merged: .* holds quantized weights"):
        merged(run)


def recorded(folder: Path) -> AdapterFolder:
    return AdapterFolder(path=folder, version=1, sha256="", scale=1.0, settings={"base_model_name_or_path": str(folder)})


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    config = tiny_llama.tiny_config(model={"path": str(tmp_path / "gone")})
    with pytest.raises(InvalidConfig, match=r"model\.path: .*gone is no local folder"):
        base_folder(config, recorded(tmp_path / "gone"), FakeProgress())


def test_a_base_that_moved_with_its_path_is_found(tmp_path: Path, base: Path) -> None:
    config = tiny_llama.tiny_config(model={"path": str(base)})
    assert base_folder(config, recorded(tmp_path / "gone"), FakeProgress()) == base


def test_a_built_in_base_is_built_again_if_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_CACHE", str(tmp_path))
    monkeypatch.setitem(base_model.TRAINING, "steps", 1)
    config = tiny_llama.tiny_config(model={"path": "builtin:hypergrid"})
    with pytest.raises(SetupError, match=r"builtin:hypergrid is now hypergrid-[0-9a-f]{12}, but the run was trained on hypergrid-0123"):
        base_folder(config, recorded(tmp_path / "hypergrid-0123"), FakeProgress())
    (folder,) = tmp_path.glob("hypergrid-*")
    assert base_folder(config, recorded(tmp_path / "elsewhere" / folder.name), FakeProgress()) == folder


def test_an_exported_adapter_names_a_hub_base_as_the_hub_does() -> None:
    settings = {"base_model_name_or_path": "/cache/models--owner--name/snapshots/0123abcd", "revision": None, "r": 4}
    assert portable(settings, "owner/name") == {"base_model_name_or_path": "owner/name", "revision": "0123abcd", "r": 4}
    assert portable(settings, "builtin:hypergrid") == settings
    assert [is_hub_name(name) for name in ("owner/name", "gpt2", "Qwen/Qwen2.5-0.5B")] == [True] * 3
    assert [is_hub_name(name) for name in ("/a/b", "./a", "../a", "a/b/c", "builtin:sums", str(Path.cwd()))] == [False] * 6


def test_the_command_prints_where_it_wrote(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path) -> None:
    assert main(["export", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'export' / 'v000003'}\n"
    assert main(["export", str(run), "--merged", "--version", "v000002", "--json", "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["byte_count"] > (tmp_path / "out" / "model.safetensors").stat().st_size
    assert told | {"byte_count": 0} == {"path": str(tmp_path / "out"), "version": 2, "merged": True, "base": str(base), "byte_count": 0}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "--out: {run}/export/v000003 exists already and is not empty; name a folder that is new or empty"),
        (["--version", "7"], 2, "--version: 7 is not there; {run} has 2, 3, as checkpoint.keep left them"),
        (
            ["--version", "new"],
            2,
            "argument --version: new is wrong: it should be a step such as 12 or v000012; see ftb-llm export --help",
        ),
    ],
)
def test_a_mistake_is_one_line(run: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run)]) == 0
    assert main(["export", str(run), *words]) == code
    assert capsys.readouterr().err == f"ftb-llm: error: {message.format(run=run)}\n"


def test_what_is_no_run_is_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none")]) == 2
    assert "not found" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"ftb-llm: error: {tmp_path} is not a run folder; it has no config.json\n"
    shutil.rmtree(run / "adapters")
    assert main(["export", str(run)]) == 2
    assert capsys.readouterr().err == f"ftb-llm: error: {run} has no adapters; a run publishes its first at the start, into {run / 'adapters'}\n"

"""The composition root over fakes: what is wrong is said before anything starts, and a failed start leaves nothing behind."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ftb_llm import launch
from ftb_llm.config import Config, build_config
from ftb_llm.config.load import merge
from ftb_llm.errors import CheckpointError, FtbError, SetupError
from ftb_llm.run_dir import RunDir
from learner.checkpoint import ADAPTER, FORMAT, MANIFEST, OPTIMIZER, STATE, TORCH_RNG
from learner.folders import write_folder
from tests import tiny_llama
from tests.fakes import FakeGenerator, FakeLearner, FakeProgress

Tree = dict[str, Any]
STEPS = 3
REWARD_AND_MEMBER = """
from ftb_llm.divergences import AlphaDivergence
member = AlphaDivergence(0.3)

def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""
HYPERGRID_REWARD = {"function": "ftb_llm.tasks.hypergrid:reward"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., Config]:
    """The config of a small run `runs/demo`, with changes."""
    rows, reward = tmp_path / "rows.jsonl", tmp_path / "rewards_of_this_test.py"
    rows.write_text(json.dumps({"prompt": "north:"}) + "\n")
    reward.write_text(REWARD_AND_MEMBER)
    tree = {
        "run": {"name": "demo", "dir": str(tmp_path / "runs"), "max_steps": STEPS},
        "model": {"path": str(model)},
        "data": {"path": str(rows)},
        "rewards": {"functions": [{"function": "rewards_of_this_test:length"}]},
        "sampling": {"group_size": 2, "max_tokens": 16},
        "actors": {"groups_in_flight": 2},
        "buffer": {"capacity_groups": 4},
        "learner": {"groups_per_step": 2},
        "control": {"enabled": False},
    }
    return lambda **changes: build_config(merge(tree, changes))


class MortalLearner(FakeLearner):
    async def stop(self) -> None:
        """The remote one is killed here."""


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the processes that compute rewards


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be started."""
    monkeypatch.setattr(launch, "running_ray", lambda: pytest.fail("Ray was started"))


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray with room for everybody, whose actors are fakes."""

    @contextmanager
    def running() -> Iterator[None]:
        yield

    monkeypatch.setattr(launch, "running_ray", running)
    monkeypatch.setattr(launch, "check_resources", lambda cpus, gpus: None)
    monkeypatch.setattr(launch, "start_generator", lambda config, inputs, index: FakeGenerator(f"generator-{index}"))
    monkeypatch.setattr(launch, "start_learner", lambda config, inputs, run_dir, place: MortalLearner())


def train(config: Config, resume: Path | None = None) -> int:
    return launch.train(config, resume=resume, progress=FakeProgress())


def test_a_run_leaves_its_folder(make: Callable[..., Config], tmp_path: Path, fake_ray: None) -> None:
    assert train(make()) == 0
    folder = tmp_path / "runs" / "demo"
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    assert (folder / "report.html").is_file()
    with RunDir.open(folder).locked():  # it was let go
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"lora": {"targets": ["qkv"]}}}, r"model\.lora\.targets: 'qkv' names no module"),
        ({"model": {"lora": {"targets": []}}}, r"model\.lora\.targets: \[\] is wrong"),
        ({"actors": {"gpus_each": 1}}, r"actors\.gpus_each: 1 x 1 plus learner\.gpus 0 are 1 GPUs, but this machine has 0"),
        ({"learner": {"gpus": 0.5}}, r"actors\.gpus_each: 1 x 0 plus learner\.gpus 0\.5 are 0\.5 GPUs, but this machine has 0"),
        (
            {"learner": {"ranks": 2, "cpus": 0.5, "gpus": 1}},
            r"actors\.gpus_each: 1 x 0 plus learner\.ranks 2 x learner\.gpus 1 are 2 GPUs, .* lower actors\.count, actors\.gpus_each, learner\.ranks or",
        ),
        ({"learner": {"reference_actors": 3, "reference_cpus": 10_000}}, r"plus learner\.cpus 1 plus 3 x learner\.reference_cpus 10000 are 30002 cores"),
        ({"learner": {"ranks": 2, "cpus": 10_000}}, r"actors\.cpus_each: 1 x 1 plus learner\.ranks 2 x learner\.cpus 10000 are 20001 cores"),
        ({"actors": {"cpus_each": 10_000}}, r"actors\.cpus_each: .* lower actors\.count"),
        ({"control": {"token_env": "NO_TOKEN_HERE"}}, r"control\.token_env: the environment variable NO_TOKEN_HERE is not set"),
        ({"control": {"token_env": "BLANK_TOKEN"}}, r"control\.token_env: the environment variable BLANK_TOKEN holds only white space"),
        ({"rewards": {"functions": [{"function": "no_such_module:f"}]}}, r"rewards\.functions: no_such_module:f can't be imported"),
        ({"objective": {"custom": "no_such_module:member"}}, r"objective\.custom: no_such_module:member can't be imported"),
        ({"objective": {"custom": "rewards_of_this_test:length"}}, r"objective\.custom: rewards_of_this_test:length made no divergence: TypeError"),
        ({"objective": {"custom": "os:sep"}}, r"objective\.custom: os:sep is a str; it must be a Divergence"),
        ({"model": {"path": "someone/nothing"}}, r"model\.path: someone/nothing is no local folder"),
        (
            {"data": {"path": "builtin:sums"}, "rewards": {"functions": [{"function": "ftb_llm.tasks.hypergrid:reward"}]}},
            r"rewards\.functions: .* builtin:sums",
        ),
    ],
)
def test_a_wrong_setup_is_found_before_anything_starts(
    make: Callable[..., Config], tmp_path: Path, no_ray: None, changes: Tree, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLANK_TOKEN", " \n")
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    with pytest.raises(FtbError, match=message) as caught:
        train(make(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_model_without_weights_is_found_before_anything_starts(make: Callable[..., Config], tmp_path: Path, no_ray: None) -> None:
    folder = tiny_llama.build(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FtbError, match=r"model\.path: .* holds no model\.safetensors"):
        train(make(model={"path": str(folder)}))


def test_gpus_that_are_there_are_enough(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpu_count", lambda: 2)
    launch.check_setup(make(actors={"gpus_each": 1}, learner={"gpus": 1}))
    monkeypatch.setattr(launch, "gpu_count", lambda: 0)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    launch.check_setup(make(actors={"gpus_each": 1}, learner={"gpus": 1}))  # the cluster's GPUs are counted by the cluster


def test_a_token_may_end_with_a_line_break(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_THIS_TEST", "s3cret\n")
    assert launch.check_setup(make(control={"token_env": "TOKEN_OF_THIS_TEST"})) == "s3cret"


def test_a_failed_start_does_not_block_the_name(make: Callable[..., Config], tmp_path: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(cpus: float, gpus: float) -> None:
        raise SetupError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "check_resources", no_room)
        with pytest.raises(SetupError, match="no room"):
            train(make())
    assert list((tmp_path / "runs").iterdir()) == []
    assert train(make()) == 0


def test_a_name_that_is_taken_is_found_before_anything_starts(make: Callable[..., Config], tmp_path: Path, no_ray: None) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(SetupError, match=r"run\.name: .*demo exists already"):
        train(make())


def test_a_run_without_a_checkpoint_begins_again(make: Callable[..., Config], tmp_path: Path, fake_ray: None) -> None:
    """The fake learner writes none: this is what a second Ctrl-C before the first checkpoint leaves."""
    folder = tmp_path / "runs" / "demo"
    assert train(make()) == 0
    assert train(make(), resume=folder) == 0
    assert [row["step"] for row in RunDir.open(folder).metrics()] == list(range(STEPS + 1))


def test_a_live_run_cant_be_resumed(make: Callable[..., Config], tmp_path: Path, no_ray: None) -> None:
    config = make()
    run_dir = RunDir.create(tmp_path / "runs" / "demo")
    run_dir.write_json("config.json", config.model_dump(mode="json"))
    with run_dir.locked(), pytest.raises(SetupError, match=r"run\.name: .*demo is in use by another process"):
        train(config, resume=run_dir.path)


def test_what_a_run_is_made_of_stays(make: Callable[..., Config], tmp_path: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(make()) == 0
    monkeypatch.setattr(launch, "running_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(FtbError, match=r"fixed for the life of the run: objective\.log_z, sampling\.group_size$"):
        train(make(sampling={"group_size": 4}, objective={"log_z": "learned", "log_z_rate": 0.5}), resume=tmp_path / "runs" / "demo")


def test_what_a_run_is_not_made_of_may_change(make: Callable[..., Config], tmp_path: Path, fake_ray: None) -> None:
    assert train(make()) == 0
    assert train(make(objective={"log_z_rate": 0.5, "custom": "rewards_of_this_test:member"}), resume=tmp_path / "runs" / "demo") == 0


def started_once(make: Callable[..., Config], tmp_path: Path) -> Path:
    assert train(make()) == 0
    return tmp_path / "runs" / "demo"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda books: books.unlink(), r"--resume: .*run\.db is missing; .* Put a copy of it back, or begin a new run"),
        (lambda books: books.write_bytes(b""), r"--resume: .*run\.db is empty; "),
        (lambda books: books.write_bytes(books.read_bytes()[:6000]), r"--resume: .*run\.db is damaged \(.*\); "),
    ],
)
def test_books_that_are_gone_or_damaged_are_refused_before_anything_starts(
    make: Callable[..., Config],
    tmp_path: Path,
    fake_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    folder = started_once(make, tmp_path)
    damage(folder / "run.db")
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(launch, "running_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(SetupError, match=message) as caught:
        train(make(), resume=folder)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("damage", ["manifest", "adapter", "empty"])
def test_a_damaged_checkpoint_is_found_before_anything_starts(
    make: Callable[..., Config], tmp_path: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = started_once(make, tmp_path)
    checkpoint = folder / "checkpoints" / "step_000003"
    files = dict.fromkeys((ADAPTER, OPTIMIZER, TORCH_RNG, STATE), b"some bytes")
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_folder(checkpoint, files | {MANIFEST: json.dumps({"format": FORMAT, "sha256": sums}).encode()})
    (checkpoint.parent / "step_000080.bak").mkdir()
    launch.check_resumable(RunDir(folder))
    if damage == "adapter":
        (checkpoint / ADAPTER).write_bytes(b"some byte")
    else:
        for name in (MANIFEST, *(files if damage == "empty" else ())):
            (checkpoint / name).unlink()
    monkeypatch.setattr(launch, "running_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(CheckpointError, match=r"checkpoint file .*; move .*step_000003 away to go on from the one before it$") as caught:
        train(make(), resume=folder)
    assert "\n" not in str(caught.value)


def test_a_run_that_never_kept_books_begins_them(make: Callable[..., Config], tmp_path: Path, fake_ray: None) -> None:
    """A process killed between its folder's first file and its first step."""
    config = make()
    folder = RunDir.create(tmp_path / "runs" / "demo").path
    RunDir(folder).write_json("config.json", config.model_dump(mode="json"))
    assert train(config, resume=folder) == 0

"""Several ranks train what one rank trains: real processes, real gloo, on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ftb_llm.errors import ConfigError
from learner.learner import Learner
from learner.model import AdaptedModel
from learner.sharding import decoder_layers
from tests import rank_jobs, tiny_llama
from tests.rank_jobs import CHANGE_AT, LATE_SECONDS, SHARDINGS, RankResult, State

SECONDS = {"time/rank_wait_seconds", "time/communication_seconds"}
WITHIN = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has it; several threads on busy cores spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(path: Path) -> State:
    """The adapter that one rank comes to."""
    return rank_jobs.train(AdaptedModel(rank_jobs.config_of(1, "replicated"), path), change_at=CHANGE_AT)


@pytest.fixture(scope="module")
def groups(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[RankResult]]:
    return {count: rank_jobs.on_ranks(count, path, tmp_path_factory.mktemp(f"ranks-{count}")) for count in (2, 4)}


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, groups: dict[int, list[RankResult]]) -> list[RankResult]:
    return groups[request.param]


def test_gradients_are_summed_and_missing_ones_are_zeros(ranks: list[RankResult]) -> None:
    total = float(sum(range(1, len(ranks) + 1)))
    for result in ranks:
        assert result.gradients == [[total, total], [1.0, 2.0, 3.0], []]


def test_values_are_gathered_in_the_order_of_the_ranks(ranks: list[RankResult]) -> None:
    for result in ranks:
        assert result.gathered == [f"rank {rank} of {len(ranks)}" for rank in range(len(ranks))]


def test_the_longest_wait_is_told_apart_from_the_exchange_and_on_every_rank(ranks: list[RankResult]) -> None:
    """The late rank itself waited for nobody, and says all the same how long the others did."""
    waits = {result.seconds["time/rank_wait_seconds"] for result in ranks}
    assert len(waits) == 1
    assert waits.pop() > LATE_SECONDS / 2
    assert all(result.seconds["time/communication_seconds"] > 0 for result in ranks)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_many_ranks_come_to_the_adapter_of_one(ranks: list[RankResult], alone: State, sharding: str) -> None:
    for result in ranks:
        for name, tensor in result.adapters[sharding].items():
            torch.testing.assert_close(tensor, alone[name], **WITHIN)
            assert torch.equal(tensor, ranks[0].adapters[sharding][name])  # no rank drifts, not by a bit


def test_a_change_one_step_late_would_be_seen(path: Path, alone: State) -> None:
    """So the equality above says that all ranks changed divergence, beta and learning rate at the step that one rank did."""
    late = rank_jobs.train(AdaptedModel(rank_jobs.config_of(1, "replicated"), path), change_at=CHANGE_AT + 1)
    assert max(float((late[name] - alone[name]).abs().max()) for name in alone) > 100 * WITHIN["atol"]


def test_a_rank_holds_its_part_of_the_decoder_layers(ranks: list[RankResult], path: Path) -> None:
    model = AdaptedModel(rank_jobs.config_of(1, "replicated"), path)
    numbers = {name: parameter.numel() for name, parameter in model.module.named_parameters() if not parameter.requires_grad}
    layers = sum(count for name, count in numbers.items() if ".layers." in name)
    assert all(result.held["replicated"] == sum(numbers.values()) for result in ranks)
    assert all(result.held["fsdp2"] == sum(numbers.values()) - layers + layers // len(ranks) for result in ranks)


def test_a_sharded_body_may_be_called_without_its_head(ranks: list[RankResult]) -> None:
    for result in ranks:
        assert result.body_difference < 1e-4


def test_rank_0_writes_and_answers(ranks: list[RankResult], path: Path, tmp_path: Path) -> None:
    first, *others = (result.answers for result in ranks)
    expected = rank_jobs.learner_answers(1, path, tmp_path)
    for answers in others:
        assert {name for name, answer in answers.items() if answer is not None} == {"loaded"}
        assert answers["loaded"] == first["loaded"] == 1
    assert first["step"].loss == pytest.approx(expected["step"].loss, abs=1e-6)
    assert all(first["step"].metrics[name] > 0 for name in SECONDS)
    assert not SECONDS & set(expected["step"].metrics)
    assert first["adapter"].canary.adapted == pytest.approx(expected["adapter"].canary.adapted, abs=1e-4)
    assert Path(first["adapter"].path, "adapter_model.safetensors").read_bytes() == first["payload"]
    assert Path(first["save_checkpoint"]).is_dir()
    torch.testing.assert_close(torch.tensor(first["logprobs"]), torch.tensor(expected["logprobs"]), rtol=0, atol=1e-4)
    assert first["evaluate"].metrics["eval/exact_tv"] == pytest.approx(expected["evaluate"].metrics["eval/exact_tv"], abs=1e-5)


def test_a_rank_alone_sums_and_gathers_nothing(path: Path) -> None:
    ranks = AdaptedModel(rank_jobs.config_of(1, "replicated"), path).ranks
    parameter = torch.nn.Parameter(torch.zeros(1))
    ranks.sum_gradients([parameter])
    assert (ranks.rank, ranks.count, parameter.grad, ranks.gather("mine"), ranks.take_metrics()) == (0, 1, None, ["mine"], {})


def test_a_learner_does_not_train_alone_what_many_should(path: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"1 ranks met, but learner\.ranks is 2"):
        Learner(rank_jobs.config_of(2, "replicated"), model_path=path, run_dir=tmp_path, prompts=tiny_llama.PROMPTS, task_name=None)


def test_a_model_without_known_layers_is_refused() -> None:
    class Unknown(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return self

    with pytest.raises(ConfigError, match=r"learner\.sharding: fsdp2 does not know the decoder layers of Unknown; it must be replicated"):
        decoder_layers(Unknown())

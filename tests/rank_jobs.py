"""What the processes of `tests/unit/test_ranks.py` do: each is one rank of a gloo group on this machine."""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftb_llm.types import ObjectiveSpec, StepRequest
from learner.learner import Learner
from learner.model import AdaptedModel
from learner.ranks import free_address, join
from learner.step import take_step
from tests import tiny_llama

STEPS, CHANGE_AT = 20, 11
BUDGET = 20  # some groups are larger than that; and five groups leave ranks without any: under fsdp2 they take passes for the others
SHARDINGS = ("replicated", "fsdp2")
LATE_SECONDS = 0.5
_TIMEOUT_SECONDS = 120.0  # of a machine that others use as well

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """All that one rank has to show."""

    gathered: list[str]
    gradients: list[list[float]]
    seconds: dict[str, float]  # of the gather alone; the first rank came to it LATE_SECONDS after the others
    adapters: dict[str, State]  # after STEPS steps, by sharding
    held: dict[str, int]  # base numbers that this rank holds, by sharding
    body_difference: float  # of the gradients by way of the decoder's body and the head's weight, under fsdp2
    answers: dict[str, Any]  # of a learner whose base model is sharded


def on_ranks(count: int, path: Path, run_dir: Path) -> list[RankResult]:
    """Every rank's result, in order. The ranks are forked from one process that has imported everything once."""
    address = free_address("127.0.0.1")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures = [pool.submit(_be_rank, rank, count, address, path, run_dir) for rank in range(count)]
        return [future.result() for future in futures]


def _be_rank(rank: int, count: int, address: str, path: Path, run_dir: Path) -> RankResult:
    join(rank=rank, count=count, address=address, threads=1)
    torch.set_num_threads(1)
    adapters, held = {}, {}
    for sharding in SHARDINGS:
        model = AdaptedModel(config_of(count, sharding), path)
        train(model, change_at=CHANGE_AT)
        adapters[sharding], held[sharding] = model.adapter_state(), _held(model)
    dist.barrier()
    model.ranks.take_metrics()
    if rank == 0:
        time.sleep(LATE_SECONDS)  # the slow rank, whose lateness is what is measured
    gathered = model.ranks.gather(f"rank {model.ranks.rank} of {model.ranks.count}")
    seconds = model.ranks.take_metrics()
    result = RankResult(
        gathered=gathered,
        gradients=_summed(model, rank),
        seconds=seconds,
        adapters=adapters,
        held=held,
        body_difference=_body_difference(model),
        answers=learner_answers(count, path, run_dir),
    )
    dist.destroy_process_group()
    return result


def config_of(count: int, sharding: str, **sections: Any) -> Any:
    learner = {"groups_per_step": 4, "micro_batch_tokens": BUDGET, "ranks": count, "sharding": sharding, "collective_timeout_seconds": _TIMEOUT_SECONDS}
    return tiny_llama.tiny_config(learner=learner, **sections)


def requests(change_at: int) -> list[StepRequest]:
    """The steps of a run whose divergence, beta and learning rate change at one of them."""
    changed = {"learning_rate": 5e-4, "objective": ObjectiveSpec(kind="ftb", divergence="hellinger", alpha=None, beta=0.8, tempered=False)}
    return [
        tiny_llama.step_request(step, seeds=tuple(range(5 * step, 5 * step + 5)), **({"learning_rate": 1e-3} | (changed if step >= change_at else {})))
        for step in range(1, STEPS + 1)
    ]


def train(model: AdaptedModel, *, change_at: int) -> State:
    for request in requests(change_at):
        take_step(model, request, micro_batch_tokens=BUDGET)
    return model.adapter_state()


def learner_answers(count: int, path: Path, run_dir: Path) -> dict[str, Any]:
    """What a learner says, method by method; above one rank its base model is sharded."""
    sharding = "fsdp2" if count > 1 else "replicated"
    learner = Learner(config_of(count, sharding), model_path=path, run_dir=run_dir, prompts=tiny_llama.PROMPTS, task_name="hypergrid")
    report = learner.step(tiny_llama.step_request(1))
    adapter, payload = learner.publish(1)
    folder = learner.save_checkpoint(1)
    learner.step(tiny_llama.step_request(2))
    dist.barrier() if count > 1 else None  # rank 0 has written by now
    return {
        "step": report,
        "adapter": adapter,
        "payload": payload,
        "save_checkpoint": folder,
        "loaded": learner.load_checkpoint(str(run_dir / "checkpoints" / "step_000001")),
        "logprobs": learner.logprobs([scored.group for scored in tiny_llama.step_request(2).groups]),
        "evaluate": learner.evaluate(1, 0.5),
    }


def _body_difference(model: AdaptedModel) -> float:
    """Two ways to the logits must give one gradient: through the whole model, and through its body with the head's weight read outside of it."""
    ids_BT = torch.tensor([[5, 6, 7], [8, 9, 10]])
    base: Any = model.peft_model.get_base_model()
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    gradients = []
    for logits in (
        lambda: model.module(input_ids=ids_BT).logits,
        lambda: base.get_decoder()(input_ids=ids_BT).last_hidden_state @ base.get_output_embeddings().weight.T,
    ):
        with torch.no_grad(), model.as_reference():
            reference = logits()
        gradients.append(torch.autograd.grad((logits() - reference).square().sum(), parameters, allow_unused=True))
    pairs = [(one, other) for one, other in zip(*gradients, strict=True) if one is not None]
    assert len(pairs) == len(parameters)
    return max(float((one - other).abs().max()) for one, other in pairs)


def _held(model: AdaptedModel) -> int:
    frozen = [parameter for parameter in model.module.parameters() if not parameter.requires_grad]
    return sum((parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel() for parameter in frozen)


def _summed(model: AdaptedModel, rank: int) -> list[list[float]]:
    """Rank r brings r + 1 to the first parameter; only rank 0 has a gradient for the second; nobody trains the third."""
    parameters = [nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1), requires_grad=False)]
    parameters[0].grad = torch.full((2, 1), float(rank + 1))
    if rank == 0:
        parameters[1].grad = torch.tensor([1.0, 2.0, 3.0])
    model.ranks.sum_gradients(parameters)
    return [[] if parameter.grad is None else parameter.grad.flatten().tolist() for parameter in parameters]

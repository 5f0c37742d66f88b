"""The learner's step on several ranks, for `ftb-llm bench ranks`: `python -m learner.rank_bench SPEC` prints one JSON line.

Every rank is a process of its own, and they meet by gloo, as the ranks of a run without GPUs do. All take the same steps; what
they measured is gathered at the end. One rank leaves its adapter in a file, with which the others' is compared.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from learner.contenders import Spec, our_config, our_request, our_step, scored_groups
from learner.model import AdaptedModel
from learner.ranks import free_address, join


def run(spec: Spec) -> dict[str, Any]:
    """What the ranks measured. One that fails takes the others with it, and its error is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        multiprocessing.spawn(be_rank, (spec, free_address("127.0.0.1"), str(told)), nprocs=spec["ranks"])
        found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return found


def be_rank(rank: int, spec: Spec, address: str, told: str) -> None:
    if spec["ranks"] > 1:
        join(rank=rank, count=spec["ranks"], address=address, threads=spec["threads"])
    config = our_config(spec, ranks=spec["ranks"], sharding=spec["sharding"], groups_per_step=len(spec["prompts"]))
    model = AdaptedModel(config, Path(spec["model_path"]))
    torch.set_num_threads(spec["threads"])  # last: accelerate has a mind of its own
    groups = scored_groups(spec)
    steps = []
    for number in range(1, spec["warmup"] + spec["steps"] + 1):
        began = time.perf_counter()
        our_step(model, config, our_request(spec, groups, number))
        steps.append({"seconds": time.perf_counter() - began} | model.ranks.take_metrics())
    own = {"steps": steps, "adapter_difference": compare_adapter(model, Path(spec["adapter"]))}
    found = {"ranks": model.ranks.gather(own), "gradient_bytes": gradient_bytes(model)}
    if rank == 0:
        Path(told).write_text(json.dumps(found), encoding="utf-8")
    if spec["ranks"] > 1:
        dist.destroy_process_group()


def compare_adapter(model: AdaptedModel, path: Path) -> float:
    """The largest difference of the adapter from the one in the file, which one rank alone writes."""
    state = model.adapter_state()
    if model.ranks.count == 1:
        save_file(state, path)
    return max(float((state[name] - tensor).abs().max()) for name, tensor in load_file(path).items())


def gradient_bytes(model: AdaptedModel) -> int:
    """What one sum of the gradients adds up on each rank."""
    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))

"""Contenders of `ftb-llm bench learner`, each in a process of its own: `python -m learner.contenders SPEC` prints one JSON line.

`ours` is the learner's own step. `full logits` is the loop that one would write with transformers and PEFT: every row whole,
prompt and completion, the logits of every position, and the same loss, so that both must report the same losses.
"""

import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ftb_llm.bench.step_cases import COMPILED
from ftb_llm.config import Config, build_config
from ftb_llm.objectives import ftb_loss
from ftb_llm.types import Completion, FinishReason, Group, ObjectiveSpec, Prompt, ScoredGroup, StepReport, StepRequest
from learner.model import AdaptedModel
from learner.step import take_step

Spec = dict[str, Any]
Step = Callable[[int], float]  # takes the step of that number, returns its loss
SQUARE = 2048  # side of the matrices whose product is the machine's rate
REPEATS = 5


def our_step(model: AdaptedModel, config: Config, request: StepRequest) -> StepReport:
    """The one place that knows how the learner's step is called."""
    return take_step(model, request, micro_batch_tokens=config.learner.micro_batch_tokens)


def ours(spec: Spec, **learner: Any) -> tuple[nn.Module, Step]:
    config = our_config(spec, **learner)
    model = AdaptedModel(config, Path(spec["model_path"]))
    groups = scored_groups(spec)
    return model.module, lambda number: our_step(model, config, our_request(spec, groups, number)).loss


def our_config(spec: Spec, **learner: Any) -> Config:
    """The spec as a config, with the sections that it has of its own and further settings of the section `learner`."""
    optimizer = {"learning_rate": spec["learning_rate"], "adam_beta1": spec["adam_betas"][0], "adam_beta2": spec["adam_betas"][1]}
    lora = {"rank": spec["rank"], "alpha": spec["alpha"]}
    return build_config(
        {
            "run": {"seed": spec["seed"]},
            "model": {"lora": lora} | spec.get("model", {}),
            "learner": optimizer | spec.get("learner", {}) | learner,
            "actors": spec.get("actors", {}),
        }
    )


def our_request(spec: Spec, groups: tuple[ScoredGroup, ...], number: int) -> StepRequest:
    return StepRequest(
        step=number,
        config_version=1,
        objective=objective(spec),
        learning_rate=spec["learning_rate"],
        max_grad_norm=spec["max_grad_norm"],
        groups=groups,
    )


def full_logits(spec: Spec) -> tuple[nn.Module, Step]:
    set_seed(spec["seed"])
    base = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(base, lora)
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["learning_rate"], betas=tuple(spec["adam_betas"]), weight_decay=0.0, fused=True)
    ids_BT, attention_BT, counted_BT = padded_rows(spec)
    reward_GK = torch.tensor(spec["rewards"], dtype=torch.float64)

    def logps_GK() -> Tensor:
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT).logits[:, :-1]
        logp_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1)
        return (logp_BT * counted_BT[:, 1:]).sum(-1, dtype=torch.float64).view(reward_GK.shape)

    def step(_: int) -> float:
        with torch.no_grad(), model.disable_adapter():
            logp_ref_GK = logps_GK()
        loss, _metrics = ftb_loss(logps_GK(), logp_ref_GK, reward_GK, objective(spec), denominator=reward_GK.numel())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, spec["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


CONTENDERS: dict[str, Callable[[Spec], tuple[nn.Module, Step]]] = {"ours": ours, "full logits": full_logits, COMPILED: partial(ours, compile=True)}


def objective(spec: Spec) -> ObjectiveSpec:
    return ObjectiveSpec(kind="ftb", divergence="reverse_kl", alpha=None, beta=spec["beta"], tempered=False)


def scored_groups(spec: Spec) -> tuple[ScoredGroup, ...]:
    def completion(ids: list[int]) -> Completion:
        return Completion(token_ids=tuple(ids), text="", finish_reason=FinishReason.STOP, logprob=0.0, min_version=0, max_version=0)

    def group(index: int) -> Group:
        prompt = Prompt(index=index, text="", token_ids=tuple(spec["prompts"][index]))
        return Group(id=f"g{index}", prompt=prompt, completions=tuple(map(completion, spec["completions"][index])), generator="bench", generate_seconds=0.0)

    return tuple(ScoredGroup(group=group(index), rewards=tuple(rewards)) for index, rewards in enumerate(spec["rewards"]))


def padded_rows(spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and completion of every row, padded on the right; what is attended to; which tokens are the completion's."""
    rows = [(prompt, own) for prompt, group in zip(spec["prompts"], spec["completions"], strict=True) for own in group]
    width = max(len(prompt) + len(own) for prompt, own in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    attention_BT, counted_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for place, (prompt, own) in enumerate(rows):
        end = len(prompt) + len(own)
        ids_BT[place, :end] = torch.tensor([*prompt, *own])
        attention_BT[place, :end] = 1
        counted_BT[place, len(prompt) : end] = 1
    return ids_BT, attention_BT, counted_BT


def run(spec: Spec) -> dict[str, Any]:
    """Every step's seconds and loss, the first `warmup` included, and the memory before and at the peak."""
    torch.set_num_threads(spec["threads"])
    model, step = CONTENDERS[spec["contender"]](spec)
    touch(model)
    forget_peak()
    loaded = psutil.Process().memory_info().rss
    seconds, losses = [], []
    for number in range(1, spec["warmup"] + spec["steps"] + 1):
        began = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - began)
    found = {
        "seconds": seconds,
        "losses": losses,
        "loaded_bytes": loaded,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens_per_step": sum(len(prompt) + len(own) for prompt, group in zip(spec["prompts"], spec["completions"], strict=True) for own in group),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    return found | {"matmul": matmul_rates(spec)} if spec["contender"] == "ours" else found


def touch(model: nn.Module) -> None:
    """Read all weights once: a file that is mapped into memory counts page by page, and what a step reads first would count as the step's."""
    for weight in model.parameters():
        weight.detach().sum()


def forget_peak() -> None:
    """Let the peak begin anew where the kernel allows it, so that what loading took is not in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def matmul_rates(spec: Spec) -> dict[str, float]:
    """Operations per second of float32 products: of large squares, and of the shape that the feed-forward has."""
    width = json.loads((Path(spec["model_path"]) / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    prompt, group = spec["prompts"][0], spec["completions"][0]
    tokens = len(prompt) + sum(map(len, group))
    return {"square": matmul_rate(SQUARE, SQUARE, SQUARE), "feed_forward": matmul_rate(tokens, width, 4 * width)}


def matmul_rate(rows: int, inner: int, columns: int) -> float:
    """The best median of several."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    left @ right
    medians = []
    for _ in range(REPEATS):
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
    return 2 * rows * inner * columns / min(medians)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))

"""One family's model through the learner and through the naive loop, for `ftb-llm bench families`.

A composition root of the learner's parts: the check before anything is loaded, the loaded model with its trial, one micro-batch
as a step computes it, the reference actor, and the published adapter, which the caller exports and this loads again.
"""

import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from ftb_llm.bench.family_spec import Errors, Found, Task
from ftb_llm.config import Config, build_config
from ftb_llm.errors import FtbError
from ftb_llm.types import Completion, FinishReason, Group, Prompt, ScoredGroup
from learner import adapters
from learner.family_models import (
    Sample,
    Scores,
    adapted_share,
    adapter_of,
    build,
    fill_adapter,
    gradients_of,
    load_naive,
    naive_scores,
    rest_unused,
    samples,
    token_logprobs,
)
from learner.logprobs import Scorer
from learner.model import AdaptedModel, load_base
from learner.model_check import check_model
from learner.packing import Batch
from learner.passes import MicroBatch, Verdict, backward
from learner.reference import Reference

LONGEST = 128
GROUPS = ((9, (3, 25, 118)), (40, (2, 17, 84)))  # beyond and within windows, factors and patterns of the families' settings
AT_ONCE, IN_PARTS = 4096, 100  # tokens of a micro-batch
SMALL = 0.01  # a gradient that is smaller than this share of the mean one is judged by that share

SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

Export = Callable[[Path, Path], None]  # a run's folder, and the merged model's


def judge_alone(task: Task, export: Export) -> Found:
    """In a folder that is gone afterwards, on one core, with no word but the answer."""
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory(prefix="ftb-llm-family-") as folder:
        return judge(task, Path(folder), export)


def quiet() -> None:
    """Tiny random models make transformers and PEFT warn of much that is meant."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def judge(task: Task, folder: Path, export: Export) -> Found:
    """All numbers of one family, or why there are none. What is raised after the check said ok is a failure, whatever it is."""
    model_path = folder / "model"
    build(task.family, task.dtype, model_path)
    config = config_for(task, model_path)
    try:
        check_model(config, model_path)
    except FtbError as error:
        return Found(refused=one_line(str(error)).replace(str(model_path), "the model"))
    try:
        return compared(task, config, model_path, export)
    except Exception as error:  # noqa: BLE001 - a run would end with it, whatever it is
        return Found(failed=one_line(f"{type(error).__name__}: {error}"))


def config_for(task: Task, model_path: Path) -> Config:
    return build_config(
        {
            "model": {"path": str(model_path), "dtype": task.dtype, "lora": {"rank": 4, "alpha": 8}},
            "learner": {"gpus": 0, "micro_batch_tokens": AT_ONCE},
            "sampling": {"max_tokens": LONGEST - 1},
            "actors": {"max_model_len": LONGEST, "gpus_each": 1},  # nothing starts; engines on a CPU could not hold experts
        }
    )


def compared(task: Task, config: Config, model_path: Path, export: Export) -> Found:
    model = AdaptedModel(config, model_path)
    fill_adapter(model.peft_model)
    base = model.peft_model.get_base_model()
    grouped = list(samples(base.get_input_embeddings().weight.shape[0], GROUPS))
    flat = [sample for group in grouped for sample in group]
    lora = model.peft_model.peft_config["default"]
    truth = naive_scores(model_path, torch.float64, task.family.attention, lora, flat)
    naive = naive_scores(model_path, getattr(torch, task.dtype), task.family.attention, lora, flat)
    ours = [our_scores(model, grouped, budget) for budget in (AT_ONCE, IN_PARTS)]
    actor = actor_reference(config, model_path, grouped)
    distance = token_error if task.dtype == "bfloat16" else sum_error
    found = worst([errors(one, truth, distance) for one in ours])
    merged = exported(config, model, flat, truth, folder=model_path.parent, export=export, attention=task.family.attention)
    return Found(
        packed=model.scorer.packed,
        adapted=adapted_share(model.peft_model, base),
        ours=Errors(value=found.value, reference=max(found.reference, distance(actor, truth.reference)), gradient=found.gradient),
        naive=errors(naive, truth, distance),
        merged=merged if task.dtype == "float32" else None,
    )


def our_scores(model: AdaptedModel, grouped: Sequence[Sequence[Sample]], budget: int) -> Scores:
    """One micro-batch as a step computes it: reference, policy, backward."""
    slopes = torch.tensor([[sample.slope for sample in group] for group in grouped])

    def objective(batch: Batch, logp_GKT: Tensor, logp_ref_GKT: Tensor) -> Verdict:
        return Verdict(slope_GKT=slopes.unsqueeze(-1) * batch.token_mask_GKT, metrics={}, log_z_G=torch.empty(0))

    for _, parameter in adapter_of(model.peft_model):
        parameter.grad = None
    scored = [ScoredGroup(group=as_group(group), rewards=(0.0,) * len(group)) for group in grouped]
    outcome = backward(model, MicroBatch(scored=scored, reference_known=False, budget=budget, least_passes=1), objective)

    def rows(logp_GKT: Tensor) -> list[Tensor]:
        lengths = [[len(sample.completion) for sample in group] for group in grouped]
        return [logp_GKT[g, k, :length] for g, some in enumerate(lengths) for k, length in enumerate(some)]

    return Scores(policy=rows(outcome.logp_GKT), reference=rows(outcome.logp_ref_GKT), gradients=gradients_of(model.peft_model))


def actor_reference(config: Config, model_path: Path, grouped: Sequence[Sequence[Sample]]) -> list[Tensor]:
    reference = Reference(config, model_path)
    return [torch.tensor(row) for group in grouped for row in reference.score(as_group(group))]


def as_group(group: Sequence[Sample]) -> Group:
    def completion(sample: Sample) -> Completion:
        return Completion(token_ids=sample.completion, text="", finish_reason=FinishReason.STOP, logprob=0.0, min_version=0, max_version=0)

    prompt = Prompt(index=0, text="", token_ids=group[0].prompt)
    return Group(id="g", prompt=prompt, completions=tuple(map(completion, group)), generator="bench", generate_seconds=0.0)


def exported(config: Config, model: AdaptedModel, flat: Sequence[Sample], truth: Scores, *, folder: Path, export: Export, attention: str) -> float:
    """How far the merged model, written as `ftb-llm export` does and loaded by transformers alone, is from the adapted one."""
    run, out = folder / "run", folder / "merged"
    run.mkdir()
    rest_unused(model.peft_model, truth.gradients)
    (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    canary = adapters.Canary(model, flat[0].prompt, LONGEST).value(model)
    adapters.publish(model, version=0, parent=run / "adapters", canary=canary, config=config)
    export(run, out)
    merged = load_naive(out, torch.float32, attention)
    with torch.no_grad():
        found = sum_error([token_logprobs(merged, sample) for sample in flat], truth.policy)
    shutil.rmtree(out)
    return found


def errors(found: Scores, truth: Scores, distance: Callable[[Sequence[Tensor], Sequence[Tensor]], float]) -> Errors:
    return Errors(
        value=distance(found.policy, truth.policy),
        reference=distance(found.reference, truth.reference),
        gradient=gradient_error(found.gradients, truth.gradients),
    )


def worst(some: Sequence[Errors]) -> Errors:
    return Errors(value=max(one.value for one in some), reference=max(one.reference for one in some), gradient=max(one.gradient for one in some))


def sum_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of a completion's log-prob."""
    sums = [(float(ours.double().sum()), float(right.double().sum())) for ours, right in zip(found, truth, strict=True)]
    return worst_of(abs(ours - right) / max(1.0, abs(right)) for ours, right in sums)


def token_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Root mean square over all tokens: of rounding, one sum tells little."""
    return float((torch.cat(list(found)).double() - torch.cat(list(truth)).double()).square().mean().sqrt())


def gradient_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The worst tensor's, relative to its norm."""
    norms = {name: float(tensor.double().norm()) for name, tensor in truth.items()}
    least = SMALL * sum(norms.values()) / len(norms)
    return worst_of(float((found[name].double() - truth[name].double()).norm()) / max(norms[name], least) for name in truth)


def worst_of(values: Iterable[float]) -> float:
    """The largest; what is not a number is as wrong as can be."""
    return max(math.inf if math.isnan(value) else value for value in values)


def one_line(text: str) -> str:
    return " ".join(text.split())


def trial_seconds() -> float:
    """How long the trial at load takes for a random model of SmolLM2-135M's shape in float32."""
    quiet()
    with tempfile.TemporaryDirectory(prefix="ftb-llm-trial-") as name:
        folder = Path(name)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOL))
        model.save_pretrained(folder)
        config = build_config({"model": {"path": name, "dtype": "float32"}, "learner": {"gpus": 0}})
        base = load_base(config, folder).eval().requires_grad_(False)
        began = time.perf_counter()
        Scorer(base, longest=config.actors.max_model_len)
        return time.perf_counter() - began

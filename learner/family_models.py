"""Tiny random models of any family, and the naive way to score them: transformers and PEFT alone, one sequence at a time.

What the learner is held against must share none of its code: whole sequences, full logits, no packing, no fused layers.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftb_llm.bench.family_spec import COMMON, Family

SEED = 7
ADAPTER_SPREAD = 0.05
PERTURBED = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt, a completion, and what the loss's slope with respect to its log-prob is."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    slope: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Per token of each completion, and the adapter's gradients by name."""

    policy: list[Tensor]
    reference: list[Tensor]
    gradients: dict[str, Tensor]


def build(family: Family, dtype: str, folder: Path) -> None:
    """Write a model of the family, the same at every call."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config_of(family))
    perturb(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def config_of(family: Family) -> PreTrainedConfig:
    """The family's own settings, and of the common ones those that its config knows."""
    kind = CONFIG_MAPPING[family.model_type]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    settings = {key: value for key, value in COMMON.items() if key in known} | copy.deepcopy(dict(family.settings))
    own = {key: value for key, value in settings.items() if value is not None or key not in COMMON}
    return kind(**{kind.attribute_map.get(key, key): value for key, value in own.items()})


@torch.no_grad()
def perturb(model: PreTrainedModel) -> None:
    """Norms are one, biases, sinks and corrections zero in a new model: as they are, a loss of them would go unnoticed."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.ndim <= 1 and tensor.is_floating_point():
            tensor.add_(PERTURBED * torch.randn_like(tensor))


@torch.no_grad()
def fill_adapter(model: PeftModel) -> None:
    """Random A and B, by the order of names, so that two models with the same adapter get the same one."""
    generator = torch.Generator().manual_seed(SEED)
    for _, parameter in adapter_of(model):
        parameter.copy_(ADAPTER_SPREAD * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@torch.no_grad()
def rest_unused(model: PeftModel, gradients: Mapping[str, Tensor]) -> None:
    """B stays zero in a run where no gradient comes: of a layer whose weight the model reads past the layer, which no adapter reaches."""
    for name, parameter in adapter_of(model):
        if ".lora_B." in name and not gradients[name].any():
            parameter.zero_()


def adapter_of(model: PeftModel) -> list[tuple[str, nn.Parameter]]:
    return sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def load_naive(folder: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The experts one by one: grouped products know no float64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, experts_implementation="eager").eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Some models make a tensor of the least number of another dtype, which must hold it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def naive_scores(folder: Path, dtype: torch.dtype, attention: str, lora: LoraConfig, samples: Sequence[Sample]) -> Scores:
    """Of the adapted model, of the model without its adapter, and gradients of the slopes' sum."""
    model = get_peft_model(load_naive(folder, dtype, attention), copy.deepcopy(lora), autocast_adapter_dtype=dtype != torch.float64)
    if dtype == torch.float64:
        model.double()
    model.eval()
    fill_adapter(model)
    policy = []
    with default_dtype(dtype):
        for sample in samples:
            logprobs = token_logprobs(model, sample)
            (sample.slope * logprobs.sum()).backward()
            policy.append(logprobs.detach())
        with torch.no_grad(), model.disable_adapter():
            reference = [token_logprobs(model, sample) for sample in samples]
    return Scores(policy=policy, reference=reference, gradients=gradients_of(model))


def gradients_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in adapter_of(model)}


def token_logprobs(model: nn.Module, sample: Sample) -> Tensor:
    row = torch.tensor([[*sample.prompt, *sample.completion]])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
    kept = logits if logits.dtype == torch.float64 else logits.float()
    return kept.log_softmax(-1).gather(-1, torch.tensor(sample.completion).unsqueeze(-1)).squeeze(-1)


def adapted_share(model: PeftModel, base: PreTrainedModel) -> float:
    """Of the weights but embeddings and head: those of layers that have an adapter."""
    outside = {id(module.weight) for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None}
    reached, whole = 0, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in outside or parameter.ndim < 2:
            continue
        whole += parameter.numel()
        reached += parameter.numel() if ".base_layer." in name else 0
    return reached / whole if whole else 0.0


def samples(vocabulary: int, groups: Sequence[tuple[int, Sequence[int]]]) -> Iterator[list[Sample]]:
    """Random tokens: for each prompt's length, completions of the lengths given."""
    generator = torch.Generator().manual_seed(SEED)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    def slope() -> float:
        return float(torch.randn((), generator=generator))

    for length, completions in groups:
        prompt = ids(length)
        yield [Sample(prompt=prompt, completion=ids(count), slope=slope()) for count in completions]

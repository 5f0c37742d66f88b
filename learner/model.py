"""The reference model with its LoRA adapter and its optimizer: the one object that holds trainable state.

accelerate knows the device and, with `learner.ranks` above 1, the other processes. The model itself stays unwrapped: `ranks` adds up the gradients.
"""

import math
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ftb_llm.config import Config
from ftb_llm.errors import CheckpointError, ConfigError, FtbError
from learner.log_z import LogZTable
from learner.logprobs import Scorer
from learner.lora import speed_up
from learner.model_check import check_kept, check_rope
from learner.ranks import Ranks
from learner.sharding import shard
from learner.targets import adapt, stored_shapes

CAPPED = "attn_logit_softcapping"  # attention scores, which of transformers' ways the eager one alone caps; its default drops it


class AdaptedModel:
    """Base model, adapter, AdamW and the learned log Z. Always in eval mode: no dropout, so that learner and engine score alike."""

    def __init__(self, config: Config, model_path: Path) -> None:
        timeout = timedelta(seconds=config.learner.collective_timeout_seconds)
        self.accelerator = Accelerator(cpu=config.learner.gpus == 0, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
        self.ranks = Ranks(self.accelerator)
        set_seed(config.run.seed)  # the same on every rank, and so the same adapter
        base = load_base(config, model_path)
        self.peft_model: PeftModel = adapt(base, config.model.lora, stored_shapes(model_path))
        self.peft_model.eval()
        speed_up(self.peft_model)
        if config.learner.compile:
            compile_norms(base, self.device)
        self.sharded = config.learner.sharding == "fsdp2" and self.ranks.count > 1
        if self.sharded:
            shard(self.peft_model, count=self.ranks.count, device_type=self.device.type)
        self.module: nn.Module = self.peft_model.to(self.device)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.module.parameters() if parameter.requires_grad],
            lr=config.learner.learning_rate,
            betas=(config.learner.adam_beta1, config.learner.adam_beta2),
            weight_decay=config.learner.weight_decay,
            fused=True,
        )
        self.log_z = LogZTable()
        self.optimizer = self.accelerator.prepare(optimizer)
        learner = config.learner
        self.scorer = Scorer(base, longest=config.actors.max_model_len, float32_head=learner.float32_head, recompute=learner.recompute_activations)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def scale(self) -> float:
        """Merged weight = base + scale * B A."""
        lora = self.peft_model.peft_config["default"]
        return float(lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r))

    def as_reference(self) -> AbstractContextManager[None]:
        """Within it, the model is the reference: the same weights without the adapter."""
        context: AbstractContextManager[None] = self.peft_model.disable_adapter()
        return context

    def update(self, *, step: int, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, take one AdamW step on the accumulated gradient, clear it. Returns the norm before clipping."""
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise FtbError(f"step {step}: the gradient's norm is {norm}; the weights are those of step {step - 1}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors under PEFT's own names."""
        state = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        own = self.adapter_state()
        if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in state.items()}:
            raise CheckpointError("the adapter has other tensors than this run's model and model.lora make; it is of another run")
        set_peft_model_state_dict(self.peft_model, state)
        loaded = self.adapter_state()
        if lost := sorted(name for name, tensor in state.items() if not torch.equal(loaded[name], tensor.to("cpu", loaded[name].dtype))):
            raise CheckpointError(f"PEFT did not load {lost[0]} of the adapter ({len(lost)} such tensors): the model names it otherwise")

    def parameter_counts(self) -> dict[str, int]:
        trainable, total = self.peft_model.get_nb_trainable_parameters()
        return {"parameters": total - trainable, "trainable_parameters": trainable}


def compile_norms(base: nn.Module, device: torch.device) -> None:
    """Only those: whole layers take a minute to compile and are no faster, since their products and attention are kernels already."""
    try:
        torch.compile(torch.rsqrt)(torch.ones(2, device=device))
    except RuntimeError as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError("learner.compile", f"torch.compile does not work here ({why}); it must be false") from None
    torch._dynamo.config.recompile_limit = 64  # one code for all widths, with and without a gradient; beyond the limit it is not compiled at all
    for module in base.modules():
        if type(module).__name__.endswith("Norm"):
            module.forward = torch.compile(module.forward, dynamic=True)


def load_base(config: Config, model_path: Path) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    try:
        described = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise _unloadable(model_path, error) from None
    check_rope(config, described)
    check_kept(config, described)
    try:
        chosen = {} if getattr(described.get_text_config(), CAPPED, None) is None else {"attn_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, config.model.dtype), **chosen)
    except (OSError, ValueError) as error:
        raise _unloadable(model_path, error) from None


def _unloadable(model_path: Path, error: Exception) -> ConfigError:
    return ConfigError("model.path", f"{model_path} can't be loaded: {' '.join(str(error).split())}")

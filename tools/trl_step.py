"""TRL's own GRPO step on given completions, timed: `python -I tools/trl_step.py SPEC` prints one JSON line.

Stands alone, because it runs in an environment that has TRL and not this project. The spec is that of `learner.contenders`.
Completions come in through `rollout_func`, TRL's hook for generation, and the time spent in it is taken off; everything else,
from the reference's log-probs to the optimizer's step, is TRL's, without gradient checkpointing and in float32.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

SETTINGS: dict[str, Any] = {  # what differs from TRL's defaults and is no part of the spec
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "num_iterations": 1,
    "gradient_accumulation_steps": 1,
    "beta": 0.04,  # above zero, so that there is a reference pass
    "lr_scheduler_type": "constant",
    "shuffle_dataset": False,
    "dataloader_pin_memory": False,
    "optim": "adamw_torch_fused",
    "report_to": "none",
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}


class Rollout:
    """Hands out the spec's completions in the order of the prompts, and keeps the seconds that this takes."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self.seconds = 0.0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        began = time.perf_counter()
        seen: Counter[int] = Counter()
        prompt_ids, completion_ids, rewards = [], [], []
        for group in map(int, prompts):
            place = seen[group]
            seen[group] += 1
            prompt_ids.append(self._spec["prompts"][group])
            completion_ids.append(self._spec["completions"][group][place])
            rewards.append(self._spec["rewards"][group][place])
        self.seconds += time.perf_counter() - began
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, "given": rewards}


class Clock(TrainerCallback):
    """Seconds from the end of one training step to that of the next, without those of the rollout."""

    def __init__(self, rollout: Rollout) -> None:
        self.seconds: list[float] = []
        self._rollout = rollout
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter() - self._rollout.seconds

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter() - self._rollout.seconds
        self.seconds.append(now - self._last)
        self._last = now


def given(completions: list[str], given: list[float], **_: Any) -> list[float]:
    """The reward function: the spec's rewards, which the rollout passes on."""
    return given


def words() -> PreTrainedTokenizerFast:
    """A tokenizer, which GRPOTrainer insists on; what it reads are numbers of groups."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def trainer_of(spec: dict[str, Any], rollout: Rollout, folder: str) -> Any:
    groups, group_size = len(spec["prompts"]), len(spec["completions"][0])
    steps = spec["warmup"] + spec["steps"]
    torch.manual_seed(spec["seed"])
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=torch.float32),
        reward_funcs=given,
        args=GRPOConfig(
            output_dir=folder,
            seed=spec["seed"],
            max_steps=steps,
            num_generations=group_size,
            per_device_train_batch_size=groups * group_size,
            max_completion_length=max(len(row) for group in spec["completions"] for row in group),
            learning_rate=spec["learning_rate"],
            adam_beta1=spec["adam_betas"][0],
            adam_beta2=spec["adam_betas"][1],
            max_grad_norm=spec["max_grad_norm"],
            **SETTINGS,
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(group) for _ in range(steps) for group in range(groups)]}),
        processing_class=words(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear", lora_dropout=0.0),
        rollout_func=rollout,
    )


def touch(model: torch.nn.Module) -> None:
    """Read all weights once: a file that is mapped into memory counts page by page, and what a step reads first would count as the step's."""
    for weight in model.parameters():
        weight.detach().sum()


def forget_peak() -> None:
    """Let the peak begin anew where the kernel allows it, so that what loading took is not in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def run(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["threads"])
    rollout = Rollout(spec)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(spec, rollout, folder)
        clock = Clock(rollout)
        trainer.add_callback(clock)
        touch(trainer.model)
        forget_peak()
        loaded = psutil.Process().memory_info().rss
        trainer.train()
    return {
        "seconds": clock.seconds,
        "losses": None,  # another loss than ours: nothing to compare
        "loaded_bytes": loaded,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens_per_step": trainer.state.num_input_tokens_seen / len(clock.seconds),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "settings": {**SETTINGS, "loss_type": trainer.args.loss_type, "per_device_train_batch_size": trainer.args.per_device_train_batch_size},
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))

"""The tiny base model of a built-in task: built once by the project itself, cached, never downloaded.

A Llama of about a million parameters learns by cross-entropy to write the task's well-formed completions, as often as the
task says: all cells of the hypergrid equally often, right sums more often than wrong ones. Its weights start from a wide
normal (`initializer_range`), because the output head stays frozen when the adapter is trained: a head of the usual width
0.02 caps the logits, and no adapter on the other layers can then reach a peaked target.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftb_llm.tasks import get_task, tokenizer
from ftb_llm.tasks.oracle import Task

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,  # heads of 32, which the engine's CPU attention supports
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
TRAINING: dict[str, Any] = {"seed": 0, "steps": 600, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20}


def ensure_built(task_name: str) -> Path:
    """The folder of the task's base model, tokenizer and `prompts.jsonl`, built first if this machine lacks it."""
    task = get_task(task_name)
    folder = cache_folder() / f"{task.name}-{fingerprint(task)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{task.name}-", dir=folder.parent))
    try:
        _build(task, staging)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # already gone when it was renamed
    return folder


def cache_folder() -> Path:
    """`$FTB_LLM_CACHE`, else the user's cache folder."""
    if own := os.environ.get("FTB_LLM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftb_llm"


def fingerprint(task: Task) -> str:
    """A hash of everything that determines the built files."""
    texts = {prompt: list(zip(task.completions(prompt), task.base_weights(prompt), strict=True)) for prompt in task.prompts()}
    libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    sources = [Path(file).read_text(encoding="utf-8") for file in (__file__, tokenizer.__file__)]
    return hashlib.sha256(json.dumps([texts, libraries, sources]).encode()).hexdigest()[:12]


def _publish(staging: Path, folder: Path) -> None:
    """Rename into place; whoever loses a race against another process uses the winner's folder, which is the same."""
    staging.chmod(0o755)
    try:
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _build(task: Task, folder: Path) -> None:
    import torch
    from transformers import GenerationConfig

    log.info("building the %s base model in %s (once per machine)", task.name, folder.parent)
    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float sums, and so the weights, must not depend on the machine's cores
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(TRAINING["seed"])
            words = tokenizer.build_tokenizer(task)
            model = _model(words)
            loss = _train(model, *_examples(task, words))
    finally:
        torch.set_num_threads(threads)
    model.generation_config = GenerationConfig(bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in task.prompts()), encoding="utf-8")
    log.info("built the %s base model in %.0f s, loss %.4f", task.name, time.monotonic() - started, loss)


def _model(words: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **special, **SHAPE))


def _examples(task: Task, words: "PreTrainedTokenizerFast") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Every (prompt, completion, end) as padded ids, with the exact distribution of the next token at each position.

    The distributions are those of a writer who picks completions by the task's base weights; they are zero where nothing is
    to be learned, on the prompt and after the end. Whole distributions carry no sampling noise: a short training will do.
    """
    import torch

    rows = []
    following: dict[tuple[int, ...], dict[int, float]] = {}
    for prompt in task.prompts():
        head = words.encode(prompt)
        for completion, weight in zip(task.completions(prompt), task.base_weights(prompt), strict=True):
            row = [*head, *words.encode(completion), words.eos_token_id]
            rows.append(row)
            for position in range(len(head), len(row)):
                after = following.setdefault(tuple(row[:position]), defaultdict(float))
                after[row[position]] += weight
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [words.pad_token_id] * (width - len(row)) for row in rows])
    next_BTV = torch.zeros(len(rows), width, len(words))
    for index, row in enumerate(rows):
        for position in range(1, len(row)):
            if weights := following.get(tuple(row[:position])):
                next_BTV[index, position - 1, list(weights)] = torch.tensor(list(weights.values())) / sum(weights.values())
    return ids_BT, next_BTV


def _train(model: "LlamaForCausalLM", ids_BT: "torch.Tensor", next_BTV: "torch.Tensor") -> float:
    """Cross-entropy with a warm-up and a linear decay to zero; returns the last batch's loss per sequence."""
    import torch

    steps, warmup, batch_size = TRAINING["steps"], TRAINING["warmup_steps"], TRAINING["batch_size"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["learning_rate"], weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        batch = torch.randint(len(ids_BT), (batch_size,))
        for group in optimizer.param_groups:
            group["lr"] = TRAINING["learning_rate"] * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        loss = -(next_BTV[batch] * model(input_ids=ids_BT[batch]).logits.log_softmax(-1)).sum() / batch_size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log.info("base model: step %d of %d, loss %.4f", step + 1, steps, losses[-1])
    return losses[-1]

"""Random Qwen2 models for measurements, built once per machine: `python -m ftb_llm.bench.random_model SHAPE` prints the folder.

A process of its own, so that the one that measures never holds what building takes.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from ftb_llm.bench.step_cases import SEED, Shape
from ftb_llm.tasks.base_model import cache_folder

POSITIONS = 4096


def model_folder(shape: Shape) -> Path:
    told = json.dumps([asdict(shape), POSITIONS, SEED, version("torch"), version("transformers")])
    return cache_folder() / f"random-qwen2-{shape.hidden}x{shape.layers}-{shape.vocabulary}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def ensure_model(shape: Shape) -> Path:
    """The model's folder, built first if this machine lacks it."""
    folder = model_folder(shape)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".random-", dir=folder.parent))
    try:
        _build(shape, staging)
        staging.chmod(0o755)
        staging.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same model
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _build(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_width // shape.head_width,
        vocab_size=shape.vocabulary,
        max_position_embeddings=POSITIONS,
        initializer_range=0.02,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    Qwen2ForCausalLM(config).to(getattr(torch, shape.dtype)).save_pretrained(folder)


if __name__ == "__main__":
    print(ensure_model(Shape(**json.loads(sys.argv[1]))))

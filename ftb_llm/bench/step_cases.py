"""What `ftb-llm bench learner` and `ftb-llm bench ranks` measure: models of given shapes, and samples of given lengths."""

import random
from dataclasses import asdict, dataclass
from typing import Any

SEED = 0
CONTENDERS = ("ours", "full logits", "TRL")
COMPILED = "ours, compiled"  # a contender only when asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A random Qwen2: unless told otherwise, a quarter of the heads have keys and values of their own, and the feed-forward is four times as wide."""

    hidden: int
    layers: int
    vocabulary: int
    rank: int = 16
    head_width: int = 64
    key_value_heads: int | None = None
    feed_forward: int | None = None
    tied: bool = False
    dtype: str = "float32"

    @property
    def intermediate(self) -> int:
        return self.feed_forward or 4 * self.hidden

    @property
    def heads(self) -> int:
        return self.hidden // self.head_width

    @property
    def key_value_width(self) -> int:
        return self.head_width * (self.key_value_heads or max(1, self.heads // 4))

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one block, by name."""
        wide, narrow, inner = self.hidden, self.key_value_width, self.intermediate
        attention = {"q": (wide, wide), "k": (wide, narrow), "v": (wide, narrow), "o": (wide, wide)}
        return attention | {"gate": (wide, inner), "up": (wide, inner), "down": (inner, wide)}

    @property
    def parameters(self) -> int:
        """Of the vocabulary matrices, one where they are tied, and the linear layers, which is all but a few."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.layers * sum(wide * out for wide, out in self.linear_layers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step to measure: `groups` prompts with `group_size` completions each, all of one length."""

    size: str
    shape: Shape
    groups: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    turns: int = 2  # processes of each contender, one after the others'

    @property
    def ratio(self) -> str:
        """Prompt to completion, such as 8:1."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return f"{prompt // completion}:1" if prompt >= completion else f"1:{completion // prompt}"

    @property
    def tokens_per_step(self) -> int:
        """Prompt and completion of every row: what the samples hold, however much of it a contender computes once."""
        return self.groups * self.group_size * (self.prompt_tokens + self.completion_tokens)

    @property
    def full_logits_bytes(self) -> int:
        """About what the loop with full logits needs: logits, log-softmax and three gradients of their size in float32, and the model."""
        return 4 * (5 * self.tokens_per_step * self.shape.vocabulary + self.shape.parameters) + 2**30

    def facts(self) -> dict[str, Any]:
        """The first columns of its rows."""
        own = asdict(self)
        return {"size": own.pop("size"), "ratio": self.ratio, **own.pop("shape"), **own, "tokens_per_step": self.tokens_per_step}

    def spec(self, *, model_path: str, warmup: int, steps: int, threads: int) -> dict[str, Any]:
        """What a contender's process is told, as JSON."""
        draw = random.Random(SEED)

        def ids(count: int) -> list[int]:
            return [draw.randrange(3, self.shape.vocabulary) for _ in range(count)]

        rows = [[ids(self.completion_tokens) for _ in range(self.group_size)] for _ in range(self.groups)]
        return {
            "model_path": model_path,
            "rank": self.shape.rank,
            "alpha": 2 * self.shape.rank,
            "prompts": [ids(self.prompt_tokens) for _ in range(self.groups)],
            "completions": rows,
            "rewards": [[draw.random() for _ in group] for group in rows],
            "beta": 1.0,
            "learning_rate": 1e-4,
            "adam_betas": [0.9, 0.95],
            "max_grad_norm": 1.0,
            "seed": SEED,
            "warmup": warmup,
            "steps": steps,
            "threads": threads,
        }


TINY = Shape(hidden=128, layers=4, vocabulary=512)
SMALL = Shape(hidden=512, layers=6, vocabulary=32_000)
LARGE = Shape(hidden=1024, layers=6, vocabulary=32_000)
VOCABULARY = Shape(hidden=1024, layers=2, vocabulary=151_936)

CASES = (
    Case(size="tiny", shape=TINY, groups=1, group_size=8, prompt_tokens=256, completion_tokens=256),
    Case(size="tiny", shape=TINY, groups=1, group_size=8, prompt_tokens=512, completion_tokens=64),
    Case(size="small", shape=SMALL, groups=1, group_size=8, prompt_tokens=256, completion_tokens=256),
    Case(size="small", shape=SMALL, groups=1, group_size=8, prompt_tokens=512, completion_tokens=64),
    Case(size="large", shape=LARGE, groups=1, group_size=8, prompt_tokens=128, completion_tokens=128),
    Case(size="vocabulary", shape=VOCABULARY, groups=1, group_size=8, prompt_tokens=256, completion_tokens=256, turns=1),  # for its memory
    Case(size="vocabulary", shape=VOCABULARY, groups=1, group_size=4, prompt_tokens=64, completion_tokens=512, turns=1),  # little of it prompts
)
SIZES = tuple(dict.fromkeys(case.size for case in CASES))
RANK_CASES = {
    size: Case(size=size, shape=shape, groups=8, group_size=4, prompt_tokens=64, completion_tokens=64)
    for size, shape in (("tiny", TINY), ("small", SMALL), ("large", LARGE))
}  # a step that ranks share, by size
HEADLINES = ("small", "large", "tiny")  # the speed-ups in the summary are those of the first of these that was measured

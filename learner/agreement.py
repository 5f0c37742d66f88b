"""The trial: does the packed way give what the model's own attention gives? Asked once, when a model is loaded.

The packed way stands on transformers' conventions: attention that comes from its interface and is a plain causal softmax,
logits that are the head of the last hidden state. Who departs from them (attention sinks, capped scores or logits, windows,
masks and widths of its own) is found out twice, before anything is scored:

- on a small copy: the same class and config in float32, with random weights, few layers, words and feed-forward units, and
  with every window, chunk and original length that the model's sequences can exceed cut to a few tokens. So a few dozen
  tokens go beyond all that the config names, whatever the model's size and precision, and the two ways must agree in
  log-probs and gradients up to float32's rounding. The weights are large enough for every departure to tell: a real model's
  may be so small, or its precision so coarse, that an error hides in the tolerance.
- on the model itself, a few tokens in its own precision: it must run, and come out near.

The model's own attention is what transformers loaded it with, and what it keeps, or gets back, where the answer is no.
An exception in the packed way is such an answer: it tells of the same departures.
"""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from learner.attention import NAME
from learner.packing import Batch, pack
from learner.ways import packed_way, plain_way

VALUE, GRADIENT = 2e-5, 2e-4  # largest differences on the copy: of a log-prob, and of the gradient's norm, both relative
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # largest difference per token on the model between two orders of summing
SHORT = 5  # tokens of a cut window
TOKENS = 18  # of the trial's longest sequence
WORDS, UNITS = 128, 64  # of the copy's vocabulary and feed-forward layers
LARGEST_COPY = 500_000_000  # numbers; beyond it, memory would be the price
GAIN = 1.5  # of the copy's weights: scores and logits are of order one

_LENGTHS = re.compile(r"window|chunk|local_attention|floor_scale")
_NO_LENGTHS = re.compile(r"layer|pattern|feed_forward|mamba|ssm")
_UNITS = re.compile(r"(^|_)(intermediate_size|ffn_dim|ffn_hidden_size|n_inner)$")
_ORIGINAL = "original_max_position_embeddings"
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

Way = Callable[[PreTrainedModel, Batch], Tensor]
Result = TypeVar("Result")


def take_packed(model: PreTrainedModel, *, longest: int, float32_head: bool = False) -> bool:
    """Give the model the packed attention if both trials allow it for sequences of up to `longest` tokens; returns whether."""
    own = model.config._attn_implementation
    if own == NAME:
        return True  # it has passed
    if not _may_pack(model, longest) or not copy_agrees(model, longest=longest, float32_head=float32_head):
        return False
    batch = _batch(model, longest, model.get_input_embeddings().weight.device)
    with torch.no_grad():
        expected = plain_way(model, batch)
        model.set_attn_implementation(NAME)
        got = _attempt(partial(packed_way, float32_head=float32_head), model, batch)
    if got is not None and _largest(got, expected) <= NEAR.get(model.get_input_embeddings().weight.dtype, 1e-3):
        return True
    model.set_attn_implementation(own)
    return False


def copy_agrees(model: PreTrainedModel, *, longest: int, float32_head: bool = False) -> bool:
    """The trial on the small copy. Random numbers drawn elsewhere are not disturbed."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for small in _copies(model, longest):
            batch = _batch(small, longest, "cpu")
            expected = _attempt(_measured, small, batch, plain_way)
            if expected is None:
                continue  # the cuts were too deep for this family
            small.set_attn_implementation(NAME)
            got = _attempt(_measured, small, batch, partial(packed_way, float32_head=float32_head))
            return got is not None and _equal(got, expected)
    return False


def _may_pack(model: PreTrainedModel, longest: int) -> bool:
    """What the model says of itself: attention from transformers' interface, uncapped, and over all of `longest` tokens."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    slides = "sliding_attention" in layers or not hasattr(config, "layer_types")
    window = getattr(config, "sliding_window", None) if slides else None
    return (
        getattr(model, "_supports_attention_backend", False)
        and getattr(config, "attn_logit_softcapping", None) is None
        and set(layers) <= {"full_attention", "sliding_attention"}
        and (window is None or longest <= window)
    )


def _attempt(way: Callable[..., Result], *args: Any) -> Result | None:
    try:
        return way(*args)
    except Exception:  # noqa: BLE001 - a model of another kind may raise anything here, and that is the answer
        return None


def _measured(model: PreTrainedModel, batch: Batch, way: Way) -> tuple[Tensor, Tensor]:
    """Log-probs and the gradient of a sum of them with weights of both signs, as one vector."""
    logp_M = way(model, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights_M = torch.linspace(-1, 1, len(logp_M))
    gradients = torch.autograd.grad((weights_M * logp_M).sum(), parameters, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return logp_M.detach(), torch.cat([part.flatten() for part in parts])


def _equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    value = _largest(got[0], expected[0]) <= VALUE * expected[0].abs().max().clamp(min=1).item()
    return value and ((got[1] - expected[1]).norm() <= GRADIENT * expected[1].norm()).item()  # of nan, neither is true


def _largest(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()


def _batch(model: PreTrainedModel, longest: int, device: torch.device | str) -> Batch:
    """Two prompts with two completions each, all of different lengths, up to `TOKENS` together or `longest`."""
    vocabulary, room = len(model.get_input_embeddings().weight), min(TOKENS, longest)
    first, second = min(5, room - 1), min(3, room - 1)

    def ids(start: int, count: int) -> list[int]:
        return [1 + 7 * index % (vocabulary - 1) for index in range(start, start + count)]

    completions = [[ids(5, room - first), ids(8, 1)], [ids(3, min(3, room - second)), ids(4, room - second)]]
    return pack([ids(0, first), ids(2, second)], completions, device)


def _copies(model: PreTrainedModel, longest: int) -> Iterator[PreTrainedModel]:
    """From the smallest to the one that has everything but its windows whole: families differ in what can be cut."""
    depth = _depth(model)
    for cut_layers, cut_widths in ((True, True), (True, False), (False, True), (False, False)):
        config = _cut(model.config, depth=depth if cut_layers else None, widths=cut_widths, longest=longest)
        small = _attempt(_made, type(model), config)
        if small is not None:
            yield small


def _made(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if count > LARGEST_COPY:
        raise MemoryError(f"a copy of {count} numbers")
    small = kind(config).to("cpu", torch.float32).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=GAIN * max(parameter.shape[-2:]) ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for ends in (small.get_input_embeddings(), small.get_output_embeddings()):
        ends.requires_grad_(False)  # the head as it is in training
    return small


def _cut(config: PreTrainedConfig, *, depth: int | None, widths: bool, longest: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if _LENGTHS.search(name) and not _NO_LENGTHS.search(name) and type(value) is int and value > 1:
            setattr(text, name, _length(value, longest))
        elif isinstance(value, dict) and name.startswith("rope"):
            setattr(text, name, _cut_rope(value, longest))
        elif widths and _UNITS.search(name) and isinstance(value, int | list):
            setattr(text, name, min(value, UNITS) if isinstance(value, int) else [min(one, UNITS) for one in value])
    if widths and text.vocab_size > WORDS:
        text.vocab_size = WORDS
        for name in _TOKEN_IDS:
            if getattr(text, name, None) is not None:
                setattr(text, name, 0)
    if depth is not None:
        whole = text.num_hidden_layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list | tuple) and len(value) == whole:
                setattr(text, name, value[:depth])
        text.num_hidden_layers = depth
    return config


def _length(value: int, longest: int) -> int:
    """Short if the model's sequences can exceed it, and out of the trial's reach if they can't."""
    return SHORT if value < longest else max(value, 2 * TOKENS)


def _cut_rope(rope: dict[str, Any], longest: int) -> dict[str, Any]:
    changed: dict[str, Any] = {name: _cut_rope(value, longest) for name, value in rope.items() if isinstance(value, dict)}
    if isinstance(rope.get(_ORIGINAL), int):
        changed[_ORIGINAL] = _length(rope[_ORIGINAL], longest)
    return rope | changed


def _depth(model: PreTrainedModel) -> int:
    """How many layers from the first on have every kind among them, and two at least."""
    whole: int = model.config.get_text_config().num_hidden_layers
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == whole:
            kinds = [_kind(layer) for layer in stack]
            return min(whole, max(2, 1 + max(kinds.index(kind) for kind in kinds)))
    return whole


def _kind(layer: nn.Module) -> list[tuple[Any, ...]]:
    """What the layer is made of, and every plain setting of its parts but which layer it is."""
    return [
        (name, type(module).__name__, *sorted((key, value) for key, value in vars(module).items() if _is_setting(key, value)))
        for name, module in layer.named_modules()
    ]


def _is_setting(key: str, value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and not re.search(r"idx|layer_id|layer_number|^_", key)

"""The tokenizer of a built-in task: one token per number, word and sign, and nothing else.

Any two different token sequences that lack the end token decode to different texts, or to texts that are both malformed.
So the probability of a well-formed text is that of its one token sequence, which is what makes the oracle exact.
"""

import re
from typing import TYPE_CHECKING

from ftb_llm.tasks.oracle import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<end>"
UNKNOWN = "<unknown>"  # an ordinary token, not a special one: it must show in the text, so that such text is malformed
PIECE = r" ?[0-9]+|[a-z]+|[:=+]"


def vocabulary(task: Task) -> list[str]:
    """END, UNKNOWN, then every piece of the task's prompts and completions in sorted order."""
    texts = {text for prompt in task.prompts() for text in (prompt, *task.completions(prompt))}
    pieces = {piece for text in texts for piece in re.findall(PIECE, text)}
    return [END, UNKNOWN, *sorted(pieces)]


def build_tokenizer(task: Task) -> "PreTrainedTokenizerFast":
    """A fast tokenizer whose tokens decode to pieces that concatenate to the text."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    ids = {piece: index for index, piece in enumerate(vocabulary(task))}
    backend = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = Split(Regex(PIECE), behavior="isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False)

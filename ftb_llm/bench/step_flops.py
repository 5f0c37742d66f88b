"""How many floating-point operations a learner's step needs, whatever a program makes of it.

Needed is: each prompt once per group, each completion token but the last (nothing follows it), logits only where a completion
token is predicted, every token's attention to itself and those before it, and no weight gradient for frozen weights. A
multiplication and an addition are two operations; norms, activations and softmax are left out, as is usual.
"""

from ftb_llm.bench.step_cases import Case, Shape


def case_flops(case: Case) -> int:
    """Of one whole step."""
    prompt, completion, size = case.prompt_tokens, case.completion_tokens, case.group_size
    inputs = completion - 1
    tokens = prompt + size * inputs
    predicting = 1 + size * inputs  # the prompt's last position stands for the first token of all its completions
    pairs = prompt * (prompt + 1) // 2 + size * (inputs * prompt + inputs * (inputs + 1) // 2)
    return case.groups * step_flops(case.shape, tokens=tokens, predicting=predicting, pairs=pairs)


def step_flops(shape: Shape, *, tokens: int, predicting: int, pairs: int) -> int:
    """The reference's forward pass, the policy's forward pass, and the policy's backward pass.

    | part | reference | policy | backward |
    |---|---|---|---|
    | a frozen linear layer, m to n | 2 m n per token | the same | the same, for its input's gradient |
    | its adapter of rank r | | 2 r (m + n) per token | twice that: for its two matrices and for what flows through them |
    | attention of width D | 4 D per pair of tokens | the same | twice that |
    | the head, D to V | 2 D V per predicting position | the same | the same |

    The embeddings are frozen, so nothing flows back to the first block's input: its q, k and v have no input gradient.

    Args:
        tokens: that go through the blocks.
        predicting: positions whose logits are wanted.
        pairs: of a token and one that it attends to.
    """
    frozen = sum(2 * m * n for m, n in shape.linear_layers.values())
    adapter = sum(2 * shape.rank * (m + n) for m, n in shape.linear_layers.values())
    first = [shape.linear_layers[name] for name in "qkv"]
    not_needed = sum(2 * m * n + 2 * shape.rank * m for m, n in first)
    linear = tokens * (shape.layers * (3 * frozen + 3 * adapter) - not_needed)
    attention = pairs * shape.layers * 4 * shape.hidden * (1 + 1 + 2)
    head = predicting * 3 * 2 * shape.hidden * shape.vocabulary
    return linear + attention + head

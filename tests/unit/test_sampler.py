from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftb_llm.errors import FtbError
from ftb_llm.types import Completion, FinishReason, Group, GroupRequest, SamplingSpec
from learner.model import AdaptedModel
from learner.packing import pack
from learner.sampler import Sampler
from tests import tiny_llama

PROMPTS = tiny_llama.PROMPTS[:2]  # of different lengths
END = 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(path: Path) -> AdaptedModel:
    """Some way off its reference, so that the adapter matters."""
    model = AdaptedModel(tiny_llama.tiny_config(), path)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def sampling(size: int, max_tokens: int, *, temperature: float = 1.0, top_p: float = 1.0, token_logprobs: bool = False) -> SamplingSpec:
    return SamplingSpec(group_size=size, temperature=temperature, top_p=top_p, max_tokens=max_tokens, token_logprobs=token_logprobs)


def sample(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, spec: SamplingSpec, *, seed: int = 0, version: int = 0) -> list[Group]:
    requests = [GroupRequest(group_id=f"g{prompt.index}", prompt=prompt, sampling=spec) for prompt in PROMPTS]
    return Sampler(model, tokenizer, seed=seed).sample(requests, version=version)


def outcomes(vocabulary: int) -> list[tuple[int, ...]]:
    """Every completion of at most two tokens."""
    return [(END,), *((first, second) for first in range(1, vocabulary) for second in range(vocabulary))]


def exact_logprobs(model: AdaptedModel, index: int, rows: list[tuple[int, ...]]) -> Tensor:
    with torch.no_grad():
        return model.scorer.completion_logprobs(pack([PROMPTS[index].token_ids], [rows]))[0].double()


def surprise(counts: Tensor, p: Tensor) -> float:
    """How many standard deviations Pearson's chi-square lies above its mean; outcomes expected fewer than five times are taken together."""
    expected = p * counts.sum()
    common = expected >= 5
    seen = torch.cat([counts[common], counts[~common].sum().view(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().view(1)])
    freedom = len(seen) - 1
    return float(((seen - wanted).square() / wanted).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_samples_come_as_often_as_the_model_says(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase, temperature: float) -> None:
    rows = outcomes(len(tokenizer))
    place = {row: number for number, row in enumerate(rows)}
    for index, group in enumerate(sample(model, tokenizer, sampling(20_000, 2, temperature=temperature))):
        counts = torch.zeros(len(rows), dtype=torch.float64)
        for completion in group.completions:
            counts[place[completion.token_ids]] += 1
        assert surprise(counts, tempered(model, index, rows, temperature)) < 5


def tempered(model: AdaptedModel, index: int, rows: list[tuple[int, ...]], temperature: float) -> Tensor:
    """The probability of each outcome when both tokens are drawn at that temperature."""
    vocabulary = max(second for _, second in rows[1:]) + 1
    first = torch.softmax(exact_logprobs(model, index, [(token,) for token in range(vocabulary)]) / temperature, -1)
    pairs = exact_logprobs(model, index, rows[1:]).view(vocabulary - 1, vocabulary)
    return torch.cat([first[:1], (first[1:, None] * torch.softmax(pairs / temperature, -1)).flatten()])


def test_a_wrong_distribution_is_surprising(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = outcomes(len(tokenizer))
    counts = 20_000 * exact_logprobs(model, 0, rows).exp()
    assert surprise(counts, exact_logprobs(model, 1, rows).exp()) > 50


def test_logprobs_are_those_of_the_learner(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    groups = sample(model, tokenizer, sampling(50, 6, temperature=1.3, top_p=0.9, token_logprobs=True))
    batch = pack([group.prompt.token_ids for group in groups], [[one.token_ids for one in group.completions] for group in groups])
    with torch.no_grad():
        expected = model.scorer.completion_logprobs(batch)
    actual = torch.tensor([[one.logprob for one in group.completions] for group in groups])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for one in completions(groups):
        assert one.token_logprobs is not None
        assert len(one.token_logprobs) == len(one.token_ids)
        assert sum(one.token_logprobs) == one.logprob


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def test_a_completion_ends_with_the_end_token_or_at_the_limit(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    drawn = completions(sample(model, tokenizer, sampling(2000, 3), version=7))
    assert {one.finish_reason for one in drawn} == {FinishReason.STOP, FinishReason.LENGTH}
    for one in drawn:
        stopped = one.token_ids[-1] == END
        assert one.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert END not in one.token_ids[:-1]
        assert stopped or len(one.token_ids) == 3
        assert one.text == tokenizer.decode(one.token_ids[:-1] if stopped else one.token_ids)
        assert (one.min_version, one.max_version, one.token_logprobs) == (7, 7, None)


def test_the_nucleus_is_the_likeliest_tokens(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    p = exact_logprobs(model, 0, [(token,) for token in range(len(tokenizer))]).exp()
    likeliest = p.argsort(descending=True).tolist()
    wanted = 1 + int((p[likeliest].cumsum(-1) < 0.5).sum())  # the fewest that hold half of the mass
    group = sample(model, tokenizer, sampling(5000, 1, top_p=0.5))[0]
    assert {one.token_ids[0] for one in group.completions} == set(likeliest[:wanted])


def test_a_seed_settles_the_samples(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (completions(sample(model, tokenizer, sampling(20, 4), seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_groups_keep_their_request(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    groups = sample(model, tokenizer, sampling(3, 2))
    assert [(group.id, group.prompt, len(group.completions)) for group in groups] == [("g0", PROMPTS[0], 3), ("g1", PROMPTS[1], 3)]


def test_a_broken_model_is_an_error(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AdaptedModel(tiny_llama.tiny_config(), path)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(FtbError, match="the model's logits are not finite"):
        sample(model, tokenizer, sampling(2, 2))

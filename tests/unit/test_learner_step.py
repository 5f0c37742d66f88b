import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftb_llm.baselines import BASELINES
from ftb_llm.divergences import FAMILY, get_divergence
from ftb_llm.errors import FtbError
from ftb_llm.shadow import shadow_metrics
from ftb_llm.types import FinishReason, ScoredGroup, StepReport, StepRequest
from learner.model import AdaptedModel
from learner.packing import pack
from learner.step import policy_logprobs, take_step
from tests import tiny_llama
from tests.tiny_llama import untimed


class Recording(AdaptedModel):
    """Keeps the gradient that the update sees."""

    gradient: dict[str, Tensor]

    def update(self, *, step: int, learning_rate: float, max_grad_norm: float) -> float:
        self.gradient = {name: parameter.grad.clone() for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return super().update(step=step, learning_rate=learning_rate, max_grad_norm=max_grad_norm)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def moved(path: Path) -> Recording:
    """A model some way off its reference, so that no weight of the step vanishes by symmetry."""
    model = Recording(tiny_llama.tiny_config(), path)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def plain_logprobs(model: AdaptedModel, groups: tuple[ScoredGroup, ...]) -> Tensor:
    rows = []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        for completion in scored.group.completions:
            ids = torch.tensor([prompt + completion.token_ids])
            logp = torch.log_softmax(model.module(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float(), -1)
            rows.append(logp.gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).sum())
    return torch.stack(rows).view(len(groups), -1)


@pytest.mark.parametrize("tempered", [False, True])
@pytest.mark.parametrize("divergence", [*FAMILY, "alpha"])
def test_gradient_and_loss_are_those_of_the_closed_form(path: Path, divergence: str, tempered: bool) -> None:
    model = moved(path)
    objective = replace(tiny_llama.step_request(1).objective, divergence=divergence, alpha=1.5 if divergence == "alpha" else None, tempered=tempered)
    request = tiny_llama.step_request(1, objective=objective)
    with torch.no_grad(), model.as_reference():
        reference = plain_logprobs(model, request.groups).double()
    reward = torch.tensor([scored.rewards for scored in request.groups], dtype=torch.float64)
    delta = plain_logprobs(model, request.groups).double() - reference - reward / 0.5
    member, b = get_divergence(divergence, objective.alpha), 0.5 if tempered else 1.0
    loss = member.loss(b * delta + member.log_z(b * delta.detach()).unsqueeze(-1)).mean() / b
    named = {name: parameter for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    expected = torch.autograd.grad(loss, list(named.values()))

    report = take_step(model, request, micro_batch_tokens=1000)
    assert report.loss == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in zip(named, expected, strict=True):
        torch.testing.assert_close(model.gradient[name], gradient, rtol=2e-3, atol=1e-4 * float(max(part.abs().max() for part in expected)))
    torch.testing.assert_close(torch.tensor(report.delta_GK, dtype=torch.float64), delta.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 8, 20, 45])  # in parts of groups, group by group, two at a time
def test_micro_batches_make_the_same_step(path: Path, size: int) -> None:
    whole, parts = moved(path), moved(path)
    request = tiny_llama.step_request(1, divergence="hellinger")
    a = take_step(whole, request, micro_batch_tokens=1000)
    b = take_step(parts, request, micro_batch_tokens=size)
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.metrics["perf/micro_batches"] >= a.metrics["perf/micro_batches"] == 1
    assert 0 <= b.metrics["perf/padding_share"] < 0.05
    assert whatever_batching(b) == pytest.approx(whatever_batching(a), rel=1e-5)
    differences = [gradient - parts.gradient[name] for name, gradient in whole.gradient.items()]
    assert norm(differences) <= 1e-6 * norm(list(whole.gradient.values()))


def whatever_batching(report: StepReport) -> dict[str, float]:
    return {name: value for name, value in untimed(report).metrics.items() if name not in ("perf/micro_batches", "perf/padding_share")}


def norm(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def test_metrics(path: Path) -> None:
    model = moved(path)
    request = tiny_llama.step_request(1)
    logp = plain_logprobs(model, request.groups).detach().double()
    engine = torch.tensor([[completion.logprob for completion in scored.group.completions] for scored in request.groups])
    report = take_step(model, request, micro_batch_tokens=1000)
    assert set(report.metrics) == {
        "perf/packed_tokens",
        "perf/padding_share",
        "perf/micro_batches",
        "optim/loss",
        "optim/grad_norm",
        "optim/learning_rate",
        "off_policy/logprob_diff_mean",
        "off_policy/logprob_diff_max",
        "perf/learn_tokens",
        "optim/masked_completions",
        "time/divergence_seconds",
        *shadow_metrics(torch.tensor(report.delta_GK)),
    }
    assert report.metrics["optim/learning_rate"] == 1e-2
    assert report.metrics["optim/loss"] == report.loss == pytest.approx(report.metrics["divergence/loss/reverse_kl"], rel=1e-6)
    assert report.metrics["off_policy/logprob_diff_max"] == pytest.approx((logp - engine).abs().max().item(), rel=1e-4)
    assert report.metrics["off_policy/logprob_diff_mean"] == pytest.approx((logp - engine).abs().mean().item(), rel=1e-4)
    assert report.metrics["perf/learn_tokens"] == sum(scored.group.token_count for scored in request.groups)
    torch.testing.assert_close(torch.tensor(report.logp_GK, dtype=torch.float64), logp, rtol=1e-5, atol=1e-5)


def test_the_padding_of_all_micro_batches_is_reported(path: Path) -> None:
    """A group in two parts pads each of them; what is padded is little however unlike the lengths."""
    lengths = [[2, 9, 30, 31, 32, 50], [40, 39, 38, 3, 2, 1]]
    scored = [tiny_llama.scored_group(seed) for seed in (0, 1)]
    groups = [
        replace(
            one,
            group=replace(
                one.group,
                completions=tuple(replace(completion, token_ids=(1,) * length) for completion, length in zip(one.group.completions, row, strict=True)),
            ),
        )
        for one, row in zip(scored, lengths, strict=True)
    ]
    report = take_step(moved(path), tiny_llama.step_request(1, groups=tuple(groups)), micro_batch_tokens=130)
    prompts = [list(one.group.prompt.token_ids) for one in groups]
    rows = [(0, lengths[0][:5]), (0, lengths[0][5:]), (1, lengths[1])]
    batches = [pack([prompts[place]], [[[1] * length for length in row]]) for place, row in rows]
    padding, tokens = sum(batch.padding for batch in batches), sum(len(batch.ids_N) for batch in batches)
    assert padding > 0
    assert report.metrics["perf/padding_share"] == pytest.approx(padding / (tokens + padding), rel=1e-12)
    assert report.metrics["perf/padding_share"] < 0.05


def test_the_alpha_member_in_use_is_reported(path: Path) -> None:
    objective = replace(tiny_llama.step_request(1).objective, divergence="alpha", alpha=1.5)
    report = take_step(moved(path), tiny_llama.step_request(1, objective=objective), micro_batch_tokens=1000)
    assert report.metrics["divergence/loss/alpha"] == pytest.approx(report.loss, rel=1e-6)


def losses(path: Path, steps: int, divergence: str = "reverse_kl") -> list[StepReport]:
    model = AdaptedModel(tiny_llama.tiny_config(), path)
    return [take_step(model, tiny_llama.step_request(step, divergence=divergence), micro_batch_tokens=1000) for step in range(1, steps + 1)]


def test_the_seed_gives_the_same_losses_twice(path: Path) -> None:
    assert [untimed(report) for report in losses(path, 5)] == [untimed(report) for report in losses(path, 5)]


@pytest.mark.parametrize("divergence", FAMILY)
def test_every_member_descends_on_fixed_groups(path: Path, divergence: str) -> None:
    reports = losses(path, 25, divergence)
    assert reports[-1].loss < 0.7 * reports[0].loss


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_leaves_the_weights(path: Path, reward: float) -> None:
    model = moved(path)
    request = tiny_llama.step_request(3)
    broken = replace(request.groups[0], rewards=(reward, *request.groups[0].rewards[1:]))
    before = model.adapter_state()
    with pytest.raises(FtbError, match=r"step 3: .* not finite; the weights are those of step 2"):
        take_step(model, replace(request, groups=(broken, *request.groups[1:])), micro_batch_tokens=1000)
    after = model.adapter_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again: StepRequest = tiny_llama.step_request(3)
    assert take_step(model, again, micro_batch_tokens=1000).loss == take_step(moved(path), again, micro_batch_tokens=1000).loss


def test_policy_logprobs_in_any_batching(path: Path) -> None:
    model = moved(path)
    groups = [scored.group for scored in tiny_llama.step_request(1, seeds=(0, 1, 2, 3, 4)).groups]
    expected = plain_logprobs(model, tiny_llama.step_request(1, seeds=(0, 1, 2, 3, 4)).groups)
    for size in (20, 1000):
        torch.testing.assert_close(torch.tensor(policy_logprobs(model, groups, micro_batch_tokens=size)), expected.detach(), rtol=1e-5, atol=1e-5)


def with_behaviour(request: StepRequest, seed: int) -> StepRequest:
    """The same samples, with other thoughts of the sampler about them."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for scored in request.groups:
        completions = []
        for completion in scored.group.completions:
            tokens = (-3 * torch.rand(len(completion.token_ids), generator=generator)).tolist()
            completions.append(replace(completion, token_logprobs=tuple(tokens), logprob=sum(tokens)))
        groups.append(replace(scored, group=replace(scored.group, completions=tuple(completions))))
    return replace(request, groups=tuple(groups))


@pytest.mark.parametrize("log_z", ["batch", "learned"])
@pytest.mark.parametrize("divergence", FAMILY)
def test_ftb_never_reads_what_the_sampler_thought(path: Path, divergence: str, log_z: str) -> None:
    """Loss, gradient and learned log Z are bit-identical under any behaviour log-probs, over two steps."""
    objective = replace(tiny_llama.step_request(1).objective, divergence=divergence, log_z=log_z)
    models = [moved(path) for _ in range(3)]
    for step in (1, 2):
        request = tiny_llama.step_request(step, objective=objective)
        reports = [take_step(models[0], request, micro_batch_tokens=1000)]
        reports += [take_step(model, with_behaviour(request, seed), micro_batch_tokens=1000) for seed, model in enumerate(models[1:])]
        assert len({report.metrics["off_policy/logprob_diff_max"] for report in reports}) == 3
        for model, report in zip(models[1:], reports[1:], strict=True):
            assert report.loss == reports[0].loss
            assert all(torch.equal(model.gradient[name], gradient) for name, gradient in models[0].gradient.items())
            assert model.log_z.state() == models[0].log_z.state()


@pytest.mark.parametrize("kind", BASELINES)
def test_a_baseline_does_read_it_and_takes_the_same_step_in_micro_batches(path: Path, kind: str) -> None:
    request = tiny_llama.step_request(1, objective=replace(tiny_llama.step_request(1).objective, kind=kind))
    whole, parts, other = moved(path), moved(path), moved(path)
    a = take_step(whole, with_behaviour(request, 0), micro_batch_tokens=1000)
    b = take_step(parts, with_behaviour(request, 0), micro_batch_tokens=20)
    take_step(other, with_behaviour(request, 1), micro_batch_tokens=1000)
    assert whatever_batching(b) == pytest.approx(whatever_batching(a), rel=1e-4, abs=1e-6)
    size = norm(list(whole.gradient.values()))
    assert norm([gradient - parts.gradient[name] for name, gradient in whole.gradient.items()]) <= 1e-5 * size
    assert norm([gradient - other.gradient[name] for name, gradient in whole.gradient.items()]) > 1e-2 * size


def cut(request: StepRequest, places: set[tuple[int, int]]) -> StepRequest:
    """The completions at (group, place) were cut at max_tokens."""
    groups = []
    for g, scored in enumerate(request.groups):
        completions = [
            replace(completion, finish_reason=FinishReason.LENGTH if (g, k) in places else FinishReason.STOP)
            for k, completion in enumerate(scored.group.completions)
        ]
        groups.append(replace(scored, group=replace(scored.group, completions=tuple(completions))))
    return replace(request, groups=tuple(groups))


@pytest.mark.parametrize("kind", ["ftb", *BASELINES])
def test_truncated_completions_are_masked_when_asked(path: Path, kind: str) -> None:
    """Masked, their reward and place in the group don't matter; kept, they do."""
    objective = replace(tiny_llama.step_request(1).objective, kind=kind)
    request = with_behaviour(cut(tiny_llama.step_request(1, objective=objective), {(0, 1), (2, 0)}), 0)
    rewarded = []
    for scored in request.groups:
        kept = zip(scored.rewards, scored.group.completions, strict=True)
        rewarded.append(replace(scored, rewards=tuple(9.0 if completion.finish_reason is FinishReason.LENGTH else reward for reward, completion in kept)))
    other = replace(request, groups=tuple(rewarded))
    gradients = {}
    for truncated in ("keep", "mask"):
        for name, one in (("own", request), ("other", other)):
            model = moved(path)
            report = take_step(model, replace(one, objective=replace(objective, truncated=truncated)), micro_batch_tokens=45)
            gradients[truncated, name] = list(model.gradient.values())
            assert report.metrics["optim/masked_completions"] == (2 if truncated == "mask" else 0)
    assert all(torch.equal(a, b) for a, b in zip(gradients["mask", "own"], gradients["mask", "other"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(gradients["keep", "own"], gradients["keep", "other"], strict=True))


def test_a_step_of_nothing_but_truncated_completions_has_no_gradient(path: Path) -> None:
    request = tiny_llama.step_request(1)
    everything = {(g, k) for g, scored in enumerate(request.groups) for k in range(len(scored.rewards))}
    model = moved(path)
    report = take_step(model, replace(cut(request, everything), objective=replace(request.objective, truncated="mask")), micro_batch_tokens=1000)
    assert report.loss == 0
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert max(gradient.abs().max().item() for gradient in model.gradient.values()) == 0


def test_a_learned_log_z_follows_the_batch_and_is_left_alone_by_a_failed_step(path: Path) -> None:
    """One prompt per group: after the first step each value is the group's own normaliser; then it moves at its rate."""
    objective = replace(tiny_llama.step_request(1).objective, log_z="learned", log_z_rate=0.5)
    model = moved(path)
    request = tiny_llama.step_request(1, objective=objective)
    first = take_step(model, request, micro_batch_tokens=45)
    prompts = [scored.group.prompt.index for scored in request.groups]
    assert len(set(prompts)) == len(prompts)
    start = [-sum(row) / len(row) for row in first.delta_GK]
    assert [model.log_z.state()["values"][str(prompt)] for prompt in prompts] == pytest.approx(start, rel=1e-6)
    second = take_step(model, tiny_llama.step_request(2, objective=objective), micro_batch_tokens=45)
    slopes = [sum(row) / len(row) + value for row, value in zip(second.delta_GK, start, strict=True)]
    expected = [value - 0.5 * max(-1, min(1, slope)) for value, slope in zip(start, slopes, strict=True)]
    before = model.log_z.state()
    assert [before["values"][str(prompt)] for prompt in prompts] == pytest.approx(expected, rel=1e-6)
    assert second.metrics["optim/log_z_mean"] == pytest.approx(sum(start) / len(start), rel=1e-6)
    broken = tiny_llama.step_request(3, objective=objective)
    broken = replace(broken, groups=(replace(broken.groups[0], rewards=(math.nan, *broken.groups[0].rewards[1:])), *broken.groups[1:]))
    with pytest.raises(FtbError, match="not finite"):
        take_step(model, broken, micro_batch_tokens=45)
    assert model.log_z.state() == before


def test_a_group_of_nothing_but_masked_completions_teaches_no_log_z(path: Path) -> None:
    objective = replace(tiny_llama.step_request(1).objective, log_z="learned", truncated="mask")
    request = tiny_llama.step_request(1, objective=objective)
    model = moved(path)
    take_step(model, cut(request, {(0, k) for k in range(len(request.groups[0].rewards))}), micro_batch_tokens=45)
    known = {str(scored.group.prompt.index) for scored in request.groups[1:]}
    assert set(model.log_z.state()["values"]) == known
    assert str(request.groups[0].group.prompt.index) not in known

"""A trial: one short training in one process, with the real learner and samples that are a fixed number of steps old.

The step under test is `take_step` itself, and the verdict is the exact oracle's. Only the sampling is simpler than in a run:
it happens here, and each batch waits in a queue until it is `lag` steps old. So step t trains on what the weights after
step max(0, t - 1 - lag) gave, and at lag 0 every step trains on samples of the very weights that it moves.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftb_llm.bench.coverage import PASS_AT, count, pass_at_k
from ftb_llm.bench.spec import CurvePoint, TrialResult, TrialSpec
from ftb_llm.config import Config
from ftb_llm.config.resolve import resolve_learning_rate, resolve_objective
from ftb_llm.config.schema import TOKEN_LEVEL
from ftb_llm.datasets import PromptOrder, to_prompt
from ftb_llm.errors import ConfigError, FtbError, InvalidConfig, RewardError
from ftb_llm.rewards import RewardSet, reward_call
from ftb_llm.tasks import get_task
from ftb_llm.tasks.base_model import ensure_built
from ftb_llm.types import EvalReport, GroupRequest, SamplingSpec, ScoredGroup, StepRequest
from learner.evaluate import Evaluator
from learner.model import AdaptedModel
from learner.sampler import Sampler
from learner.step import take_step

Batch = tuple[ScoredGroup, ...]
MISTAKES = (InvalidConfig, ConfigError, RewardError)  # of who set the trial up: they say nothing about the objective


def run_trial(spec: TrialSpec) -> TrialResult:
    """Train and judge. What the objective itself breaks, such as a gradient that is not finite, ends the trial early and is its result."""
    torch.set_num_threads(1)  # trials run side by side
    return run(Trial(spec, model_path=ensure_built(spec.task)))


def run(trial: "Trial") -> TrialResult:
    """Take all steps, or as many as can be taken. A mistake in the setup is no result: it is raised."""
    began = time.monotonic()
    error = None
    try:
        for _ in trial.steps():
            pass
    except MISTAKES:
        raise
    except FtbError as problem:
        error = str(problem)
        trial.judge_what_is_left()
    return trial.result(seconds=time.monotonic() - began, error=error)


class Trial:
    """The state of one trial. Everything random follows from the config's seed."""

    def __init__(self, spec: TrialSpec, *, model_path: Path) -> None:
        self.spec = spec
        self.config: Config = spec.config()
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path)
        prompts = [to_prompt(index, {"prompt": text}, tokenizer) for index, text in enumerate(get_task(spec.task).prompts())]
        self.model = AdaptedModel(self.config, model_path)
        self.rewards = RewardSet(self.config.rewards.functions)
        self._sampler = Sampler(self.model, tokenizer, seed=self.config.run.seed)
        self._prompts = PromptOrder(prompts, seed=self.config.run.seed, shuffle=self.config.data.shuffle)
        self._evaluator = Evaluator(self.model, tokenizer, spec.task)
        self._queue: deque[Batch] = deque()
        self._sampled = 0
        self._taken = 0
        self._curve: list[CurvePoint] = []
        self._report = self._judge(0)

    def steps(self) -> Iterator[Batch]:
        """Take every step, one per batch that it yields: the one just trained on."""
        config, last = self.config, self.config.run.max_steps
        for _ in range(min(self.spec.lag + 1, last)):
            self._sample(version=0)
        for step in range(1, last + 1):
            batch = self._queue.popleft()
            request = StepRequest(
                step=step,
                config_version=1,
                objective=resolve_objective(config.objective, step, since=1),
                learning_rate=resolve_learning_rate(config, step),
                max_grad_norm=config.learner.max_grad_norm,
                groups=batch,
            )
            with users_code(request):
                take_step(self.model, request, micro_batch_tokens=config.learner.micro_batch_tokens)
            self._taken = step
            if step + self.spec.lag < last:
                self._sample(version=step)
            if step % config.eval.every_steps == 0 or step == last:
                self._report = self._judge(step)
            yield batch

    def judge_what_is_left(self) -> None:
        """Judge the last weights of a training that broke off; the verdict before stands where even that fails."""
        if self._curve[-1].step < self._taken:
            with contextlib.suppress(FtbError):  # the trial's error is already known, and this is only its consequence
                self._report = self._judge(self._taken)

    def result(self, *, seconds: float, error: str | None) -> TrialResult:
        report, task = self._report, get_task(self.spec.task)
        generator = np.random.default_rng(self.config.run.seed)
        own, ideal = [], []
        for prompt in task.prompts():
            correct = np.zeros(len(report.policy[prompt]), dtype=np.bool_)
            correct[[index for mode in task.modes(prompt) for index in mode]] = True
            own.append(count(report.policy[prompt], correct, generator))
            ideal.append(count(report.target[prompt], correct, generator))
        return TrialResult(
            spec=self.spec,
            curve=tuple(self._curve),
            modes_total=report.modes_total,
            target_reward=report.metrics["eval/target_reward"],
            coverage=float(np.mean([one.distinct for one in own])),
            coverage_target=float(np.mean([one.distinct for one in ideal])),
            pass_at_k={str(k): float(np.mean([pass_at_k(one.correct, k) for one in own])) for k in PASS_AT},
            seconds=seconds,
            error=error,
        )

    def _sample(self, *, version: int) -> None:
        """Append one step's batch from the present weights, which are those after step `version`."""
        sampling, size = self.config.sampling, self.config.learner.groups_per_step
        spec = SamplingSpec(
            group_size=sampling.group_size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            token_logprobs=self.config.objective.kind in TOKEN_LEVEL,
        )
        numbers = range(self._sampled, self._sampled + size)
        self._sampled += size
        requests = [GroupRequest(group_id=f"g{number:09d}", prompt=self._prompts[number], sampling=spec) for number in numbers]
        groups = self._sampler.sample(requests, version=version)
        self._queue.append(tuple(ScoredGroup(group=group, rewards=tuple(self.rewards.score(reward_call(group)))) for group in groups))

    def _judge(self, step: int) -> EvalReport:
        try:
            report = self._evaluator.report(step, self.config.objective.beta)
        except ValueError as error:  # log-probs that are not those of a distribution
            raise FtbError(f"step {step}: the policy can't be judged: {error}") from None
        self._curve.append(
            CurvePoint(
                step=step,
                completions=step * self.config.learner.groups_per_step * self.config.sampling.group_size,
                exact_tv=report.metrics["eval/exact_tv"],
                exact_jsd=report.metrics["eval/exact_js"] / 4,
                reward=report.metrics["eval/reward"],
                modes_found=report.modes_found,
            )
        )
        return report


@contextlib.contextmanager
def users_code(request: StepRequest) -> Iterator[None]:
    """What a step with the user's own divergence raises, and the project didn't raise on purpose, is that divergence's fault."""
    try:
        yield
    except FtbError:
        raise
    except Exception as error:  # the user's code may raise anything
        path = request.objective.custom
        if path is None:
            raise
        message = f"{path} failed in step {request.step}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise InvalidConfig([ConfigError("objective.custom", message)]) from None

"""A status document and the latest metrics row as Prometheus text."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from ftb_llm.api.models import State

__all__ = ["CONTENT_TYPE", "render"]

# metric name -> (where it stands in the status document, help)
GAUGES: dict[str, tuple[str, str]] = {
    "step": ("step", "Optimizer steps finished."),
    "max_steps": ("max_steps", "Optimizer steps after which the run ends."),
    "policy_version": ("policy_version", "Newest published adapter; 0 is the base model."),
    "config_version": ("config_version", "Newest config version."),
    "buffer_groups": ("buffer.groups", "Groups waiting in the queue."),
    "buffer_capacity_groups": ("buffer.capacity", "Groups the queue can hold."),
    "leased_groups": ("accounting.leased", "Groups the learner is working on."),
    "staleness_mean_steps": ("staleness.mean", "Mean age of the groups of the last step, in steps."),
    "staleness_max_steps": ("staleness.max", "Largest age of the groups of the last step, in steps."),
    "staleness_min_steps": ("staleness.min", "Smallest age of the groups of the last step, in steps."),
    "staleness_limit_steps": ("staleness.limit", "Age above which groups are dropped; absent when there is no limit."),
    "generate_tokens_per_second": ("throughput.generate_tokens_per_second", "Tokens sampled per second, all generators together."),
    "learn_tokens_per_second": ("throughput.learn_tokens_per_second", "Completion tokens trained on per second."),
    "steps_per_second": ("throughput.steps_per_second", "Optimizer steps per second."),
    "objective_beta": ("objective.beta", "Temperature of the target."),
}
ACTOR_GAUGES: dict[str, tuple[str, str]] = {
    "actor_version": ("version", "Policy version the generator samples from."),
    "actor_push_pause_ms": ("push_pause_ms", "Pause of the generator's engine at its last push, in milliseconds."),
    "actor_groups_in_flight": ("groups_in_flight", "Groups the generator is working on."),
    "actor_tokens_per_second": ("tokens_per_second", "Tokens sampled per second by the generator."),
}
COUNTED_STATES = ("generated", "trained", "dropped_stale", "rejected")  # the other two, buffered and leased, also fall
# exported by the status document already, under the name it has there
IN_STATUS = ("off_policy/staleness_", "perf/generate_tokens_per_second", "perf/learn_tokens_per_second")


def render(status: Mapping[str, Any], row: Mapping[str, Any]) -> bytes:
    """`status` as of `GET /v1/status`, `row` the newest value of every metric; values that are None are left out."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot([*_run(status), *_actors(status["actors"]), *_groups(status["accounting"]), *_row(row)]))
    return generate_latest(registry)


class _Snapshot(Collector):
    """Metrics that were computed beforehand."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return [metric for metric in self._metrics if metric.samples]


def _run(status: Mapping[str, Any]) -> Iterator[Metric]:
    info = GaugeMetricFamily("ftb_llm_info", "Name of the run and the divergence in force; always 1.", labels=["run", "divergence"])
    info.add_metric([status["run"], status["objective"]["divergence"]], 1)
    yield info
    state = GaugeMetricFamily("ftb_llm_state", "1 for the state the run is in, 0 for the others.", labels=["state"])
    for name in get_args(State):
        state.add_metric([name], float(name == status["state"]))
    yield state
    for name, (path, meaning) in GAUGES.items():
        value: Any = status
        for part in path.split("."):
            value = value[part]
        yield GaugeMetricFamily(f"ftb_llm_{name}", meaning, value=_number(value))


def _actors(actors: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    for name, (key, meaning) in ACTOR_GAUGES.items():
        metric = GaugeMetricFamily(f"ftb_llm_{name}", meaning, labels=["actor"])
        for actor in actors:
            if actor[key] is not None:
                metric.add_metric([actor["name"]], actor[key])
        yield metric


def _groups(accounting: Mapping[str, Any]) -> Iterator[Metric]:
    total = CounterMetricFamily("ftb_llm_groups", "Groups that have ever reached this state.", labels=["state"])
    for state in COUNTED_STATES:
        total.add_metric([state], accounting[state])
    yield total
    lost = CounterMetricFamily("ftb_llm_groups_lost", "Groups dropped or rejected, by reason.", labels=["reason"])
    for reason, count in accounting["reasons"].items():
        lost.add_metric([reason], count)
    yield lost


def _row(row: Mapping[str, Any]) -> Iterator[Metric]:
    """Each slash-named metric under its own name; the divergences as two metrics with labels."""
    divergence = GaugeMetricFamily("ftb_llm_divergence", "What the latest step that has it says of each divergence.", labels=["name", "quantity"])
    cosine = GaugeMetricFamily("ftb_llm_divergence_cosine", "Cosine of the weights that two divergences give to the latest step.", labels=["a", "b"])
    for name, value in row.items():
        number = _number(value)
        if "/" not in name or number is None or name.startswith(IN_STATUS):
            continue
        if name.startswith("divergence/cosine/"):
            cosine.add_metric(name.removeprefix("divergence/cosine/").split(":"), number)
        elif name.startswith("divergence/"):
            _, quantity, member = name.split("/")
            divergence.add_metric([member, quantity], number)
        else:
            yield GaugeMetricFamily(f"ftb_llm_{re.sub('[^a-z0-9]+', '_', name.lower())}", f"{name} of the latest step that has it.", value=number)
    yield divergence
    yield cosine


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None

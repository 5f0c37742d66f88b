from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest

from ftb_llm.config import Config, build_config
from ftb_llm.config.resolve import resolve_learning_rate, resolve_objective


def config(decay: str = "cosine", warmup: int = 4, max_steps: int = 12, **objective: Any) -> Config:
    learner = {"learning_rate": 0.1, "warmup_steps": warmup, "decay": decay}
    return build_config({"run": {"max_steps": max_steps}, "learner": learner, "objective": objective})


def rates(of: Config) -> list[float]:
    return [resolve_learning_rate(of, step) for step in range(1, of.run.max_steps + 1)]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_to_the_peak(decay: str) -> None:
    assert rates(config(decay))[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_decays() -> None:
    assert rates(config("constant"))[5:] == [0.1] * 7
    assert rates(config("linear"))[5:] == pytest.approx([0.1 * (1 - k / 8) for k in range(1, 8)])
    cosine = rates(config("cosine"))
    assert cosine[8] == pytest.approx(0.05)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert cosine[-1] > 0


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(config(warmup=0))[0] == 0.1


def test_a_warm_up_longer_than_the_run() -> None:
    assert rates(config(warmup=100, max_steps=3)) == pytest.approx([0.1 * k / 101 for k in (1, 2, 3)])


def test_a_run_shortened_under_way_has_nothing_left() -> None:
    assert resolve_learning_rate(config("linear", max_steps=12), 20) == 0


def test_objective() -> None:
    settings = {"beta": 0.25, "tempered": True, "log_z": "learned", "log_z_rate": 0.5, "clip_range": 0.1, "truncated": "mask"}
    spec = resolve_objective(config(divergence={"name": "alpha", "alpha": 0.5}, **settings).objective, 7)
    assert asdict(spec) == {"kind": "ftb", "divergence": "alpha", "alpha": 0.5, "width": None, "custom": None} | settings


def test_the_import_path_goes_with_the_custom_member_only() -> None:
    divergence = {"name": "js", "schedule": [{"step": 5, "name": "custom"}, {"step": 6, "name": "tv", "width": 0.5}]}
    objective = config(divergence=divergence, custom="my.members:one").objective
    found = [resolve_objective(objective, step) for step in (4, 5, 6)]
    assert [(spec.divergence, spec.custom, spec.width) for spec in found] == [("js", None, None), ("custom", "my.members:one", None), ("tv", None, 0.5)]


def alphas(divergence: dict[str, Any], steps: Iterable[int], since: int = 1) -> list[float | None]:
    objective = config(divergence=divergence).objective
    return [resolve_objective(objective, step, since).alpha for step in steps]


def test_a_ramp_goes_from_its_first_step_to_its_end_and_stays() -> None:
    ramp = {"name": "alpha", "alpha": {"from": 0.5, "to": 1.5, "over": 4}}
    assert alphas(ramp, range(1, 8)) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.5, 1.5]
    assert alphas(ramp, range(150, 156), since=150) == [0.5, 0.75, 1.0, 1.25, 1.5, 1.5]


def test_a_ramp_may_fall_and_may_be_one_step_long() -> None:
    assert alphas({"name": "alpha", "alpha": {"from": 2, "to": -2, "over": 2}}, (1, 2, 3, 4)) == [2.0, 0.0, -2.0, -2.0]
    assert alphas({"name": "alpha", "alpha": {"from": 0.3, "to": 0.7, "over": 1}}, (1, 2, 3)) == [0.3, 0.7, 0.7]


def test_the_end_of_a_ramp_is_exact() -> None:
    assert alphas({"name": "alpha", "alpha": {"from": 0.1, "to": 0.7, "over": 3}}, (4,)) == [0.7]


def test_a_scheduled_ramp_begins_at_its_own_step_whenever_the_first_member_came() -> None:
    ramp = {"name": "alpha", "alpha": {"from": 0, "to": 1, "over": 4}}
    schedule = [ramp | {"step": 10}, {"step": 13, "name": "js"}, {"step": 20, "name": "alpha", "alpha": 0.5}]
    assert alphas({"schedule": schedule}, (9, 10, 11, 12, 13, 20, 99), since=7) == [None, 0.0, 0.25, 0.5, None, 0.5, 0.5]
    objective = config(divergence={"schedule": schedule}).objective
    assert [resolve_objective(objective, step).divergence for step in (9, 10, 12, 13, 19, 20, 99)] == [
        "reverse_kl",
        "alpha",
        "alpha",
        "js",
        "js",
        "alpha",
        "alpha",
    ]

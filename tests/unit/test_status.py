from ftb_llm.status import below, by_member


def test_a_members_numbers_stand_together_and_cosines_stay_out() -> None:
    row = {
        "step": 3,
        "divergence/estimate/js": 0.5,
        "divergence/ess/js": 12.0,
        "divergence/estimate/tv": 0.25,
        "divergence/cosine/tv:js": 0.9,
        "time/divergence_seconds": 0.001,
    }
    assert by_member(row) == {"js": {"estimate": 0.5, "ess": 12.0}, "tv": {"estimate": 0.25}}
    assert by_member({}) == {}


def test_metrics_of_one_concern() -> None:
    assert below({"step": 3, "reward/mean": 0.5, "reward_other": 1.0}, "reward/") == {"mean": 0.5}

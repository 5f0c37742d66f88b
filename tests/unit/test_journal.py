import sqlite3

import pytest

from ftb_llm.config import Config, build_config
from ftb_llm.config.ledger import ConfigVersion, PastVersions
from ftb_llm.journal import Journal
from ftb_llm.types import GroupState
from tests.fakes import make_group, make_scored


def test_groups_survive_reopening_with_their_payload(tmp_path):
    journal = Journal(tmp_path / "run.db")
    for number in range(3):
        journal.add(make_scored(number, version=number))
    journal.move(["g000000001"], GroupState.LEASED)
    journal.move(["g000000002"], GroupState.TRAINED, step=7)
    journal.add_rejected(make_group("g000000003"), "timeout")
    journal.close()

    reopened = Journal(tmp_path / "run.db")
    assert reopened.alive() == [make_scored(0, version=0), make_scored(1, version=1)]
    accounts = reopened.accounting().as_dict()
    assert accounts == {"generated": 4, "buffered": 2, "leased": 0, "trained": 1, "dropped_stale": 0, "rejected": 1, "reasons": {"timeout": 1}}
    assert sorted(reopened.group_ids()) == [f"g{number:09d}" for number in range(4)]


def test_a_finished_group_gives_up_its_payload_and_keeps_its_facts(tmp_path):
    journal = Journal(tmp_path / "run.db")
    journal.add(make_scored(0, version=3))
    journal.move(["g000000000"], GroupState.TRAINED, step=9)
    journal.close()
    row = sqlite3.connect(tmp_path / "run.db").execute("SELECT state, payload, trained_step, min_version, reward_mean FROM groups").fetchone()
    assert row == ("trained", None, 9, 3, 0.5)


def test_a_move_is_all_or_nothing(tmp_path):
    journal = Journal(tmp_path / "run.db")
    journal.add(make_scored(0))
    with pytest.raises(sqlite3.Error):
        journal.move(["g000000000", object()], GroupState.TRAINED)  # type: ignore[list-item]
    assert journal.accounting().groups[GroupState.BUFFERED] == 1


def test_the_same_group_can_not_enter_twice(tmp_path):
    journal = Journal(tmp_path / "run.db")
    journal.add(make_scored(0))
    with pytest.raises(sqlite3.IntegrityError):
        journal.add(make_scored(0))


def test_config_versions_come_back_as_they_were(tmp_path):
    journal = Journal(tmp_path / "run.db")
    first = ConfigVersion(version=1, config=Config(), effective_step=1, source="start", time=1.5)
    changed = build_config({"objective": {"beta": 0.25}})
    second = ConfigVersion(version=2, config=changed, effective_step=8, source="rest", changed={"objective.beta": (0.5, 0.25)}, time=2.5)
    journal.add_config(first)
    journal.add_config(second)
    assert journal.past_configs() == PastVersions(changes=[first.change, second.change], config=changed)


def test_a_run_without_versions_has_no_past(tmp_path):
    assert Journal(tmp_path / "run.db").past_configs() is None

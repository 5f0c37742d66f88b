"""The commands that talk to a run, against the real control plane."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.cli.main import main
from ftb_llm.cli.service import after_contact_was_lost
from ftb_llm.config.ledger import ConfigLedger, ConfigVersion
from ftb_llm.errors import ApiUnreachable, WrongState
from tests.service.conftest import FakeRun


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FTB_LLM_URL", "FTB_LLM_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_status(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url]) == 0
    shown = capsys.readouterr().out
    assert "step         11/50\n" in shown
    assert "generator-1  out, no version, 0 groups in flight, 0 tok/s\n" in shown


def test_status_as_json_from_the_url_in_the_environment(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_URL", url)
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 11


def test_the_token_comes_from_the_environment(
    servers: dict[str, Any], run: FakeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = servers["guarded"][1]
    assert main(["status", "--url", guarded]) == 1
    assert capsys.readouterr().err.startswith("ftb-llm: error: ")
    monkeypatch.setenv("FTB_LLM_TOKEN", "s3cret")
    assert main(["status", "--url", guarded]) == 0


def test_set_changes_live_settings_together(url: str, run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "objective.divergence.name=alpha", "objective.divergence.alpha=0.5", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "config version 2, from step 12"
    assert sorted(lines[1:]) == ["  objective.divergence.alpha: None -> 0.5", "  objective.divergence.name: reverse_kl -> alpha"]
    assert run.ledger.current.config.objective.divergence.alpha == 0.5


def test_set_takes_a_ramp_in_one_word(url: str, run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "objective.divergence={name: alpha, alpha: {from: 0.75, to: 1.2, over: 300}}", "--url", url]) == 0
    assert capsys.readouterr().out.startswith("config version 2, from step 12\n")
    assert run.ledger.current.config.objective.divergence.text == "alpha 0.75 to 1.2 over 300 steps"
    assert main(["set", "objective.divergence.alpha.to=1.5", "--url", url]) == 0
    assert run.ledger.current.config.objective.divergence.text == "alpha 0.75 to 1.5 over 300 steps"
    assert main(["set", "objective.divergence.name=hellinger", "--url", url]) == 0
    assert run.ledger.current.config.objective.divergence.text == "hellinger"


def test_set_as_json(url: str, run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "objective.beta=0.25", "--json", "--url", url]) == 0
    assert json.loads(capsys.readouterr().out)["effective_step"] == 12


def test_set_to_the_present_value(url: str, run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "objective.beta=0.5", "--url", url]) == 0
    assert "nothing changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [("objective.beta=-1", "objective.beta"), ("objective.bta=1", "did you mean objective.beta?"), ("sampling.group_size=8", "sampling.group_size")],
)
def test_set_refuses_in_one_line(url: str, run: FakeRun, word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", word, "--url", url]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ftb-llm: error: ")
    assert message in line
    assert run.ledger.current.version == 1


def test_set_on_a_run_that_is_ending_is_a_failure_not_a_mistake(url: str, run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(version: ConfigVersion) -> None:
        raise WrongState("the run is stopping; no step will follow")

    run.ledger = ConfigLedger(run.ledger.current.config, next_step=lambda: 12, on_change=refuse)
    assert main(["set", "objective.beta=0.25", "--url", url]) == 1
    assert capsys.readouterr().err == "ftb-llm: error: the run is stopping; no step will follow\n"


def test_stop_and_checkpoint(url: str, run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "--url", url]) == 0
    assert main(["stop", "--json", "--url", url]) == 0
    assert [command for command, _ in run.commands] == ["checkpoint", "stop"]
    assert capsys.readouterr().out.startswith("a checkpoint will be written")
    assert main(["stop", "--url", url]) == 1
    assert capsys.readouterr().err == "ftb-llm: error: the run is already stopping\n"


class AdvancingRun(FakeRun):
    """Moves on by a step each time it is looked at, and ends at step 14."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end

    def status(self) -> dict[str, Any]:
        self.step += 1
        self.state = self.end if self.step == 14 else "training"
        return super().status()


@pytest.mark.parametrize(("end", "code"), [("finished", 0), ("stopped", 0), ("failed", 1)])
def test_watch_follows_the_run_to_its_end(servers: dict[str, Any], url: str, end: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    servers["free"][0].state.run = AdvancingRun(end)
    assert main(["watch", "--interval", "0.01", "--url", url]) == code
    lines = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in lines] == ["step 12/50", "step 13/50", "step 14/50"]
    assert lines[-1][1] == end


def test_watch_as_json(servers: dict[str, Any], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    servers["free"][0].state.run = AdvancingRun("finished")
    assert main(["watch", "--json", "--interval", "0.01", "--url", url]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [12, 13, 14]


def test_a_run_that_ended_between_two_looks_is_read_from_its_folder(tmp_path: Path) -> None:
    error = ApiUnreachable("nothing listens")
    for state, code in (("finished", 0), ("failed", 1)):
        (tmp_path / "summary.json").write_text(json.dumps({"state": state}))
        assert after_contact_was_lost({"run_dir": str(tmp_path)}, error) == code
    with pytest.raises(ApiUnreachable):
        after_contact_was_lost({"run_dir": str(tmp_path / "elsewhere")}, error)

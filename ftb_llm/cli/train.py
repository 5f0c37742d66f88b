"""`ftb-llm train`: start a run here, or submit it to the cluster that RAY_ADDRESS names."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ftb_llm.cli.command import Command, UsageError, find_run, inside_submitted_job, print_json, print_table
from ftb_llm.config.load import build_config, merge, merge_overrides, read_yaml
from ftb_llm.config.schema import Config
from ftb_llm.errors import ConfigError, InvalidConfig, SetupError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="FILE | KEY=VALUE", help="YAML files, merged left to right, and settings such as objective.beta=0.1")
    parser.add_argument("--resume", metavar="RUN", help="go on from the newest checkpoint of this run folder, with its config")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--json", action="store_true", help="print the summary (or the dry run's config) as JSON; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
    files, overrides = split_words(args.words)
    resume = find_run(args.resume) if args.resume else None
    config = resolve(files, overrides, resume)
    if args.dry_run:
        print_config(config, as_json=args.json)
        return 0
    if os.environ.get("RAY_ADDRESS") and not inside_submitted_job():
        if args.json:
            raise UsageError("--json does not go with RAY_ADDRESS: what is shown then is the log of the submitted job")
        from ftb_llm import cluster

        return cluster.submit(config, resume=resume)
    return train_here(config, resume, as_json=args.json)


def train_here(config: Config, resume: Path | None, *, as_json: bool) -> int:
    from ftb_llm.preflight import check_first

    check_first(config, resume=resume)
    from ftb_llm import launch
    from ftb_llm.progress import make_progress

    stream = sys.stderr if as_json else sys.stdout
    with make_progress(config.logging.progress, config.run.max_steps, stream, every_steps=config.logging.every_steps) as progress:
        code = launch.train(config, resume=resume, progress=progress)
    if run_dir := progress.status.get("run_dir"):
        print_outcome(Path(run_dir), as_json=as_json)
    return code


def print_outcome(run_dir: Path, *, as_json: bool) -> None:
    """Where the run lies, and its summary."""
    summary = read_summary(run_dir)
    if as_json:
        print_json(summary)
        return
    from ftb_llm.report import summary_rows

    print(f"\nrun     {run_dir}")
    if (run_dir / "report.html").is_file():
        print(f"report  {run_dir / 'report.html'}")
    if rows := summary_rows(summary):
        print()
        print_table(rows)


def read_summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Words with `=` are settings, the others are files."""
    words = list(words)
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def resolve(files: Sequence[str | Path], overrides: Sequence[str], resume: Path | None) -> Config:
    """The whole config, checked. A resumed run starts from its own config; files and settings are laid over it."""
    tree = read_run_config(resume) if resume else {}
    for file in files:
        tree = merge(tree, read_yaml(file))
    return build_config(merge_overrides(tree, overrides))


def read_run_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SetupError(f"--resume: {run_dir} is not a run folder; it has no config.json") from None
    except ValueError as error:
        raise InvalidConfig([ConfigError("", f"{path} is not JSON: {error}")]) from None


def print_config(config: Config, *, as_json: bool) -> None:
    tree = config.model_dump(mode="json")
    if as_json:
        print_json(tree)
    else:
        print(yaml.safe_dump(tree, sort_keys=False), end="")


COMMANDS = (
    Command(
        name="train",
        help="train, here or on the cluster that RAY_ADDRESS names",
        description="Train. Files are merged left to right over the defaults, then KEY=VALUE settings. With RAY_ADDRESS set, the run is submitted "
        "to that cluster as a job, its log is followed, and its exit code is returned.",
        configure=configure,
        run=run,
    ),
)

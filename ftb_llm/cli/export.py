"""`ftb-llm export`: what a run has learned as a folder of its own, an adapter or a whole model."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from ftb_llm.cli.command import Command, add_json, find_run, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, or its name under runs/")
    parser.add_argument("--version", type=_version, metavar="N", help="the adapter after step N (default: the newest)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder (default: RUN/export/v00000N, with -merged after it for --merged)")
    parser.add_argument("--merged", action="store_true", help="write the whole model with the adapter merged into it, which transformers and vLLM load alone")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ftb_llm.export import export_adapter
    from ftb_llm.progress import PlainProgress

    folder = find_run(args.run)
    if args.merged:
        from ftb_llm import launch

        exported = launch.export_whole(folder, args.version, args.out, progress=PlainProgress(sys.stderr, every_steps=1))
    else:
        exported = export_adapter(folder, args.version, args.out)
    if args.json:
        print_json(asdict(exported) | {"path": str(exported.path)})
    else:
        print(exported.path)
    return 0


def _version(word: str) -> int:
    """`12`, or the name of its folder, `v000012`."""
    digits = word.removeprefix("v")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{word} is wrong: it should be a step such as 12 or v000012")
    return int(digits)


COMMANDS = (
    Command(
        name="export",
        help="write a run's adapter, or the whole model with it merged, into a folder",
        description="Write the newest adapter of a run into a folder of its own, or merged into its base as a whole model in Hugging Face format.",
        configure=configure,
        run=run,
    ),
)

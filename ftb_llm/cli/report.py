"""`ftb-llm report`: rebuild a run's page from its folder."""

import argparse

from ftb_llm.cli.command import Command, add_json, find_run, print_json
from ftb_llm.errors import SetupError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, or its name under runs/")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ftb_llm.report import write_report

    folder = find_run(args.run)
    if not (folder / "config.json").is_file():
        raise SetupError(f"{folder} is not a run folder; it has no config.json")
    page = write_report(folder)
    if args.json:
        print_json({"report": str(page)})
    else:
        print(page)
    return 0


COMMANDS = (
    Command(
        name="report",
        help="rebuild report.html of a run",
        description="Rebuild report.html from the files of a run, live or finished.",
        configure=configure,
        run=run,
    ),
)

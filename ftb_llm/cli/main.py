"""`ftb-llm`: finds the command, runs it, and turns what it raises into one clear line and an exit code.

0 success    1 failed    2 bad usage, config or setup    130 Ctrl-C
"""

import difflib
import os
import sys
from collections.abc import Sequence

from ftb_llm import __version__
from ftb_llm.cli import bench, doctor, export, report, service, train
from ftb_llm.cli.command import Command, Parser, UsageError, print_error
from ftb_llm.errors import ConfigError, FixedSetting, FtbError, InvalidConfig, SetupError

MODULES = (train, service, report, export, bench, doctor)
COMMANDS: dict[str, Command] = {command.name: command for module in MODULES for command in module.COMMANDS}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
USERS_MISTAKES = (UsageError, ConfigError, InvalidConfig, FixedSetting, SetupError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(words)
        sys.stdout.flush()  # here, so that a reader who has gone is noticed below and not by the interpreter's farewell
        return code
    except InvalidConfig as error:
        for problem in error.problems:
            print_error(str(problem))
        return 2
    except FtbError as error:
        print_error(str(error))
        return 2 if isinstance(error, USERS_MISTAKES) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `ftb-llm status | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"ftb-llm {__version__}")
        return 0
    if words[0] in GROUPS and (not words[1:] or words[1] in ("-h", "--help")):
        print(group_overview(words[0]))
        return 0 if words[1:] else 2
    count = 2 if " ".join(words[:2]) in COMMANDS else 1  # words in the command's name
    name, rest = " ".join(words[:count]), words[count:]
    if name not in COMMANDS:
        raise unknown(name)
    parser = Parser(COMMANDS[name])
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return 0
    return COMMANDS[name].run(parser.parse_intermixed_args(rest))


def unknown(name: str) -> UsageError:
    if name in GROUPS:
        return UsageError(f"{name} is the first word of {', '.join(command.name for command in in_group(name))}; see ftb-llm {name} --help")
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return UsageError(f"no command {name!r}{f'; did you mean {near[0]}?' if near else ''}; see ftb-llm --help")


def in_group(group: str) -> list[Command]:
    return [command for command in COMMANDS.values() if command.name.startswith(f"{group} ")]


def listing(commands: Sequence[Command]) -> list[str]:
    width = max(len(command.name) for command in commands)
    return [f"  {command.name.ljust(width)}  {command.help}" for command in commands]


def group_overview(group: str) -> str:
    """The commands that begin with this word."""
    head = [f"usage: ftb-llm {group} COMMAND [ARGUMENTS]", "", "commands:"]
    return "\n".join([*head, *listing(in_group(group)), "", f"ftb-llm {group} COMMAND --help says more."])


def overview() -> str:
    return "\n".join(
        [
            "usage: ftb-llm COMMAND [ARGUMENTS]",
            "",
            "Asynchronous fine-tuning of language models with f-Trajectory Balance.",
            "",
            "commands:",
            *listing(list(COMMANDS.values())),
            "",
            "ftb-llm COMMAND --help says more. Exit codes: 0 success, 1 failure, 2 bad usage, config or setup, 130 Ctrl-C.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

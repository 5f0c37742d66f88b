"""`ftb-llm`: finds the command, runs it, and turns what it raises into one clear line and an exit code.

0 success    1 failed    2 bad usage, config or setup    130 Ctrl-C
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from ftb_llm import __version__
from ftb_llm.cli.command import Command, Parser, UsageError, print_error
from ftb_llm.cli.table import COMMANDS, GROUPS, Entry
from ftb_llm.errors import ConfigError, FixedSetting, FtbError, InvalidConfig, SetupError

USERS_MISTAKES = (UsageError, ConfigError, InvalidConfig, FixedSetting, SetupError)
HELP = ("-h", "--help", "help")
VERSION = ("-v", "-V", "--version", "version")


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
    except Exception as error:
        from ftb_llm.cli.trouble import file_trouble

        if (line := file_trouble(error)) is None:
            raise
        print_error(line)
        return 1


def dispatch(words: list[str]) -> int:
    if not words or words[0] in HELP:
        return show_help(words)
    if words[0] in VERSION:
        print(f"ftb-llm {__version__}")
        return 0
    if words[0] in GROUPS and (not words[1:] or words[1] in HELP):
        print(group_overview(words[0]))
        return 0 if words[1:] else 2
    count = 2 if " ".join(words[:2]) in COMMANDS else 1  # words in the command's name
    name, rest = " ".join(words[:count]), words[count:]
    if name not in COMMANDS:
        raise unknown(words)
    command = load(name)
    parser = Parser(command)
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        return 0
    return command.run(parser.parse_intermixed_args(rest))


def show_help(words: list[str]) -> int:
    """`ftb-llm help train` is `ftb-llm train --help`."""
    if words[1:] and words[0] == "help":
        return dispatch([*words[1:], "--help"])
    print(overview())
    return 0 if words else 2


def load(name: str) -> Command:
    """The command from its module, which is imported now and not before."""
    commands: Sequence[Command] = importlib.import_module(COMMANDS[name].module).COMMANDS
    return next(command for command in commands if command.name == name)


def unknown(words: Sequence[str]) -> UsageError:
    import difflib

    group = words[0] if words[0] in GROUPS else ""
    if group and words[1].startswith("-"):
        return UsageError(f"{group} is the first word of {', '.join(in_group(group))}; see ftb-llm {group} --help")
    head = f"{group} " if group else ""
    word = words[1] if group else words[0]
    near = difflib.get_close_matches(word, [name.removeprefix(head) for name in (in_group(group) if group else COMMANDS)], n=1)
    guess = f"; did you mean {head}{near[0]}?" if near else ""
    return UsageError(f"no command '{head}{word}'{guess}; see ftb-llm {head}--help")


def in_group(group: str) -> dict[str, Entry]:
    return {name: entry for name, entry in COMMANDS.items() if name.startswith(f"{group} ")}


def listing(commands: Mapping[str, Entry]) -> list[str]:
    width = max(len(name) for name in commands)
    return [f"  {name.ljust(width)}  {entry.help}" for name, entry in commands.items()]


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
            *listing(COMMANDS),
            "",
            "ftb-llm COMMAND --help says more. Exit codes: 0 success, 1 failure, 2 bad usage, config or setup, 130 Ctrl-C.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

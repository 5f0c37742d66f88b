"""Every command's name, one line about it, and the module that has it, so that finding a command imports no other.

The modules' own `COMMANDS` say the rest; a test holds the two together.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a command is found, and what the overview says of it."""

    module: str
    help: str


COMMANDS: dict[str, Entry] = {
    "train": Entry(module="ftb_llm.cli.train", help="train, here or on the cluster that RAY_ADDRESS names"),
    "status": Entry(module="ftb_llm.cli.service", help="show the live run"),
    "watch": Entry(module="ftb_llm.cli.service", help="follow the live run until it ends or Ctrl-C"),
    "set": Entry(module="ftb_llm.cli.service", help="change live settings of the run at its next step boundary"),
    "stop": Entry(module="ftb_llm.cli.service", help="end the run cleanly, with a checkpoint"),
    "checkpoint": Entry(module="ftb_llm.cli.service", help="write a checkpoint now"),
    "report": Entry(module="ftb_llm.cli.report", help="rebuild report.html of a run"),
    "export": Entry(module="ftb_llm.cli.export", help="write a run's adapter, or the whole model with it merged, into a folder"),
    "bench staleness": Entry(module="ftb_llm.cli.bench", help="train on samples that are 0 to 256 steps old, with every objective"),
    "bench divergences": Entry(module="ftb_llm.cli.bench", help="how each divergence learns, on-policy and off-policy"),
    "bench losses": Entry(module="ftb_llm.cli.bench", help="milliseconds of log Z and weights per divergence"),
    "bench quickstart": Entry(module="ftb_llm.cli.bench", help="the quickstart once per divergence"),
    "bench learner": Entry(module="ftb_llm.cli.bench", help="the learner's step beside a loop with full logits and beside TRL"),
    "bench ranks": Entry(module="ftb_llm.cli.bench", help="what several learner ranks tell each other, as a share of the step"),
    "bench gpu": Entry(module="ftb_llm.cli.bench", help="the learner's step and its kernels on a CUDA device"),
    "bench siege": Entry(module="ftb_llm.cli.bench", help="a live run under attack over HTTP: its memory, its step rate, an honest client"),
    "bench families": Entry(module="ftb_llm.cli.bench", help="which model families are scored right, refused, or wrongly"),
    "doctor": Entry(module="ftb_llm.cli.doctor", help="check this machine: python, cores, memory, pinned packages, port, cache folder, Ray's token"),
}
GROUPS = frozenset(name.split()[0] for name in COMMANDS if " " in name)

"""`ftb-llm bench ...`: measure staleness, divergences, the cost of the losses, the quickstart, the learner's step, and a run under attack."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftb_llm.bench.attacks import ATTACKS
from ftb_llm.bench.spec import BASELINES, MEMBERS, SET_IN_RUNS, SET_IN_TRIALS, TASK_SETTINGS, check_words
from ftb_llm.bench.step_cases import CASES, COMPILED, CONTENDERS, RANK_CASES, SIZES
from ftb_llm.cli.command import Command, UsageError, add_json, print_json, print_table

if TYPE_CHECKING:
    from ftb_llm.bench.tables import Table

OBJECTIVES_HELP = "such as hellinger, alpha:0.75, tv:0.1, grpo, importance:forward_kl, hellinger+tempered, reverse_kl+learned"


def configure_staleness(parser: argparse.ArgumentParser) -> None:
    _add_trials(parser, objectives=(*MEMBERS, *BASELINES), lags="0,1,4,16,50,256", out="bench/staleness")


def configure_divergences(parser: argparse.ArgumentParser) -> None:
    _add_trials(parser, objectives=MEMBERS, lags="0,50", out="bench/divergences")


def _add_trials(parser: argparse.ArgumentParser, *, objectives: Sequence[str], lags: str, out: str) -> None:
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of every trial, such as learner.learning_rate=0.001")
    parser.add_argument("--tasks", type=_names, default=list(TASK_SETTINGS), metavar="LIST", help=f"default: {','.join(TASK_SETTINGS)}")
    parser.add_argument("--lags", type=_numbers, default=_numbers(lags), metavar="LIST", help=f"ages of the samples, in steps (default: {lags})")
    parser.add_argument("--objectives", type=_names, default=list(objectives), metavar="LIST", help=f"{OBJECTIVES_HELP} (default: {','.join(objectives)})")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="LIST", help="default: 0,1,2")
    parser.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps per trial (default: 400 on hypergrid, 300 on sums)")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="trials side by side, each on one core (default: all cores)")
    _add_set(parser)
    _add_out(parser, out)
    add_json(parser)


def configure_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="FILE", help="default: configs/quickstart.yaml")
    parser.add_argument("--members", type=_names, default=list(MEMBERS), metavar="LIST", help=f"{OBJECTIVES_HELP} (default: {','.join(MEMBERS)})")
    _add_set(parser)
    _add_out(parser, "bench/quickstart")
    add_json(parser)


def configure_learner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=_names, default=list(SIZES), metavar="LIST", help=f"default: {','.join(SIZES)}")
    parser.add_argument("--steps", type=_positive, default=4, metavar="N", help="timed steps of each contender, in two turns (default: 4)")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out, which otherwise gets an environment of its own in the cache folder")
    parser.add_argument("--compiled", action="store_true", help="measure ours with learner.compile as well")
    parser.add_argument("--out", type=Path, default=Path("bench/learner"), metavar="DIR", help="folder of the results (bench/learner)")
    add_json(parser)


def configure_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 4], metavar="LIST", help="how many ranks; 1 is measured in any case (default: 1,2,4)")
    parser.add_argument("--steps", type=_positive, default=3, metavar="N", help="timed steps, after one that warms up (default: 3)")
    parser.add_argument("--size", default="small", metavar="SIZE", help=f"{', '.join(RANK_CASES)} (default: small)")
    parser.add_argument("--out", type=Path, default=Path("bench/ranks"), metavar="DIR", help="folder of the results (bench/ranks)")
    add_json(parser)


def configure_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_positive, default=5, metavar="N", help="timed steps (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("bench/gpu"), metavar="DIR", help="folder of the results (bench/gpu)")
    add_json(parser)


def configure_siege(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of both runs")
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="FILE", help="default: configs/quickstart.yaml")
    parser.add_argument("--attacks", type=_names, default=list(ATTACKS), metavar="LIST", help=f"default: {','.join(ATTACKS)}")
    parser.add_argument("--megabytes", type=_positive, default=200, metavar="N", help="of headers that an attacker tries to send (default: 200)")
    parser.add_argument("--out", type=Path, default=Path("bench/siege"), metavar="DIR", help="folder of the results (bench/siege)")
    add_json(parser)


def configure_families(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these families alone; rows of the table in docs/families.md")
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help="float32 (default) or bfloat16")
    parser.add_argument("--trial", action="store_true", help="time the learner's trial at load on a model of 135 M parameters instead")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/families.md has it")
    add_json(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    what = "a setting of one objective alone, such as tv:learner.learning_rate=0.001; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="NAME:KEY=VALUE", dest="own", help=what)


def _add_out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(default), metavar="DIR", help=f"folder of the results; what it has is not measured again ({default})")


def run_staleness(args: argparse.Namespace) -> int:
    from ftb_llm.bench.figures import staleness_picture
    from ftb_llm.bench.tables import staleness_tables

    rows = _measured(args)
    _publish(args, rows, staleness_tables(rows, args.objectives), staleness_picture(rows, args.objectives))
    return 0


def run_divergences(args: argparse.Namespace) -> int:
    from ftb_llm.bench.figures import divergences_picture
    from ftb_llm.bench.tables import divergences_tables

    rows = _measured(args)
    _publish(args, rows, divergences_tables(rows, args.objectives), divergences_picture(rows, args.objectives))
    return 0


def run_losses(args: argparse.Namespace) -> int:
    from ftb_llm.bench.losses import losses_table, measure_losses

    rows = measure_losses()
    if args.json:
        print_json(rows)
    else:
        _print_tables([losses_table(rows)])
    return 0


def run_quickstart(args: argparse.Namespace) -> int:
    from ftb_llm.bench.quickstart import plan, quickstart_table, run_jobs, train_in_a_process

    jobs = plan(args.config, args.members, _settings(args, args.members, SET_IN_RUNS), folder=args.out / "runs")
    rows = list(run_jobs(jobs, train=train_in_a_process, say=_say))
    _publish(args, rows, [quickstart_table(rows)], None)
    return 0


def run_learner(args: argparse.Namespace) -> int:
    from ftb_llm.bench.learner import built_model, caller, measure
    from ftb_llm.bench.step_report import learner_picture, learner_tables
    from ftb_llm.bench.trl import interpreter
    from ftb_llm.machine import core_count

    for size in args.sizes:
        if size not in SIZES:
            raise UsageError(f"argument --sizes: {size} is no size; the sizes are {', '.join(SIZES)}")
    cases = [case for case in CASES if case.size in args.sizes]
    trl = "left out with --no-trl" if args.no_trl else interpreter(_say)
    names = (*CONTENDERS, COMPILED) if args.compiled else CONTENDERS
    found = measure(cases, steps=args.steps, threads=core_count(), call=caller(trl), model=built_model, say=_say, names=names)
    _publish(args, found, learner_tables(found), learner_picture(found))
    return 0


def run_ranks(args: argparse.Namespace) -> int:
    from ftb_llm.bench.learner import built_model
    from ftb_llm.bench.ranks import measure, measure_in_a_process, ranks_tables

    if args.size not in RANK_CASES:
        raise UsageError(f"argument --size: {args.size} is no size; the sizes are {', '.join(RANK_CASES)}")
    case = RANK_CASES[args.size]
    for count in args.ranks:
        if not 1 <= count <= case.groups:
            raise UsageError(f"argument --ranks: {count} is wrong: a step has {case.groups} groups to share, so it should be 1 to {case.groups}")
    found = measure(case, counts=args.ranks, steps=args.steps, call=measure_in_a_process, model=built_model, say=_say)
    _publish(args, found, ranks_tables(found), None)
    return 0


def run_gpu(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("bench gpu needs a CUDA device, and torch finds none on this machine")
    from ftb_llm.bench.gpu import CASE, VOCABULARIES, gpu_tables, in_its_process, measure
    from ftb_llm.bench.learner import built_model
    from ftb_llm.machine import core_count

    found = measure(CASE, VOCABULARIES, steps=args.steps, threads=core_count(), model=built_model, call=in_its_process, say=_say)
    _publish(args, found, gpu_tables(found), None)
    return 0


def run_siege(args: argparse.Namespace) -> int:
    for attack in args.attacks:
        if attack not in ATTACKS:
            raise UsageError(f"argument --attacks: {attack} is no attack; the attacks are {', '.join(ATTACKS)}")
    from ftb_llm.bench.siege import measure, siege_tables
    from ftb_llm.config.load import build_config, merge, parse_override, read_yaml

    tree = read_yaml(args.config)
    for word in args.words:
        tree = merge(tree, parse_override(word))
    build_config(tree)  # what is wrong with it is said before anything starts
    found = measure([args.config, *args.words], attacks=args.attacks, megabytes=args.megabytes, say=_say)
    _publish(args, found, siege_tables(found), None)
    return 0


def run_families(args: argparse.Namespace) -> int:
    from ftb_llm.bench.families import DTYPES, FAMILIES, Verdict, documents, families_table, headline, measure, trial_told

    if args.dtype not in DTYPES:
        raise UsageError(f"argument --dtype: {args.dtype} is no dtype of this bench; it should be {' or '.join(DTYPES)}")
    known = {family.name: family for family in FAMILIES}
    if unknown := [name for name in args.only if name not in known]:
        raise UsageError(f"argument --only: {unknown[0]} is no family of this bench; docs/families.md lists them")
    from ftb_llm import launch

    if args.trial:
        seconds = launch.family_trial()
        print(json.dumps({"trial_seconds": seconds}) if args.json else trial_told(seconds))
        return 0
    rows = measure([known[name] for name in args.only] or FAMILIES, dtype=args.dtype, judge=launch.judge_family, say=_say)
    table = families_table(rows)
    if args.json:
        print_json(documents(rows))
    elif args.markdown:
        print(table.markdown())
    else:
        _print_tables([table])
    _say(headline(rows))
    return 1 if any(row.verdict in (Verdict.WRONG, Verdict.FAILED) for row in rows) else 0


def _measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of every trial that the words ask for."""
    from ftb_llm.bench.trials import grid, measure
    from ftb_llm.inputs import built
    from ftb_llm.machine import core_count
    from ftb_llm.progress import PlainProgress

    for task in args.tasks:
        if task not in TASK_SETTINGS:
            raise UsageError(f"argument --tasks: {task} is no task; the tasks are {', '.join(TASK_SETTINGS)}")
    if args.steps is not None:
        args.words = [*args.words, f"run.max_steps={args.steps}"]
    specs = grid(tasks=args.tasks, objectives=args.objectives, lags=args.lags, seeds=args.seeds, settings=_settings(args, args.objectives, SET_IN_TRIALS))
    from ftb_llm import launch
    from ftb_llm.custom import load_custom

    for spec in specs:
        if (path := spec.config().objective.custom) is not None:
            load_custom(path)  # what is wrong with it is said before any trial starts
    for task in args.tasks:
        built(task, PlainProgress(sys.stderr, every_steps=1))
    return measure(specs, folder=args.out, run=lambda some: launch.run_trials(some, jobs=args.jobs or core_count()), say=_say)


def _settings(args: argparse.Namespace, names: Sequence[str], set_by: Mapping[str, str]) -> Callable[[str], list[str]]:
    """The KEY=VALUE words of each objective: those for all, then its own."""
    own: dict[str, list[str]] = {name: [] for name in names}
    for text in args.own:
        head, equals, value = text.partition("=")
        name, colon, key = head.rpartition(":")
        if not equals or not colon or name not in own:
            raise UsageError(f"argument --set: {text} is wrong: it should be NAME:KEY=VALUE with a NAME among {', '.join(names)}")
        own[name].append(f"{key}={value}")
    check_words([*args.words, *(word for words in own.values() for word in words)], set_by)
    return lambda name: [*args.words, *own[name]]


def _publish(args: argparse.Namespace, rows: list[dict[str, Any]] | dict[str, Any], tables: "Sequence[Table]", picture: str | None) -> None:
    """Write rows.json, table.md and where there is one plot.svg, and print the rows or the tables."""
    from ftb_llm.bench.trials import writing
    from ftb_llm.run_dir import write_whole

    files = {"rows.json": json.dumps(rows, indent=1) + "\n", "table.md": "\n".join(table.markdown() for table in tables)}
    if picture is not None:
        files["plot.svg"] = picture
    with writing(args.out):
        for name, text in files.items():
            write_whole(args.out / name, text)
    if args.json:
        print_json(rows)
    else:
        _print_tables(tables)
    _say(f"written to {args.out}: {', '.join(files)}")


def _print_tables(tables: "Sequence[Table]") -> None:
    for table in tables:
        print(f"{table.title}\n")
        print_table(table.rows)
        print()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is wrong: it should be different names, separated by commas")
    return names


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is wrong: it should be different whole numbers from 0, separated by commas")
    return [int(part) for part in parts]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is wrong: it should be a whole number from 1")
    return int(text)


COMMANDS = (
    Command(
        name="bench staleness",
        help="train on samples that are 0 to 256 steps old, with every objective",
        description="Short trainings of the real learner, each on samples that are a fixed number of steps old, judged exactly. "
        "Prints final exact TV and coverage; writes rows.json, table.md and plot.svg. An interrupted bench goes on where it stopped.",
        configure=configure_staleness,
        run=run_staleness,
    ),
    Command(
        name="bench divergences",
        help="how each divergence learns, on-policy and off-policy",
        description="The same trainings as curves: exact TV, Jensen-Shannon divergence and modes found against the completions seen.",
        configure=configure_divergences,
        run=run_divergences,
    ),
    Command(
        name="bench losses",
        help="milliseconds of log Z and weights per divergence",
        description="Median milliseconds of log Z and weights for 4,096 groups of 16 completions on one core, and of all shadow divergences of one step.",
        configure=add_json,
        run=run_losses,
    ),
    Command(
        name="bench quickstart",
        help="the quickstart once per divergence",
        description="Runs ftb-llm train once per divergence, one after the other, and tells the final exact TV of each.",
        configure=configure_quickstart,
        run=run_quickstart,
    ),
    Command(
        name="bench learner",
        help="the learner's step beside a loop with full logits and beside TRL",
        description="Times whole optimizer steps on the same random models and samples, each contender in a process of its own, with its peak memory, "
        "and our step against the machine's matrix products. Writes rows.json, table.md and plot.svg.",
        configure=configure_learner,
        run=run_learner,
    ),
    Command(
        name="bench ranks",
        help="what several learner ranks tell each other, as a share of the step",
        description="Takes the same optimizer steps with one rank and with several on this machine, replicated and sharded, each rank a process of its own: "
        "seconds a step, shares of communication and of waiting, tokens per second, and how far the adapter is from one rank's. "
        "Writes rows.json and table.md.",
        configure=configure_ranks,
        run=run_ranks,
    ),
    Command(
        name="bench gpu",
        help="the learner's step and its kernels on a CUDA device",
        description="Times whole optimizer steps of a random model of 1.5 billion parameters in bfloat16 against the device's matrix products, "
        "with peak memory, and the head and the attention beside others. Needs a CUDA device. Writes rows.json and table.md.",
        configure=configure_gpu,
        run=run_gpu,
    ),
    Command(
        name="bench siege",
        help="a live run under attack over HTTP: its memory, its step rate, an honest client",
        description="Starts the quickstart twice, without a token and with one, and attacks its port from this machine: headers without end, "
        "idle connections, slow ones. Compares memory and step rate with the quiet stretches around each attack, and counts what failed for an "
        "honest client. Ends by itself within ten minutes. Writes rows.json and table.md.",
        configure=configure_siege,
        run=run_siege,
    ),
    Command(
        name="bench families",
        help="which model families are scored right, refused, or wrongly",
        description="Builds a tiny random model of each family and compares the learner's log-probs, reference, gradients and merged export with "
        "transformers and PEFT alone in float64. Exit code 1 if one is wrong or fails after the model check said ok.",
        configure=configure_families,
        run=run_families,
    ),
)

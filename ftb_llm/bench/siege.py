"""`ftb-llm bench siege`: a live run under attack from its own machine, without a token and with one.

    quiet | attack on the run | quiet | the same attack on a sink | quiet | the next attack ...

Each stretch's step rate is compared with the quiet ones right before and after it, in the same run, so that what else the machine
does falls out. The sink is a server in another process that only does what any bounded server must: what the attack on it costs the
run is what the attacker's own work takes from the machine's cores, and no fault of the run's server.
"""

import bisect
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ftb_llm.bench.attacks import MEGABYTE, Order, Outcome
from ftb_llm.bench.honest import Asked, HonestClient
from ftb_llm.bench.learner import machine_facts
from ftb_llm.bench.live_run import LiveRun, live_run
from ftb_llm.bench.tables import NONE, Table
from ftb_llm.errors import FtbError
from ftb_llm.machine import core_count

MEMORY_GOAL_MB, STEP_RATE_GOAL = 20.0, 0.95
QUIET_SECONDS = 6.0
ATTACK_SECONDS: Mapping[str, float] = {"headers": 9.0, "one-header": 9.0, "idle": 14.0, "slow": 14.0}  # deadlines are ten seconds
CONNECTIONS: Mapping[str, int] = {"headers": 1, "one-header": 1, "idle": 1100, "slow": 600}
OPEN_FILES = 1024  # what the run may hold open, an ordinary limit: fewer than the idle connections
MEMORY_LIMIT_MB = 2000.0  # an attack that makes the run grow by more is broken off, for the machine's sake
SAMPLE_SECONDS = 0.1
SLACK_SECONDS = 10.0  # for an attack to end by itself
TOKEN = "a-token-that-no-attacker-knows"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Some seconds of the run, from `begin` to `end` as time.time() has them."""

    begin: float
    end: float
    cpu_seconds: float  # of the process that serves HTTP

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Assault:
    """An attack on the run and the same on the sink, each between two quiet stretches."""

    attack: str
    before: Stretch
    on_run: Stretch
    between: Stretch
    on_sink: Stretch
    after: Stretch
    outcome: Outcome | None  # None where it was broken off
    cores_on_sink: float  # of attacker and sink together


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was recorded of one run under siege."""

    steps: Sequence[float]  # when each ended
    memory: Sequence[tuple[float, int]]  # when, and bytes
    asked: Sequence[Asked]


class MemoryWatch:
    """The run's private memory, sampled in a thread."""

    def __init__(self, run: LiveRun) -> None:
        self.samples: list[tuple[float, int]] = []
        self._run = run
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, name="memory watch")

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample_on(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS) and (count := self._run.private_bytes()):
            self.samples.append((time.time(), count))


def measure(words: Sequence[str], *, attacks: Sequence[str], megabytes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that was measured, as it is written and printed."""
    machine = machine_facts(core_count())  # before the bench itself is the load
    rows: list[Row] = []
    ends: list[str] = []
    for token in (None, TOKEN):
        say(f"starting a run {mode_of(token)}")
        with live_run(words, token=token, open_files=OPEN_FILES) as run, a_sink() as sink:
            assaults, evidence = besiege(run, sink, attacks=attacks, megabytes=megabytes, say=say)
            if not run.alive():
                ends.append(f"the run {mode_of(token)} did not survive: {run.last_words()}")
                say(ends[-1])
        rows += [{"mode": mode_of(token)} | row_of(one, evidence) for one in assaults]
    return summary(rows, ends) | {"rows": rows, "machine": machine}


def mode_of(token: str | None) -> str:
    return "without a token" if token is None else "with a token"


def besiege(run: LiveRun, sink: "Sink", *, attacks: Sequence[str], megabytes: float, say: Callable[[str], None]) -> tuple[list[Assault], Evidence]:
    """One attack after another, as long as the run lives."""
    assaults: list[Assault] = []
    with MemoryWatch(run) as memory, HonestClient(run.url, run.token) as honest:
        quiet = rest(run)
        for attack in attacks:
            order = Order(attack=attack, port=run.port, seconds=ATTACK_SECONDS[attack], megabytes=megabytes, connections=CONNECTIONS[attack])
            assaults.append(assault(run, sink, order, quiet))
            say(told(assaults[-1]))
            if not run.alive():
                break
            quiet = assaults[-1].after
    return assaults, Evidence(steps=run.step_times(), memory=memory.samples, asked=honest.asked)


def assault(run: LiveRun, sink: "Sink", order: Order, before: Stretch) -> Assault:
    most = run.private_bytes() + MEMORY_LIMIT_MB * MEGABYTE

    def too_large() -> bool:
        return run.private_bytes() > most

    on_run, outcome = stretch_of(run, partial(attack_in_a_process, order, broken_off=too_large))
    between = rest(run)
    spent = sink.cpu_seconds()
    on_sink, same = stretch_of(run, partial(attack_in_a_process, replace(order, port=sink.port), broken_off=too_large))
    cores = (sink.cpu_seconds() - spent + (0.0 if same is None else same.cpu_seconds)) / on_sink.seconds
    return Assault(
        attack=order.attack,
        before=before,
        on_run=on_run,
        between=between,
        on_sink=on_sink,
        after=rest(run),
        outcome=outcome,
        cores_on_sink=cores,
    )


def told(one: Assault) -> str:
    """An attack in one line."""
    if one.outcome is None:
        return f"{one.attack}: broken off, since the run grew by more than {MEMORY_LIMIT_MB:.0f} MB"
    return f"{one.attack}: {one.outcome.opened} connections, {one.outcome.closed} closed by the run, {one.outcome.sent_bytes / MEGABYTE:.1f} MB sent"


def rest(run: LiveRun) -> Stretch:
    return stretch_of(run, lambda: time.sleep(QUIET_SECONDS))[0]


def stretch_of(run: LiveRun, act: Callable[[], Any]) -> tuple[Stretch, Any]:
    begin, spent = time.time(), run.cpu_seconds()
    found = act()
    end = time.time()
    return Stretch(begin=begin, end=end, cpu_seconds=max(0.0, run.cpu_seconds() - spent)), found


def attack_in_a_process(order: Order, *, broken_off: Callable[[], bool]) -> Outcome | None:
    """What came of it, or None where it was broken off."""
    command = [sys.executable, "-m", "ftb_llm.bench.attacks"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asdict(order)) + "\n")
            process.stdin.close()
            deadline = time.monotonic() + order.seconds + SLACK_SECONDS
            while process.poll() is None:
                if broken_off():
                    return None
                if time.monotonic() > deadline:
                    raise FtbError(f"the attacker did not end within {SLACK_SECONDS:.0f} s of its {order.seconds:.0f}")
                time.sleep(SAMPLE_SECONDS)
            if process.returncode != 0:
                raise FtbError(f"the attacker's own process ended with exit code {process.returncode}")
            return Outcome(**json.loads(process.stdout.readline()))
        finally:
            process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """The control's process."""

    process: "subprocess.Popen[str]"
    port: int

    def cpu_seconds(self) -> float:
        import psutil

        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def a_sink() -> Iterator[Sink]:
    with subprocess.Popen([sys.executable, "-m", "ftb_llm.bench.sink"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Sink(process=process, port=int(process.stdout.readline()))
        finally:
            process.terminate()


def row_of(one: Assault, evidence: Evidence) -> Row:
    """An attack in numbers. Those of the honest client are of the attack on the run; quiet ones are of the stretches around it."""
    run, outcome = one.on_run, one.outcome
    asked = [ask for ask in evidence.asked if run.begin <= ask.at < one.between.end]
    quiet = [ask for ask in evidence.asked if one.before.begin <= ask.at < run.begin]
    row: Row = {
        "attack": one.attack,
        "memory_growth_mb": memory_growth_mb(evidence.memory, run.begin, one.between.end),
        "steps": steps_between(evidence.steps, run.begin, run.end),
        "steps_expected": expected_steps(evidence.steps, run, one.before, one.between),
        "steps_on_sink": steps_between(evidence.steps, one.on_sink.begin, one.on_sink.end),
        "steps_on_sink_expected": expected_steps(evidence.steps, one.on_sink, one.between, one.after),
        "honest_requests": len(asked),
        "honest_failures": sum(ask.problem is not None for ask in asked),
        "honest_problems": sorted({f"{ask.what}: {ask.problem}" for ask in asked if ask.problem}),
        "honest_ms": median_ms(asked),
        "honest_worst_ms": max((1e3 * ask.seconds for ask in asked), default=None),
        "honest_quiet_ms": median_ms(quiet),
        "server_cores": run.cpu_seconds / run.seconds,
        "server_cores_quiet": (one.before.cpu_seconds + one.between.cpu_seconds) / (one.before.seconds + one.between.seconds),
        "attacker_cores": None if outcome is None else outcome.cpu_seconds / run.seconds,
        "attacker_and_sink_cores": one.cores_on_sink,
        "broken_off": outcome is None,
    }
    for name, value in asdict(outcome or Outcome()).items():
        if name not in ("seconds", "cpu_seconds"):
            row[name] = None if outcome is None else value
    return row | ratios([row])


def ratios(rows: Sequence[Row]) -> dict[str, float | None]:
    """The steps taken, of those that the quiet stretches would have given: under attack, with the attack on the sink, and one of the other."""

    def ratio(taken: str, expected: str) -> float | None:
        below = sum(row[expected] for row in rows)
        return sum(row[taken] for row in rows) / below if below > 0 else None

    attack, sink = ratio("steps", "steps_expected"), ratio("steps_on_sink", "steps_on_sink_expected")
    return {"step_rate_ratio": attack, "step_rate_ratio_sink": sink, "step_rate_ratio_to_sink": attack / sink if attack is not None and sink else None}


def steps_between(times: Sequence[float], begin: float, end: float) -> float:
    """Steps from `begin` to `end`, with the part of a step that lies in it."""
    return place(times, end) - place(times, begin)


def place(times: Sequence[float], when: float) -> float:
    """How many steps had ended by then, and how far the one under way had got."""
    count = bisect.bisect_right(times, when)
    if count == 0 or count == len(times):
        return float(count)
    return count + (when - times[count - 1]) / (times[count] - times[count - 1])


def expected_steps(times: Sequence[float], stretch: Stretch, *quiet: Stretch) -> float:
    """What the stretch would have had at the rate of the quiet ones."""
    return stretch.seconds * statistics.fmean(steps_between(times, one.begin, one.end) / one.seconds for one in quiet)


def memory_growth_mb(samples: Sequence[tuple[float, int]], begin: float, end: float) -> float | None:
    """The most within that time, less what was held when it began."""
    held = [count for at, count in samples if at < begin][-1:]
    within = [count for at, count in samples if begin <= at < end]
    return (max(within) - held[0]) / MEGABYTE if held and within else None


def median_ms(asked: Sequence[Asked]) -> float | None:
    return 1e3 * statistics.median(ask.seconds for ask in asked) if asked else None


def summary(rows: Sequence[Row], ends: Sequence[str]) -> dict[str, Any]:
    """The headline numbers over all attacks, without a token and with one."""
    growths = [row["memory_growth_mb"] for row in rows if row["memory_growth_mb"] is not None]
    return {
        "memory_growth_mb": max(growths, default=None),
        **ratios(rows),
        "honest_requests": sum(row["honest_requests"] for row in rows),
        "honest_failures": sum(row["honest_failures"] for row in rows),
        "runs_lost": list(ends),
    }


def siege_tables(found: Mapping[str, Any]) -> list[Table]:
    """One line per attack, then the headline numbers."""
    columns = {
        "mode": ("mode", "s"),
        "attack": ("attack", "s"),
        "opened": ("opened", "d"),
        "closed": ("closed", "d"),
        "held": ("held", "d"),
        "MB sent": ("megabytes", ".1f"),
        "on one": ("most_megabytes", ".2f"),
        "memory, MB": ("memory_growth_mb", "+.1f"),
        "step rate": ("step_rate_ratio", ".3f"),
        "on a sink": ("step_rate_ratio_sink", ".3f"),
        "honest": ("honest_requests", "d"),
        "failed": ("honest_failures", "d"),
        "ms, quiet": ("honest_quiet_ms", ".0f"),
        "ms": ("honest_ms", ".0f"),
        "worst ms": ("honest_worst_ms", ".0f"),
        "server's cores, quiet": ("server_cores_quiet", ".2f"),
        "attacked": ("server_cores", ".2f"),
        "attacker's": ("attacker_cores", ".2f"),
    }
    body = [[_cell(_in_megabytes(row)[key], form) for key, form in columns.values()] for row in found["rows"]]
    short = [
        ["memory of the run grew by at most, MB", _cell(found["memory_growth_mb"], "+.1f"), f"under {MEMORY_GOAL_MB:.0f}"],
        ["step rate, attacked to quiet", _cell(found["step_rate_ratio"], ".3f"), f"above {STEP_RATE_GOAL}"],
        ["the same, with the attack on a sink", _cell(found["step_rate_ratio_sink"], ".3f"), ""],
        ["one to the other", _cell(found["step_rate_ratio_to_sink"], ".3f"), f"above {STEP_RATE_GOAL}"],
        ["requests of the honest client", str(found["honest_requests"]), ""],
        ["of which failed", str(found["honest_failures"]), "0"],
        ["runs lost", str(len(found["runs_lost"])), "0"],
    ]
    machine = found["machine"]
    title = f"A live run under attack ({machine['cores']} cores, {machine['date'][:10]})"
    return [Table(title=title, rows=[list(columns), *body]), Table(title="In short", rows=[["number", "value", "wanted"], *short])]


def _in_megabytes(row: Row) -> Row:
    sent, most = row["sent_bytes"], row["most_bytes"]
    return row | {"megabytes": sent and sent / MEGABYTE, "most_megabytes": most and most / MEGABYTE}


def _cell(value: Any, form: str) -> str:
    return NONE if value is None else format(value, form)

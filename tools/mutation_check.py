"""Does a test fail for each formula that is broken? `python tools/mutation_check.py [--json] [--only NAME ...]`.

Each mutation changes one text in a copy of the tree and runs the tests that should notice, up to the first failure. Before
that, the same tests must pass in the unchanged copy, from which the mutated module must also be imported. Exit status 1
means that a mutation survived.

A new one is an entry of MUTATIONS. Its old text must be in its file exactly once.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("pyproject.toml", "actors", "configs", "docs", "ftb_llm", "learner", "tests", "tools")
PASSED, FAILED = 0, 1  # of pytest's exit statuses


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    mutation: str
    file: str
    killed_by: str | None  # the first failing test; None when all passed
    seconds: float


class CannotCheck(Exception):
    """Why no verdict is possible."""


DIVERGENCES = "ftb_llm/divergences.py"
NUMERICS = "ftb_llm/numerics.py"
OBJECTIVES = "ftb_llm/objectives.py"
BASELINES = "ftb_llm/baselines.py"
TRAJECTORIES = "ftb_llm/trajectory_losses.py"
MEMBER_TESTS = ("tests/unit/test_divergences.py", "tests/unit/test_divergence_proofs.py")
OBJECTIVE_TESTS = ("tests/unit/test_objectives.py", "tests/unit/test_baselines.py", "tests/unit/test_trajectory_losses.py")

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        name="Hellinger with the exponent's sign turned",
        file=DIVERGENCES,
        old='"hellinger": lambda: AlphaDivergence(0.5)',
        new='"hellinger": lambda: AlphaDivergence(1.5)',
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="reverse and forward KL exchanged",
        file=DIVERGENCES,
        old='"reverse_kl": lambda: AlphaDivergence(1.0)',
        new='"reverse_kl": lambda: AlphaDivergence(0.0)',
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="alpha: slope without expm1",
        file=DIVERGENCES,
        old="return self._over_s(torch.expm1(self._s * delta), delta)",
        new="return self._over_s(torch.exp(self._s * delta) - 1, delta)",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="alpha: exponent clamped in the slope",
        file=DIVERGENCES,
        old="return self._over_s(torch.expm1(self._s * delta), delta)",
        new="return self._over_s(torch.expm1((self._s * delta).clamp(-20, 20)), delta.clamp(-20, 20))",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="alpha: sign of log Z",
        file=DIVERGENCES,
        old="return -(end + self._over_s(torch.log1p(self._s * mean), mean))",
        new="return (end + self._over_s(torch.log1p(self._s * mean), mean))",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="alpha: weights without the mean",
        file=DIVERGENCES,
        old="(slopes - mean) / (1 + self._s * mean)",
        new="slopes / (1 + self._s * mean)",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="alpha: weights not normalised by the mean exponential",
        file=DIVERGENCES,
        old="(slopes - mean) / (1 + self._s * mean)",
        new="slopes - mean",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="alpha: seen from the wrong end of the group",
        file=DIVERGENCES,
        old="return group.top(delta) if self._s > 0 else group.bottom(delta)",
        new="return group.bottom(delta) if self._s > 0 else group.top(delta)",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="js: slope without log 2",
        file=DIVERGENCES,
        old="return 2 * (delta.clamp(max=0) - torch.log1p(torch.expm1(-delta.abs()) / 2))",
        new="return 2 * (delta.clamp(max=0) - torch.log1p(torch.exp(-delta.abs())))",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="js: dilogarithm without its constant",
        file=DIVERGENCES,
        old="dilog = 2 * dilog_of_minus_exp_minus(size) + math.pi**2 / 6",
        new="dilog = 2 * dilog_of_minus_exp_minus(size)",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="js: a constant number of Newton steps",
        file=DIVERGENCES,
        old="for _ in range(6 + 2 * math.ceil(max(1.0, math.log(size)))):",
        new="for _ in range(7):",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="js: Newton starts at minus the mean",
        file=DIVERGENCES,
        old="c = (-(group.count(delta) * LOG_2 + group.ordered(delta).cumsum(-1)) / lowest).amax(-1, keepdim=True)",
        new="c = -group.mean(delta) + 0 * lowest.amax()",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="tv: the lower median of an even group",
        file=NUMERICS,
        old="return low + (high - low) / 2",
        new="return low",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="tv: values tied at the median weigh nothing",
        file=DIVERGENCES,
        old="return c, signs - tied * group.sum(signs) / group.sum(tied).clamp(min=1)",
        new="return c, signs",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="smoothed tv: loss shifted by width log 2",
        file=DIVERGENCES,
        old="x + torch.log1p(torch.exp(-2 * x)) - LOG_2)",
        new="x + torch.log1p(torch.exp(-2 * x)))",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="gradient of the loss clamped with its value",
        file=DIVERGENCES,
        old="return (grads[0] * ctx.divergence.slope(delta)).sum_to_size(delta.shape), None",
        new="return (grads[0] * (ctx.divergence._loss(delta.double()) < CEILING) * ctx.divergence.slope(delta)).sum_to_size(delta.shape), None",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="masked completions counted in the mean",
        file=NUMERICS,
        old="return x.shape[-1] if self.mask is None else self._count",
        new="return x.shape[-1]",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="a group in which nothing counts has no normaliser",
        file=DIVERGENCES,
        old="Group(mask | ~mask.any(-1, keepdim=True))",
        new="Group(mask)",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="generic solver: too few halvings",
        file=NUMERICS,
        old="for _ in range(80):",
        new="for _ in range(30):",
        tests=MEMBER_TESTS,
    ),
    Mutation(
        name="Delta with the reward's sign turned",
        file=OBJECTIVES,
        old="return logp - logp_ref - reward / beta",
        new="return logp - logp_ref + reward / beta",
        tests=OBJECTIVE_TESTS,
    ),
    Mutation(
        name="tempered loss not divided by beta",
        file=OBJECTIVES,
        old="/ (spec.beta if spec.tempered else 1.0)",
        new="/ 1.0",
        tests=OBJECTIVE_TESTS,
    ),
    Mutation(
        name="masked completions kept in the loss",
        file=OBJECTIVES,
        old="return value if mask is None else torch.where(mask, value, 0.0)",
        new="return value",
        tests=OBJECTIVE_TESTS,
    ),
    Mutation(
        name="weights of any size let through",
        file=OBJECTIVES,
        old=".clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)",
        new="",
        tests=OBJECTIVE_TESTS,
    ),
    Mutation(
        name="PPO's clip takes the larger gain",
        file=BASELINES,
        old="torch.minimum(free_GKT, cut_GKT)",
        new="torch.maximum(free_GKT, cut_GKT)",
        tests=OBJECTIVE_TESTS,
    ),
    Mutation(
        name="importance weights without the ratio",
        file=BASELINES,
        old="weight_GK = masked(ratio_GK * (slope_GK - baseline_G1), samples.mask_GK)",
        new="weight_GK = masked(slope_GK - baseline_G1, samples.mask_GK)",
        tests=OBJECTIVE_TESTS,
    ),
    Mutation(
        name="Trust-PCL without a squared",
        file=TRAJECTORIES,
        old="return temperature**2 * divergence.loss(",
        new="return temperature * divergence.loss(",
        tests=OBJECTIVE_TESTS,
    ),
)


def check(mutations: Sequence[Mutation], root: Path) -> list[Verdict]:
    """Break the formulas of the tree at `root` one at a time, in a copy."""
    for mutation in mutations:
        mutated(mutation, root)
    with tempfile.TemporaryDirectory(prefix="mutation-check-") as folder:
        copy = Path(folder)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).is_file():
                shutil.copy(root / name, copy / name)
        require_a_sound_copy(mutations, copy)
        return [judge(mutation, copy) for mutation in mutations]


def mutated(mutation: Mutation, root: Path) -> str:
    """The mutated file's content."""
    text = (root / mutation.file).read_text(encoding="utf-8")
    found = text.count(mutation.old)
    if found != 1:
        raise CannotCheck(f"{mutation.name}: {mutation.old!r} must be in {mutation.file} exactly once, and is there {found} times")
    return text.replace(mutation.old, mutation.new)


def require_a_sound_copy(mutations: Sequence[Mutation], copy: Path) -> None:
    """A test that fails anyway kills nothing, and one that imports the original sees no mutation."""
    tests = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    status, output = run_pytest(tests, copy)
    if status != PASSED:
        raise CannotCheck(f"the tests don't pass before anything is broken:\n{output}")
    for file in dict.fromkeys(mutation.file for mutation in mutations):
        module = file.removesuffix(".py").replace("/", ".")
        command = [sys.executable, "-c", f"import {module}; print({module}.__file__)"]
        done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True)
        if Path(done.stdout.strip()).resolve() != (copy / file).resolve():
            raise CannotCheck(f"the tests import {done.stdout.strip()}, not the copy of {file}")


def judge(mutation: Mutation, copy: Path) -> Verdict:
    path = copy / mutation.file
    original, changed = path.read_text(encoding="utf-8"), mutated(mutation, copy)
    path.write_text(changed, encoding="utf-8")
    began = time.monotonic()
    status, output = run_pytest(mutation.tests, copy)
    seconds = time.monotonic() - began
    path.write_text(original, encoding="utf-8")
    failure = re.search(r"^FAILED (\S+?\.py::.+?)(?: - |$)", output, re.MULTILINE)
    if status not in (PASSED, FAILED) or (status == FAILED) != bool(failure):
        raise CannotCheck(f"{mutation.name}: the tests could not run (exit status {status}):\n{output}")
    return Verdict(mutation=mutation.name, file=mutation.file, killed_by=failure[1] if failure else None, seconds=round(seconds, 1))


def run_pytest(tests: Sequence[str], copy: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, env=environment(copy), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


def environment(copy: Path) -> dict[str, str]:
    """The copy comes before an installed package of that name. Bytecode is dated by the second, too coarse for quick changes."""
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}


def table(verdicts: Sequence[Verdict]) -> str:
    width = max(len(verdict.mutation) for verdict in verdicts)
    return "\n".join(f"{verdict.mutation:<{width}} -> {verdict.killed_by or 'SURVIVED'}" for verdict in verdicts)


def main(arguments: Sequence[str] | None = None, *, mutations: Sequence[Mutation] = MUTATIONS, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Break formulas one at a time and show which test fails first.")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutations whose name contains one of these")
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in mutations if options.only is None or any(text in mutation.name for text in options.only)]
    if not chosen:
        print(f"mutation_check: --only {' '.join(options.only)} fits none of: {'; '.join(mutation.name for mutation in mutations)}", file=sys.stderr)
        return 2
    try:
        verdicts = check(chosen, root)
    except CannotCheck as problem:
        print(f"mutation_check: {problem}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2) if options.json else table(verdicts))
    return int(any(verdict.killed_by is None for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())

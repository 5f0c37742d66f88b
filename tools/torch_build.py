"""Which build of torch an environment gets: `python tools/torch_build.py take|check cpu|gpu`, with the environment's own Python.

Both environments pin the same version, and pip's settings say which build of it pip would take. `take` asks pip, which reads
metadata only, before anything large is installed. When that is the other build, it takes torch from PyTorch's own wheels.
`check` imports what was installed. A wrong build is uninstalled, or pip would be content with it the next time.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
PROBE = "import torch; print(torch.__version__, torch.version.cuda or torch.version.hip or 'cpu')"
# The index that has each build, as PyTorch's installation page names it, and the build's label there.
LABELS = {"cpu": "cpu", "gpu": "cu130"}
WHEELS = os.environ.get("TORCH_WHEELS") or "https://download.pytorch.org/whl"
SAID = {"cpu": "a CPU build", "gpu": "a CUDA build"}
FOR_CUDA = re.compile(r"(nvidia|cuda)\b", re.IGNORECASE)  # how the requirements of a CUDA build begin


class SetupError(Exception):
    """What stands in the way, as one line."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Offer:
    """The torch that pip would take with its present settings."""

    version: str
    kind: str  # cpu or gpu

    @classmethod
    def from_report(cls, report: dict[str, Any]) -> "Offer | None":
        """None when the torch that is installed is already what was asked for."""
        if not report["install"]:
            return None
        metadata = report["install"][0]["metadata"]
        for_cuda = any(FOR_CUDA.match(requirement) for requirement in metadata.get("requires_dist", []))
        return cls(version=metadata["version"], kind="gpu" if for_cuda else "cpu")


def pinned(extra: str) -> str:
    """The pinned version of torch."""
    lines = (REQUIREMENTS / f"{extra}.txt").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_line(text: str, otherwise: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [otherwise])[-1]


def offered(version: str) -> Offer | str | None:
    """What pip would take, or why it would take nothing."""
    asked = pip("--dry-run", "--report", "-", f"torch=={version}")
    if asked.returncode != 0:
        return last_line(asked.stderr, f"exit code {asked.returncode}")
    return Offer.from_report(json.loads(asked.stdout))


def take(extra: str) -> None:
    """Leave the pinned torch to pip where its settings give the right build; install it from PyTorch's wheels where not."""
    version = pinned(extra)
    offer = offered(version)
    if offer is None or (isinstance(offer, Offer) and offer.kind == extra):
        return
    found = f"would take {SAID[offer.kind]} of torch {version}" if isinstance(offer, Offer) else f"finds no torch {version} ({offer})"
    index = f"{WHEELS}/{LABELS[extra]}"
    print(f"make setup: pip {found}; taking {SAID[extra]} from {index}", flush=True)
    # The label is part of what is asked for, so that nothing else in pip's settings can answer.
    got = pip("--index-url", index, f"torch=={version}+{LABELS[extra]}")
    if got.returncode != 0:
        reason = last_line(got.stderr, f"exit code {got.returncode}")
        raise SetupError(
            f"no torch {version}+{LABELS[extra]} from {index} ({reason}); name a place that has PyTorch's wheels "
            f"(make setup TORCH_WHEELS=...), or let pip find {SAID[extra]} by its own settings (PIP_FIND_LINKS)"
        )


def problem(extra: str, returncode: int, stdout: str, stderr: str) -> str | None:
    """What is wrong with the torch that answered the probe, as one line; None when it is the right one."""
    if returncode != 0:
        return f"torch can't be imported ({last_line(stderr, f'exit code {returncode}')}); {SAID[extra]} is needed; run make setup again"
    version, platform = stdout.split()
    if (platform == "cpu") != (extra == "cpu"):
        return f"torch {version} is built for {platform}; {SAID[extra]} is needed; run make setup EXTRA={extra} again"
    return None


def check(extra: str) -> None:
    """Import the installed torch; the wrong build is uninstalled."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    line = problem(extra, probe.returncode, probe.stdout, probe.stderr)
    if line is not None:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"], check=True)
        raise SetupError(line)


def main(action: str, extra: str) -> int:
    try:
        {"take": take, "check": check}[action](extra)
    except SetupError as error:
        print(f"make setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

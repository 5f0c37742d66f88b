"""An environment of its own for TRL, in the cache folder: it is compared with, not depended on."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ftb_llm.errors import SetupError
from ftb_llm.tasks.base_model import cache_folder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/trl_step.py"
PINS, CONSTRAINTS = ROOT / "requirements/trl.txt", ROOT / "requirements/cpu.txt"
BUILD_SECONDS = 1800.0


def interpreter(say: Callable[[str], None]) -> Path | str:
    """That of an environment with TRL, or why there is none."""
    try:
        return trl_python(say)
    except SetupError as problem:
        say(f"TRL is left out: {problem}")
        return str(problem)


def trl_python(say: Callable[[str], None]) -> Path:
    """The interpreter of that environment, which is built first if this machine lacks it. SetupError says why it can't be."""
    if missing := next((path for path in (SCRIPT, PINS, CONSTRAINTS) if not path.is_file()), None):
        raise SetupError(f"{missing.relative_to(ROOT)} is only in a checkout")
    told = "\n".join([sys.version, PINS.read_text(encoding="utf-8"), CONSTRAINTS.read_text(encoding="utf-8")])
    folder = cache_folder() / f"trl-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        say(f"building an environment for TRL in {folder}, once per machine")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".trl-", dir=folder.parent))
        try:
            _build(staging)
            staging.rename(folder)  # its interpreter is called by its path alone, which moves with it
        except OSError as error:
            raise SetupError(f"the environment for TRL can't be put into {folder}: {error.strerror}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return folder / "bin/python"


def _build(folder: Path) -> None:
    """What pip says goes into one line; where packages come from is up to pip's own settings."""
    python = str(folder / "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", str(PINS), "--constraint", str(CONSTRAINTS)]
    for command in ([sys.executable, "-m", "venv", str(folder)], install, [python, "-I", "-c", "import trl"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise SetupError(f"building the environment for TRL took more than {BUILD_SECONDS:.0f} s") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            error = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise SetupError(f"the environment for TRL can't be built: {error}")

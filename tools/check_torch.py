"""Is the installed torch the build that this environment needs? `python tools/check_torch.py cpu|gpu`.

Both pin the same version, and where the build comes from is pip's own setting, so it is looked at here. The wrong build is
uninstalled, or pip would be content with it the next time.
"""

import subprocess
import sys

PROBE = "import torch; print(torch.__version__, torch.version.cuda or torch.version.hip or 'cpu')"
ADVICE = {
    "cpu": (
        "a CPU build is needed. Point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; the address is on "
        "PyTorch's installation page under Compute Platform: CPU) and run make setup again"
    ),
    "gpu": "a CUDA build is needed. Take the CPU wheels out of pip's settings (pip config list, PIP_FIND_LINKS) and run make setup again",
}


def problem(extra: str, returncode: int, stdout: str, stderr: str) -> str | None:
    """What is wrong with the torch that answered the probe, as one line; None when it is the right one."""
    if returncode != 0:
        last = stderr.strip().splitlines()[-1] if stderr.strip() else f"exit code {returncode}"
        return f"torch can't be imported ({last}); {ADVICE[extra]}"
    version, platform = stdout.split()
    if (platform == "cpu") != (extra == "cpu"):
        return f"torch {version} is built for {platform}; {ADVICE[extra]}"
    return None


def main(extra: str) -> int:
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    line = problem(extra, probe.returncode, probe.stdout, probe.stderr)
    if line is None:
        return 0
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"], check=True)
    print(f"make setup: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

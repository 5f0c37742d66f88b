"""Numbered folders that are either whole or not there: `v000012`, `step_000400`."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ftb_llm.run_dir import sync

_TEMPORARY = ".tmp-"


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into a temporary neighbour, force them to disk, and rename it into place, replacing what was there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    for name, data in files.items():
        with (temporary / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync(temporary)
    if folder.exists():
        replaced = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{folder.name}-", dir=folder.parent))
        folder.rename(replaced / folder.name)
    temporary.rename(folder)
    sync(folder.parent)


def prune(parent: Path, prefix: str, *, newest: int, keep: int) -> None:
    """Keep the last `keep` folders up to number `newest`. Later ones belong to a future that a resumed run has left.

    A folder of another name, such as somebody's copy `step_000080.bak`, is not ours to delete.
    """
    folders = [path for path in parent.glob(f"{prefix}[0-9]*") if path.name.removeprefix(prefix).isdecimal()]
    numbers = sorted(number_of(path, prefix) for path in folders)
    kept = [number for number in numbers if number <= newest][-keep:]
    for number in set(numbers) - set(kept):
        shutil.rmtree(parent / named(prefix, number))
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def named(prefix: str, number: int) -> str:
    return f"{prefix}{number:06d}"


def number_of(path: Path, prefix: str) -> int:
    return int(path.name.removeprefix(prefix))

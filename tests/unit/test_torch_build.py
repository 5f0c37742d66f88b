"""Which build of torch make setup takes: real pip against a small index that has both, and what is said of the wrong one."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tools.loopback_index import Index, Listed, serving
from tools.torch_build import Offer, problem

ROOT = Path(__file__).parents[2]
VERSION = "2.13.0"
NVIDIA = ("nvidia-cudnn-cu13==9.20.0.48", "filelock")


def wheel(folder: Path, version: str, requires: tuple[str, ...] = ("filelock",)) -> Path:
    """A torch that holds its own version and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch/__init__.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@dataclass(slots=True, frozen=True, kw_only=True)
class Machine:
    """A machine with nothing installed, whose pip knows the index on loopback only."""

    folder: Path
    index: Index

    def setup(self, action: str, extra: str, **settings: str) -> subprocess.CompletedProcess[str]:
        python = self.folder / "venv/bin/python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder / "venv"], check=True)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(self.folder / "pip"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{self.index.url}/simple",
            "TORCH_WHEELS": f"{self.index.url}/whl",
            **settings,
        }
        command = [str(python), str(ROOT / "tools/torch_build.py"), action, extra]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def installed(self) -> str | None:
        names = [path.name for path in self.folder.glob("venv/lib/*/site-packages/torch-*.dist-info")]
        return names[0].removeprefix("torch-").removesuffix(".dist-info") if names else None

    def fetched(self) -> list[str]:
        return [file.path for file in self.index.fetched]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """The public index lists a CUDA build that is not there; PyTorch's own wheels have one of each."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/pip").symlink_to(Path(str(distribution("pip").locate_file("pip"))))  # importing it here would bring back the old distutils
    public = Listed.from_file(wheel(tmp_path / "public", VERSION, NVIDIA))
    shelves = {
        "simple": {"torch": [Listed(name=public.name, metadata=public.metadata, content=None)]},
        "whl/cpu": {"torch": [Listed.from_file(wheel(tmp_path / "cpu", f"{VERSION}+cpu"))]},
        "whl/cu130": {"torch": [Listed.from_file(wheel(tmp_path / "cuda", f"{VERSION}+cu130", NVIDIA))]},
    }
    with serving(Index(shelves=shelves)) as index:
        yield Machine(folder=tmp_path, index=index)


def test_a_pip_without_settings_gets_pytorchs_cpu_build_and_asks_for_no_cuda_wheel(machine: Machine) -> None:
    done = machine.setup("take", "cpu")
    assert done.returncode == 0, done.stderr
    assert machine.installed() == f"{VERSION}+cpu"
    assert machine.fetched() == [f"/whl/cpu/torch/torch-{VERSION}+cpu-py3-none-any.whl"]
    assert f"pip would take a CUDA build of torch {VERSION}; taking a CPU build from {machine.index.url}/whl/cpu" in done.stdout


def test_where_pips_settings_give_a_cpu_build_nothing_is_done_and_nothing_fetched_elsewhere(machine: Machine) -> None:
    done = machine.setup("take", "cpu", PIP_FIND_LINKS=str(machine.folder / "cpu"))
    assert (done.returncode, done.stdout, machine.installed()) == (0, "", None)
    assert machine.fetched() == []
    assert not any(page.startswith("/whl") for page in machine.index.pages)


def test_a_gpu_environment_gets_a_cuda_build_though_pips_settings_give_a_cpu_one(machine: Machine) -> None:
    done = machine.setup("take", "gpu", PIP_FIND_LINKS=str(machine.folder / "cpu"))
    assert done.returncode == 0, done.stderr
    assert machine.installed() == f"{VERSION}+cu130"


def test_a_gpu_environment_leaves_the_public_cuda_build_to_pip(machine: Machine) -> None:
    done = machine.setup("take", "gpu")
    assert (done.returncode, done.stdout, machine.installed()) == (0, "", None)
    assert machine.fetched() == []


def test_what_is_installed_already_is_left_alone(machine: Machine) -> None:
    machine.setup("take", "cpu")
    machine.index.pages.clear()
    done = machine.setup("take", "cpu")
    assert (done.returncode, done.stdout) == (0, "")
    assert not any(page.startswith("/whl") for page in machine.index.pages)


def test_where_nobody_has_it_one_line_says_what_to_do(machine: Machine) -> None:
    del machine.index.shelves["whl/cpu"]
    done = machine.setup("take", "cpu")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"make setup: no torch {VERSION}+cpu from {machine.index.url}/whl/cpu (ERROR: ")
    assert "TORCH_WHEELS" in line
    assert "PIP_FIND_LINKS" in line


def test_the_wrong_build_is_uninstalled_after_it_was_found_out(machine: Machine) -> None:
    machine.setup("take", "gpu", PIP_FIND_LINKS=str(machine.folder / "cpu"))
    done = machine.setup("check", "gpu")
    assert done.returncode == 1  # this torch is empty, so it can't say what it was built for
    assert "torch can't be imported" in done.stderr
    assert machine.installed() is None


def test_a_report_is_read_by_what_the_build_requires() -> None:
    def report(version: str, *requires: str) -> dict[str, object]:
        return {"install": [{"metadata": {"version": version, "requires_dist": list(requires)}}]}

    assert Offer.from_report(report("2.13.0", "filelock", "nvidia-nccl-cu13==2.29.7")) == Offer(version="2.13.0", kind="gpu")
    assert Offer.from_report(report("2.13.0", "cuda-toolkit[cublas]==13.0.2")) == Offer(version="2.13.0", kind="gpu")
    assert Offer.from_report(report("2.13.0+cpu", "filelock")) == Offer(version="2.13.0+cpu", kind="cpu")
    assert Offer.from_report({"install": []}) is None


def test_the_right_build_is_fine() -> None:
    assert problem("cpu", 0, "2.13.0+cpu cpu\n", "") is None
    assert problem("gpu", 0, "2.13.0 13.0\n", "") is None


@pytest.mark.parametrize(
    ("extra", "said", "line"),
    [
        ("cpu", "2.13.0 13.0\n", "torch 2.13.0 is built for 13.0; a CPU build is needed; run make setup EXTRA=cpu again"),
        ("gpu", "2.13.0+cpu cpu\n", "torch 2.13.0+cpu is built for cpu; a CUDA build is needed; run make setup EXTRA=gpu again"),
    ],
)
def test_the_other_build_is_named(extra: str, said: str, line: str) -> None:
    assert problem(extra, 0, said, "") == line


def test_a_torch_that_does_not_import_says_why() -> None:
    line = problem("cpu", 1, "", "Traceback\nImportError: libcudart.so.13: cannot open shared object file\n")
    assert line is not None
    assert line.startswith("torch can't be imported (ImportError: libcudart.so.13: cannot open shared object file); a CPU build")


def test_a_torch_that_dies_without_a_word_says_so() -> None:
    line = problem("cpu", -11, "", "")
    assert line is not None
    assert "exit code -11" in line

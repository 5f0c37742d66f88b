"""Who may import whom: actors and learner know the core but not each other, and the core knows neither.

The one exception is `ftb_llm/launch.py`, the composition root, which nothing but the CLI imports. What a person starts from a
shell or a client imports none of the heavy libraries.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ftb_llm", "actors", "learner")
FORBIDDEN = {"ftb_llm": ("actors", "learner"), "actors": ("learner",), "learner": ("actors",)}
COMPOSITION_ROOT = "ftb_llm.launch"
HEAVY = ("torch", "vllm", "ray", "transformers")


def modules() -> dict[str, ast.Module]:
    """Every module of the three packages by dotted name, parsed."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it; `from a import b` yields `a` and `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            yield from (str(word.value) for word in node.args[:1] if isinstance(word, ast.Constant))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def breaches(trees: dict[str, ast.Module]) -> list[str]:
    found = []
    for module, tree in trees.items():
        for name in imports(tree):
            forbidden = FORBIDDEN[module.partition(".")[0]]
            if module != COMPOSITION_ROOT and any(within(name, package) for package in forbidden):
                found.append(f"{module} imports {name}")
            if within(name, COMPOSITION_ROOT) and not within(module, "ftb_llm.cli"):
                found.append(f"{module} imports {name}, which only the CLI may")
            if name.startswith("."):
                found.append(f"{module} imports relatively")
    return sorted(set(found))


def test_the_packages_keep_the_law() -> None:
    trees = modules()
    assert {name.partition(".")[0] for name in trees} == set(PACKAGES)
    assert breaches(trees) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("actors.engine", "import learner"),
        ("actors.engine", "from learner.step import Step"),
        ("learner.step", "def f():\n    import actors.engine"),
        ("ftb_llm.buffer", "from actors import engine"),
        ("ftb_llm.buffer", "import importlib\nimportlib.import_module('learner.step')"),
        ("ftb_llm.controller", "from ftb_llm import launch"),
        ("learner.step", "import ftb_llm.launch"),
        ("ftb_llm.buffer", "from . import types"),
    ],
)
def test_a_breach_is_found(module: str, line: str) -> None:
    assert breaches({module: ast.parse(line)}) != []


@pytest.mark.parametrize(
    ("module", "line"), [("ftb_llm.launch", "from actors.engine import Engine"), ("ftb_llm.cli.train", "from ftb_llm.launch import train")]
)
def test_what_the_law_allows_is_no_breach(module: str, line: str) -> None:
    assert breaches({module: ast.parse(line)}) == []


@pytest.mark.parametrize(
    "script",
    [
        "import ftb_llm.config",
        "import ftb_llm.config.docs",
        "import ftb_llm.api.client",
        "import ftb_llm.cli.main; ftb_llm.cli.main.main(['--help'])",
        "import ftb_llm.cli.main; [ftb_llm.cli.main.main([name, '--help']) for name in ftb_llm.cli.main.COMMANDS]",
        "import ftb_llm.cli.main; assert ftb_llm.cli.main.main(['train', 'configs/base.yaml', '--dry-run']) == 0",
    ],
)
def test_what_is_light_imports_nothing_heavy(script: str) -> None:
    probe = f"{script}\nimport sys\nprint('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"

"""The docs are true: generated pages are current, make targets exist, links resolve, nothing private slips in.

That the docs name every command and every endpoint is held by test_cli.py and test_rest_docs.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftb_llm.config import Config, docs, load_config
from ftb_llm.config.load import settings

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
# Paths of one machine, and where its packages came from: the project must hold wherever it is read.
PRIVATE = re.compile(r"(?<![\w.~>*}/-])/(?:work|root|tmp|home)/|\bpypi\.|pythonhosted|\bdownload\.\w+\.org|--(?:extra-)?index-url", re.IGNORECASE)
SOURCES = [
    path
    for folder in ("ftb_llm", "actors", "learner", "tools", "deploy")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".sh")
]


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def anchors(markdown: str) -> set[str]:
    """The fragment of each heading, as Git hosts make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub(lambda match: match[0] if "\n" not in match[0] else "", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists():
            yield f"{page.name}: {target} does not exist"
        elif fragment and path.suffix == ".md" and fragment not in anchors(path.read_text(encoding="utf-8")):
            yield f"{page.name}: {target} has no such heading"


def test_the_configuration_page_is_current() -> None:
    assert text_of("docs/configuration.md") == docs.markdown(), "run make docs"


def test_the_base_config_is_current() -> None:
    assert text_of("configs/base.yaml") == docs.base_yaml(), "run make docs"


def test_the_base_config_is_the_defaults() -> None:
    assert load_config([ROOT / "configs/base.yaml"]) == Config()


def test_the_configuration_page_names_every_setting() -> None:
    page = text_of("docs/configuration.md")
    assert [key for key, _ in settings() if f"`{key}`" not in page] == []


def test_every_make_target_is_in_its_help_and_the_named_ones_exist() -> None:
    makefile = text_of("Makefile")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    assert set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) == targets
    named = {target for page in PAGES for target in re.findall(r"\bmake ((?:[a-z]+-)?[a-z]+)\b", "\n".join(CODE.findall(page.read_text(encoding="utf-8"))))}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](gone.md) [b](#a-heading) [c](#other) [d](https://example.com/x) `[e](gone.md)`\n", encoding="utf-8")
    assert list(broken_links(page)) == ["page.md: gone.md does not exist", "page.md: #other has no such heading"]


def test_nothing_private_is_named() -> None:
    files = [*PAGES, *CONFIGS, *SOURCES, ROOT / "Makefile", ROOT / "pyproject.toml", *sorted((ROOT / "requirements").iterdir())]
    named = {path.relative_to(ROOT).as_posix(): PRIVATE.findall(path.read_text(encoding="utf-8")) for path in files}
    # PyTorch's own wheels are named where the build of torch is chosen, and nowhere else.
    assert named.pop("tools/torch_build.py") == ["download.pytorch.org", "--index-url"]
    assert {path: found for path, found in named.items() if found} == {}


@pytest.mark.parametrize("text", ["see /home/someone/x", "at /tmp/run", "pip install --extra-index-url https://packages.example/x"])
def test_something_private_is_found(text: str) -> None:
    assert PRIVATE.search(text)


@pytest.mark.parametrize("text", ["runs/<name>/work/x", "~/.cache/ftb_llm", "GET /v1/status", "the framework/root/x"])
def test_what_is_not_private_is_not_found(text: str) -> None:
    assert PRIVATE.search(text) is None

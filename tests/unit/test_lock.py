"""The lock check: the checkout passes it, and each kind of disagreement is found."""

import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools import check_lock
from tools.check_lock import LEFT_OUT_ON_CPU, accepts, applies, check, check_agreement, parse_pin, walk

ROOT = Path(__file__).parents[2]


def metadata_of(packages: dict[str, list[str]]) -> check_lock.Metadata:
    """Installed packages by `name==version`, as the walk sees them."""
    installed = {line.partition("==")[0]: (Version(line.partition("==")[2]), requires) for line, requires in packages.items()}
    return installed.get


def problems_of(roots: list[str], pins: dict[str, str], packages: dict[str, list[str]], left_out: tuple[str, ...] = ()) -> list[str]:
    return walk(
        [Requirement(line) for line in roots],
        {name: Version(version) for name, version in pins.items()},
        metadata_of(packages),
        dict.fromkeys(left_out, "a reason"),
        "some.txt",
    ).problems


def copy_of_checkout(folder: Path) -> Path:
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_pins_of_this_checkout_agree() -> None:
    problems, coverage = check(ROOT)
    assert problems == []
    assert [line.partition(":")[0] for line in coverage] == ["cpu.txt", "gpu.txt", "dev.txt"]


@pytest.mark.parametrize(
    "line",
    [
        "torch",
        "torch>=2.13",
        "torch==2.13.*",
        "torch==2.13.0+cpu",
        "ray[default]==2.60.0",
        "six==1.17.0; python_version>'3.11'",
        "a @ file:///a.whl",
        "-r a.txt",
    ],
)
def test_a_line_that_is_no_plain_pin_is_refused(line: str) -> None:
    assert parse_pin(line) is None


def test_a_pin_is_read_by_its_canonical_name() -> None:
    assert parse_pin("Jinja2==3.1.6") == ("jinja2", Version("3.1.6"))
    assert parse_pin("apache-tvm-ffi==0.1.15.post2") == ("apache-tvm-ffi", Version("0.1.15.post2"))


def test_a_missing_pin_names_who_requires_it() -> None:
    assert problems_of(["a"], {"a": "1"}, {"a==1": ["b>=2"]}) == ["some.txt: no pin for b, which a requires (b>=2)"]


def test_a_pin_outside_the_required_range_is_found() -> None:
    assert problems_of(["a<2"], {"a": "2"}, {"a==2": []}) == ["some.txt: a==2 is pinned, but pyproject.toml requires a<2"]


def test_extras_are_followed_only_where_asked_for() -> None:
    packages = {"a==1": ["b; extra == 'more'"]}
    assert problems_of(["a"], {"a": "1"}, packages) == []
    assert problems_of(["a[more]"], {"a": "1"}, packages) != []


def test_markers_hold_for_any_supported_python_on_linux() -> None:
    assert applies(Requirement("six; python_version > '3.11'"), ())
    assert not applies(Requirement("six; python_version < '3.11'"), ())
    assert not applies(Requirement("six; sys_platform == 'win32'"), ())


def test_what_is_left_out_with_a_reason_needs_no_pin() -> None:
    assert problems_of(["a"], {"a": "1"}, {"a==1": ["torchvision"]}, left_out=("torchvision",)) == []


def test_a_local_label_in_a_requirement_is_no_problem_but_another_version_is() -> None:
    assert accepts(Requirement("torch==2.13.0+cpu"), Version("2.13.0"))
    assert not accepts(Requirement("torch==2.13.0+cpu"), Version("2.13.1"))


def test_two_versions_of_a_shared_package_need_a_reason_and_a_reason_needs_two_versions() -> None:
    one, two = {"a": Version("1"), "b": Version("1")}, {"a": Version("2"), "b": Version("1")}
    assert check_agreement(one, two, {}) == ["cpu.txt has a==1, gpu.txt has 2; pin one version"]
    assert check_agreement(one, two, {"a": "a reason"}) == []
    assert check_agreement(one, two, {"a": "a reason", "b": "a reason"}) == ["DIFFERS names b, which doesn't differ between cpu.txt and gpu.txt"]


def test_dropping_any_needed_pin_is_found(tmp_path: Path) -> None:
    root = copy_of_checkout(tmp_path)
    for file, name in (("cpu", "sympy"), ("dev", "pluggy"), ("gpu", "vllm")):
        path = root / "requirements" / f"{file}.txt"
        whole = path.read_text(encoding="utf-8")
        path.write_text("".join(line for line in whole.splitlines(keepends=True) if not line.startswith(f"{name}==")), encoding="utf-8")
        assert any(f"no pin for {name}" in problem for problem in check(root)[0]), f"{name} of {file}.txt"
        path.write_text(whole, encoding="utf-8")


def test_a_pin_nobody_needs_is_found(tmp_path: Path) -> None:
    root = copy_of_checkout(tmp_path)
    with (root / "requirements/cpu.txt").open("a", encoding="utf-8") as file:
        file.write("leftover==1.0\n")
    assert "cpu.txt: leftover is pinned, but nothing requires it" in check(root)[0]


def test_a_new_requirement_without_a_pin_is_found(tmp_path: Path) -> None:
    root = copy_of_checkout(tmp_path)
    pyproject = root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text(encoding="utf-8").replace('"rich>=14,<16"', '"rich>=14,<15", "newcomer>=1"'), encoding="utf-8")
    problems = check(root)[0]
    assert any("no pin for newcomer, which pyproject.toml requires" in problem for problem in problems)
    assert any("but pyproject.toml requires rich<15,>=14" in problem for problem in problems)


def test_pins_that_are_not_what_is_installed_are_found(tmp_path: Path) -> None:
    problems, _ = check(copy_of_checkout(tmp_path), metadata_of({}))
    assert any("run make setup" in problem for problem in problems)


def test_the_cpu_environment_pins_none_of_what_it_leaves_out() -> None:
    cpu, _ = check_lock.read_pins(ROOT / "requirements/cpu.txt")
    assert not cpu.keys() & LEFT_OUT_ON_CPU.keys()

import os
from pathlib import Path

import pytest

from learner.folders import prune, write_folder


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "deep" / "v000001", {"a": b"one", "b": b""})
    assert {file.name: file.read_bytes() for file in (tmp_path / "deep" / "v000001").iterdir()} == {"a": b"one", "b": b""}
    assert os.listdir(tmp_path / "deep") == ["v000001"]


def test_a_write_that_breaks_leaves_what_was_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "v000001", {"a": b"old"})
    with pytest.raises(FileNotFoundError):
        write_folder(tmp_path / "v000001", {"a": b"new", "no/such/folder": b""})
    assert (tmp_path / "v000001" / "a").read_bytes() == b"old"


def test_writing_again_replaces_and_pruning_sweeps(tmp_path: Path) -> None:
    write_folder(tmp_path / "v000001", {"a": b"old", "b": b"gone"})
    write_folder(tmp_path / "v000001", {"a": b"new"})
    assert [file.name for file in (tmp_path / "v000001").iterdir()] == ["a"]
    prune(tmp_path, "v", newest=1, keep=1)
    assert os.listdir(tmp_path) == ["v000001"]


def test_prune_keeps_the_last_and_drops_the_future(tmp_path: Path) -> None:
    for number in (1, 2, 3, 10, 999999, 1000000):
        write_folder(tmp_path / f"v{number:06d}", {"a": b""})
    (tmp_path / "verdict").mkdir()
    prune(tmp_path, "v", newest=999999, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["v000003", "v000010", "v999999", "verdict"]


def test_prune_leaves_copies_alone(tmp_path: Path) -> None:
    for number in (1, 2):
        write_folder(tmp_path / f"v{number:06d}", {"a": b""})
    (tmp_path / "v000001.bak").mkdir()
    prune(tmp_path, "v", newest=2, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["v000001.bak", "v000002"]

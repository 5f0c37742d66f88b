import os
from pathlib import Path

import pytest

from ftb_llm.cli.doctor import check_ray_token
from ftb_llm.local_ray import SCRATCH_NAME, private_session


def test_the_session_is_ours_alone_and_goes_with_its_block_and_what_engines_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ftb_llm.local_ray.MEMORY", tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "somebody's own")
    with private_session() as folder:
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert os.environ["TMPDIR"] == str(folder.parent)
        left = tmp_path / f"ftb-llm-{os.environ[SCRATCH_NAME]}-x"
        left.mkdir()
        others = tmp_path / "ftb-llm-ftb-another-x"
        others.mkdir()
    assert not folder.parent.exists()
    assert not left.exists()
    assert others.exists()
    assert os.environ["RAY_AUTH_TOKEN"] == "somebody's own"
    assert SCRATCH_NAME not in os.environ


def test_sockets_have_room_in_a_long_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with private_session() as folder:
        longest = folder / "session_2026-11-26_11-44-00_837186_4194304" / "sockets" / "plasma_store"
        assert len(str(longest)) < 107


def test_the_node_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.services import get_node_ip_address

    with private_session():
        assert get_node_ip_address() == "127.0.0.1"


@pytest.mark.parametrize(("mode", "ok"), [(0o600, True), (0o644, False), (0o640, False)])
def test_doctor_warns_of_a_token_that_others_can_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int, ok: bool) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_ray_token().ok
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(mode)
    finding = check_ray_token()
    assert finding.ok is ok
    assert ok or f"chmod 600 {path}" in finding.remedy
    assert "secret" not in finding.found

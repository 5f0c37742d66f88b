import socket
from pathlib import Path
from typing import Any

import pytest

from ftb_llm.config import Config, build_config
from ftb_llm.errors import SetupError
from ftb_llm.preflight import check_first, read_token


def made(folder: Path, **control: Any) -> Config:
    return build_config({"run": {"dir": str(folder), "name": "here"}, "control": {"enabled": False} | control})


def test_a_taken_name_is_told_but_not_to_who_resumes(tmp_path: Path) -> None:
    check_first(made(tmp_path), resume=None)
    (tmp_path / "here").mkdir()
    with pytest.raises(SetupError, match=r"run\.name: .*here exists already"):
        check_first(made(tmp_path), resume=None)
    check_first(made(tmp_path), resume=tmp_path / "here")


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"control\.port: {port} is in use"):
            check_first(made(tmp_path, enabled=True, port=port), resume=None)


def test_a_short_token_is_for_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_THIS_TEST", "fifteen-letters\n")
    assert read_token(made(tmp_path, token_env="TOKEN_OF_THIS_TEST")) == "fifteen-letters"
    with pytest.raises(SetupError, match=r"control\.token_env: the token in TOKEN_OF_THIS_TEST has 15 characters; .* needs 16 at least"):
        read_token(made(tmp_path, token_env="TOKEN_OF_THIS_TEST", host="0.0.0.0"))

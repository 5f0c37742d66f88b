"""A config that can't be written down, over real HTTP against the real controller."""

import errno
import os
import sqlite3
from pathlib import Path

import httpx
import pytest

from ftb_llm import run_dir
from ftb_llm.api.app import create_app
from tests.fakes import make_run
from tests.service.conftest import serving

SETTINGS = {"sampling": {"group_size": 2}, "buffer": {"capacity_groups": 4}, "learner": {"groups_per_step": 2}}


@pytest.mark.parametrize(("number", "status", "kind"), [(errno.ENOSPC, 507, "disk-full"), (errno.EIO, 503, "not-recorded")])
def test_the_answer_names_the_reason_and_the_next_patch_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int, kind: str) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    run = make_run(tmp_path / "run", SETTINGS)
    # The server of these tests has a thread of its own, and a database belongs to the thread that opened it.
    run._journal._db = sqlite3.connect(tmp_path / "run" / "run.db", isolation_level=None, check_same_thread=False)
    with serving(create_app(run)) as url, httpx.Client(base_url=url, trust_env=False, timeout=20) as http:

        def patch(beta: float) -> httpx.Response:
            return http.patch("/v1/config", json={"objective": {"beta": beta}}, headers={"If-Match": "*"})

        with monkeypatch.context() as broken:
            broken.setattr(run_dir.os, "fsync", refuse)
            for beta in (0.42, 0.43):
                answer = patch(beta)
                assert answer.status_code == status
                assert answer.headers["content-type"] == "application/problem+json"
                problem = answer.json()
                assert problem["type"] == f"urn:ftb-llm:problem:{kind}"
                reason = f"config version 2 can't be written to config.json: {os.strerror(number)}; it did not happen"
                assert problem["detail"] == reason
        answer = patch(0.44)
        assert (answer.status_code, answer.json()["config_version"]) == (200, 2)

"""A Mac stays awake while the engine works, and only then."""

import os
from pathlib import Path

import pytest
from watched import PROMPT, SAMPLE, Watched, gone, wait_until

from mlx_kontext.awake import Awake
from mlx_kontext.messages import (
    Done,
    Ready,
)


def test_a_mac_is_kept_awake_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    fake = tmp_path / "caffeinate"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    awake = Awake(platform="darwin")
    awake.work()
    awake.work()
    wait_until(log.exists)
    pid = awake._process.pid
    awake.rest()
    awake.rest()
    assert log.read_text() == f"-i -s -w {os.getpid()}\n" and gone(pid)
    elsewhere = Awake(platform="linux")
    elsewhere.work()
    assert elsewhere._process is None
    monkeypatch.setenv("PATH", os.fspath(tmp_path / "nowhere"))
    awake.work()
    assert awake._process is None


def test_the_engine_keeps_awake_while_it_works_only(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Awake, "work", lambda self: told.append("work"))
    monkeypatch.setattr(Awake, "rest", lambda self: told.append("rest"))
    watched = Watched(process=False)
    with watched.engine as engine:
        engine.load()
        watched.until(lambda e: isinstance(e, Ready))
        assert told[0] == "work" and told[-1] == "rest"
        engine.edit(SAMPLE, PROMPT, num_inference_steps=1)
        assert "work" in told[2:]
        watched.until(lambda e: isinstance(e, Done))
        assert told[-1] == "rest"

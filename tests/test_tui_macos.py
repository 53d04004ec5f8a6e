"""The macOS tools, with programs of our own in their place."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tui import macos

PICTURE = Path("a 'b\".png")


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac whose programs write down what they were called with: one argument a line, then what they were sent."""
    for name in ("qlmanage", "open", "pbcopy", "osascript"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" > {tmp_path}/part\ncat >> {tmp_path}/part\n')
        program.write_text(program.read_text() + f"mv {tmp_path}/part {tmp_path}/called\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def called(mac: Path) -> list[str]:
    deadline = time.monotonic() + 10
    while not (mac / "called").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return (mac / "called").read_text().splitlines()


def test_commands(mac: Path) -> None:
    path = str(PICTURE.absolute())
    for done, expected in [
        (lambda: macos.reveal(PICTURE), ["open", "-R", path]),
        (lambda: macos.open_file(PICTURE), ["open", path]),
        (lambda: macos.quick_look(PICTURE), ["qlmanage", "-p", path]),
        (lambda: macos.copy_text("größer"), ["pbcopy", "größer"]),
    ]:
        assert done() is None
        assert called(mac) == expected
        (mac / "called").unlink()


def test_values_are_no_part_of_the_script(mac: Path) -> None:
    evil = '" & (do shell script "touch /tmp/x") & "'
    assert macos.notify("done", evil) is None
    name, option, *script, heading, message = called(mac)
    assert (name, option, heading, message) == ("osascript", "-e", "done", evil)
    assert "touch" not in "".join(script)
    assert macos.copy_image(PICTURE) is None
    *script, path = called(mac)
    assert path == str(PICTURE.absolute()) and PICTURE.name not in "".join(script)


def test_quick_look_is_not_waited_for(mac: Path) -> None:
    (mac / "qlmanage").write_text(f"#!/bin/sh\necho $$ > {mac}/called\nexec sleep 60\n")
    start = time.monotonic()
    assert macos.quick_look(PICTURE) is None
    assert time.monotonic() - start < 5
    os.kill(int(called(mac)[0]), 9)


def test_failures_are_one_line(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mac / "open").write_text("#!/bin/sh\necho first >&2\necho 'no such file' >&2\nexit 1\n")
    assert macos.reveal(PICTURE) == "showing files in the Finder did not work: no such file"
    (mac / "open").write_text("#!/bin/sh\nexit 3\n")
    assert macos.open_file(PICTURE) == "opening files did not work: open ended with 3"
    (mac / "open").write_text("#!/nowhere/at/all\n")
    assert "opening files did not work: " in str(macos.open_file(PICTURE))
    assert macos.notify("done", "zero \0 byte") == "notifications did not work: embedded null byte"
    (mac / "qlmanage").write_text("#!/nowhere/at/all\n")
    assert "Quick Look did not work: " in str(macos.quick_look(PICTURE))
    (mac / "open").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(macos, "_SECONDS", 0.1)
    assert "timed out" in str(macos.open_file(PICTURE))
    (mac / "pbcopy").unlink()
    monkeypatch.setenv("PATH", str(mac))
    assert macos.copy_text("x") == "copying text: pbcopy is not on this machine"


@pytest.mark.parametrize("function", [macos.quick_look, macos.reveal, macos.open_file, macos.copy_image])
def test_elsewhere_nothing_happens(
    function: Callable[[Path], str | None], mac: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    assert str(function(PICTURE)).endswith(": only on macOS")
    assert macos.copy_text("x") == "copying text: only on macOS"
    assert macos.notify("a", "b") == "notifications: only on macOS"

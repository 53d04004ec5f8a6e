"""The tools of macOS that a picture editor wants: Quick Look, Finder, the clipboard, notifications.

Each function returns None when it worked and otherwise one line that says why not, for the status line: elsewhere than
on a Mac, or where the tool is missing, nothing happens, and we say so. Programs are called with lists of arguments,
never through a shell, and paths given to them are absolute, so that none can be taken for an option.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

_SECONDS = 10.0

# Values reach AppleScript as arguments of `run`, never as part of its text.
_COPY_IMAGE = """on run {name}
set the clipboard to (read (POSIX file name) as «class PNGf»)
end run"""
_NOTIFY = """on run {heading, message}
display notification message with title heading
end run"""


def quick_look(path: Path) -> str | None:
    """Open the system's preview of a file; it stays while we go on."""
    return _start("Quick Look", ["qlmanage", "-p", str(path.absolute())])


def reveal(path: Path) -> str | None:
    """Show a file in the Finder."""
    return _run("showing files in the Finder", ["open", "-R", str(path.absolute())])


def open_file(path: Path) -> str | None:
    """Open a file in the program that the user has for it."""
    return _run("opening files", ["open", str(path.absolute())])


def copy_text(text: str) -> str | None:
    """Put text on the clipboard. Terminals that know OSC 52 need no program for it; Terminal.app does."""
    return _run("copying text", ["pbcopy"], text)


def copy_image(png: Path) -> str | None:
    """Put the picture in a PNG file on the clipboard."""
    return _run("copying pictures", ["osascript", "-e", _COPY_IMAGE, str(png.absolute())])


def notify(heading: str, message: str) -> str | None:
    """A notification in the corner of the screen."""
    return _run("notifications", ["osascript", "-e", _NOTIFY, heading, message])


def _program(what: str, name: str) -> tuple[str, str | None]:
    """Where a program is, and why it is not there."""
    if sys.platform != "darwin":
        return "", f"{what}: only on macOS"
    found = shutil.which(name)
    return (found, None) if found else ("", f"{what}: {name} is not on this machine")


def _run(what: str, command: list[str], standard_input: str = "") -> str | None:
    program, missing = _program(what, command[0])
    if missing:
        return missing
    try:
        done = subprocess.run(
            [program, *command[1:]],
            input=standard_input.encode("utf-8", "replace"),
            capture_output=True,
            timeout=_SECONDS,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{what} did not work: {error}"
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"{what} did not work: {said[-1] if said else f'{command[0]} ended with {done.returncode}'}"
    return None


def _start(what: str, command: list[str]) -> str | None:
    """As `_run`, for a program that goes on; it has no terminal to write to and is not waited for."""
    program, missing = _program(what, command[0])
    if missing:
        return missing
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return f"{what} did not work: {error}"
    threading.Thread(target=process.wait, daemon=True).start()  # or it would stay as a zombie
    return None

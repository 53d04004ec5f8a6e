"""Paths that were pasted or dropped into the terminal, in whatever quoting it writes them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mlx_kontext.errors import RequestError
from mlx_kontext.terminal import safe_text

_LONGEST = 65_536
_SPACE = " \t\r\n"  # not str.strip's: macOS writes U+202F into the names of screenshots, and it belongs to the name
_WINDOWS = re.compile(r"/?[A-Za-z]:[\\/]|\\\\[^\\]")


def pasted_paths(
    text: str, exists: Callable[[str], bool] = os.path.exists, home: str = "", host: str = ""
) -> list[Path]:
    """The files that `text` names, in order; an empty list if it is ordinary text, such as part of a prompt.

    Terminals quote dropped files in single quotes (kitty), with backslashes (Terminal, iTerm2, Ghostty) or not at all,
    programs copy them as file:// URLs or one path a line. Text is first taken as it stands, so an unquoted name with
    spaces is found. Every name must exist, or all of it counts as ordinary text.

    home: what `~` stands for; host: the name of this machine, for file URLs. Raises RequestError for what can only be a
    path but cannot be used: control characters inside, Windows paths, file URLs of other machines.
    """
    text = text.strip(_SPACE)
    if not text or len(text) > _LONGEST:
        return []
    lines = [line.strip(_SPACE) for line in text.split("\n") if line.strip(_SPACE)]
    try:
        words = shlex.split(text)
    except ValueError:  # a quote is not closed: it is an apostrophe
        words = []
    for names in (lines, words):
        paths = [_plain(name, home or str(Path.home()), host or os.uname().nodename) for name in names]
        if paths and all(_is_file(path, exists) for path in paths):
            return [Path(path) for path in paths]
    for name in lines:
        if _WINDOWS.match(name.strip("'\"").removeprefix("file://")):
            raise RequestError(f"{_short(name)} is a Windows path; give the path on this machine")
    return []


def _plain(name: str, home: str, host: str) -> str:
    """`name` without `file:` and `~`. Raises RequestError for a URL of another machine."""
    if name.startswith("~/"):
        return home + name[1:]
    if not name.lower().startswith("file:"):
        return name
    path, there = name[len("file:") :], ""
    if path.startswith("//"):
        there, slash, rest = path[2:].partition("/")
        path = slash + rest
    if there.lower() not in ("", "localhost", host.lower()):
        raise RequestError(f"{_short(name)} lies on another machine ({_short(there)}); copy the file to this one first")
    return os.fsdecode(unquote_to_bytes(path))  # not urlsplit: `?` and `#` are letters of a name, and often left bare


def _is_file(path: str, exists: Callable[[str], bool]) -> bool:
    """Whether `path` is meant as one and exists. Raises RequestError for control characters in it."""
    # A word of a prompt may happen to be the name of a folder here.
    if not path.startswith(("/", "./", "../")) and not re.search(r"\.\w{2,5}$", path):
        return False
    try:
        found = exists(path)
    except (OSError, ValueError):  # too long, or a zero byte
        found = False
    control = {letter for letter in path if letter < " " or "\x7f" <= letter <= "\x9f"}
    if path.startswith("/") and control and (found or control != {"\t"}):  # a tab may part two names
        raise RequestError(f"{_short(path)} has control characters in its name; rename the file first")
    return found and not control


def _short(text: str) -> str:
    return safe_text(text[:80]).replace("\n", "·")

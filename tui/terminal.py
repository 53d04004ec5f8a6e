"""What this terminal can show, told from the environment. Reads no keys, imports no Textual: it is asked before both.

A list of facts about terminals, as of 2026:

    kitty, Ghostty             kitty protocol with unicode placeholders: a picture is made of ordinary text cells
    iTerm2, WezTerm, VS Code   iTerm2's inline pictures, drawn over the cells
    inside tmux                kitty's, if the outer terminal is one of the two and allow-passthrough is on
    all others                 half-blocks, which are text; 256 colours are dithered

A terminal that was taken for more than it is shows half-blocks all the same: they lie below the pixels.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal, get_args

from mlx_kontext.errors import RequestError

Protocol = Literal["halfblock", "kitty", "iterm", "none"]
CHOICES = ("auto", *get_args(Protocol))
VARIABLE = "MLX_KONTEXT_IMAGES"
DEFAULT_CELL = (8, 16)
"""Pixels of a character, width and height, where the terminal does not tell: most fonts are twice as high as wide."""

_PROGRAMS: dict[str, Protocol] = {"ghostty": "kitty", "iTerm.app": "iterm", "WezTerm": "iterm", "vscode": "iterm"}
_KITTY_TERMS = {"xterm-kitty", "xterm-ghostty"}
_RGB = "`tmux set -as terminal-features ,*:RGB` and a new client change that"


@dataclass(frozen=True)
class Terminal:
    """How pictures and colours reach the person in front of it."""

    pictures: Protocol = "halfblock"
    reason: str = "nothing better is known of this terminal"
    """Why `pictures` is what it is, for people."""
    truecolor: bool | None = None
    """True or False where we know better than Textual's own look at COLORTERM."""
    tmux: bool = False
    """Graphics commands are wrapped for tmux, which hands them through to the outer terminal."""
    remote: bool = False
    """At the other end of ssh, where bytes are dear."""


@dataclass(frozen=True)
class Outer:
    """What tmux knows of the terminal around it."""

    term: str
    truecolor: bool
    passthrough: bool


def ask_tmux() -> Outer | None:
    """What tmux says of its newest client; None where it does not answer within a second."""
    command = ["tmux", "display-message", "-p", "#{client_termname}\n#{client_termfeatures}\n#{allow-passthrough}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=1, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    if len(answer) < 3:
        return None
    return Outer(answer[0], "RGB" in answer[1].split(","), answer[2] in ("on", "all", "1"))


def detect(
    environ: Mapping[str, str] = os.environ,
    choice: str | None = None,
    ask: Callable[[], Outer | None] = ask_tmux,
    macos: int | None = None,
) -> Terminal:
    """The terminal of this process.

    choice: one of CHOICES, instead of what MLX_KONTEXT_IMAGES says; ask: what stands in for `ask_tmux`; macos: the
    major version of the system, found out if None. Raises RequestError for a choice that does not exist, or cannot
    work inside tmux.
    """
    source = "the setting for pictures" if choice else VARIABLE
    choice = choice or environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise RequestError(f"{source} is {choice[:40]!r}; expected one of {', '.join(CHOICES)}")
    tmux = "TMUX" in environ
    nested = tmux or "STY" in environ or "ZELLIJ" in environ
    if choice == "iterm" and nested:
        raise RequestError(
            f"{source} is iterm inside tmux, screen or zellij, which place no inline pictures; choose halfblock or kitty"
        )
    outer = ask() if tmux else None
    if choice == "kitty" and outer is not None and not outer.truecolor:
        raise RequestError(f"{source} is kitty, but tmux sends {outer.term} no 24-bit colours, which it needs; {_RGB}")
    found, reason = _protocol(environ, outer) if choice == "auto" else (choice, f"{source} is {choice}")
    return Terminal(
        pictures=found,  # type: ignore[arg-type]  # choice is one of CHOICES without auto
        reason=reason,
        truecolor=_truecolor(environ, outer, macos, found),
        tmux=tmux,
        remote="SSH_CONNECTION" in environ or "SSH_TTY" in environ,
    )


def _protocol(environ: Mapping[str, str], outer: Outer | None) -> tuple[Protocol, str]:
    if "TMUX" in environ:  # what kitty or Ghostty left in the environment may be another client's
        if outer is None:
            return "halfblock", "tmux does not say which terminal is around it"
        if outer.term not in _KITTY_TERMS:
            return "halfblock", f"tmux runs in {outer.term}"
        if not outer.passthrough:
            return "halfblock", "tmux keeps graphics back; `tmux set -g allow-passthrough on` lets them through"
        if not outer.truecolor:  # a picture's number is sent as a colour
            return "halfblock", f"tmux sends {outer.term} no 24-bit colours; {_RGB}"
        return "kitty", f"tmux runs in {outer.term} and lets graphics through"
    for variable, name in (("STY", "screen"), ("ZELLIJ", "zellij")):
        if variable in environ:
            return "halfblock", f"{name} keeps graphics back"
    program = environ.get("TERM_PROGRAM", "")
    if program in _PROGRAMS:
        return _PROGRAMS[program], f"TERM_PROGRAM is {program}"
    if program:
        return "halfblock", f"nothing better is known of {program[:40]}"
    if environ.get("TERM") in _KITTY_TERMS:
        return "kitty", f"TERM is {environ['TERM']}"
    for name, protocol in (
        ("KITTY_WINDOW_ID", "kitty"),
        ("GHOSTTY_RESOURCES_DIR", "kitty"),
        ("WEZTERM_PANE", "iterm"),
        ("VSCODE_INJECTION", "iterm"),
    ):
        if name in environ:
            return protocol, f"{name} is set"  # type: ignore[return-value]
    if environ.get("LC_TERMINAL") == "iTerm2":  # what iTerm2 sends along over ssh
        return "iterm", "LC_TERMINAL is iTerm2"
    return "halfblock", f"nothing better is known of TERM={environ.get('TERM', '')[:40]}"


def _truecolor(environ: Mapping[str, str], outer: Outer | None, macos: int | None, found: str) -> bool | None:
    if "TMUX" in environ:
        # tmux sets COLORTERM for us and then turns colours into the nearest of 256, undithered, if it must.
        return outer.truecolor if outer else None
    if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return True
    if environ.get("TERM_PROGRAM") == "Apple_Terminal":  # has 24 bits since macOS 26 and does not say so
        if macos is None:
            macos = int(platform.mac_ver()[0].split(".")[0] or 0)
        return macos >= 26
    # ssh passes TERM along but not COLORTERM.
    return True if found == "kitty" or _protocol(environ, None)[0] in ("kitty", "iterm") else None


def claim_colours(terminal: Terminal, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell Textual, which reads it when it is imported, what we know of the colours; a user's own setting stays."""
    if terminal.truecolor is not None:
        environ.setdefault("TEXTUAL_COLOR_SYSTEM", "truecolor" if terminal.truecolor else "256")


def cell_pixels(descriptor: int = 2) -> tuple[int, int] | None:
    """Width and height in pixels of one character of the terminal behind `descriptor`, which is stderr, as Textual's.

    None where it does not tell.
    """
    try:
        import fcntl
        import struct
        import termios

        answer = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
    except (ImportError, OSError):
        return None
    rows, columns, width, height = struct.unpack("HHHH", answer)
    if not (rows and columns and width >= 2 * columns and height >= 2 * rows):
        return None
    return width // columns, height // rows

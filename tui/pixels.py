"""Real pixels in terminals that have them: kitty's graphics protocol and iTerm2's inline pictures, as text to write.

kitty and Ghostty are sent a picture once, under a number. Cells that hold the letter U+10EEEE then show parts of it:
the letter's colour is the picture's number, marks above it are the row and the column. These are ordinary text cells,
so whatever Textual draws above them or takes away is right by itself. iTerm2's pictures are drawn over the cells and
wiped by the next text written there, so the stage repeats them.
"""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TYPE_CHECKING

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

if TYPE_CHECKING:
    from PIL import Image

QUICK_SIDE, QUICK_BYTES = 256, 96_000
"""Pictures sent while something moves: longest side in pixels, bytes as they go over the wire."""
SHARP_SIDE, SHARP_BYTES = 1024, 2_000_000
_CHUNK = 4096
_LETTER = "\U0010eeee"

# The marks that count rows and columns: every character of Unicode 6.0 that combines above its letter (class 230),
# has no decomposition and is part of none. Computed from Unicode's data; later versions have more, so it is written out.
_MARK_RANGES = """
305 30d-30e 310 312 33d-33f 346 34a-34c 350-352 357 35b 363-36f 483-487 592-595 597-599 59c-5a1 5a8-5a9
5ab-5ac 5af 5c4 610-617 657-65b 65d-65e 6d6-6dc 6df-6e2 6e4 6e7-6e8 6eb-6ec 730 732-733 735-736 73a 73d
73f-741 743 745 747 749-74a 7eb-7f1 7f3 816-819 81b-823 825-827 829-82d 951 953-954 f82-f83 f86-f87 135d-135f
17dd 193a 1a17 1a75-1a7c 1b6b 1b6d-1b73 1cd0-1cd2 1cda-1cdb 1ce0 1dc0-1dc1 1dc3-1dc9 1dcb-1dcc 1dd1-1de6 1dfe
20d0-20d1 20d4-20d7 20db-20dc 20e1 20e7 20e9 20f0 2cef-2cf1 2de0-2dff a66f a67c-a67d a6f0-a6f1 a8e0-a8f1 aab0
aab2-aab3 aab7-aab8 aabe-aabf aac1 fe20-fe26 10a0f 10a38 1d185-1d189 1d1aa-1d1ad 1d242-1d244
"""


def _marks() -> list[str]:
    found = []
    for part in _MARK_RANGES.split():
        first, _, last = part.partition("-")
        found += [chr(code) for code in range(int(first, 16), int(last or first, 16) + 1)]
    return found


MARKS = _marks()
MOST_CELLS = len(MARKS)
"""297: no picture can have more rows or columns."""


def placeholders(number: int, columns: int, rows: int) -> list[Strip]:
    """The cells that show kitty picture `number` (1 to 2**24 - 1), a strip a row.

    Row and column are written into every cell, though kitty could count on from the first: Textual cuts rows apart.
    """
    style = Style.from_color(Color.from_rgb(number >> 16, number >> 8 & 255, number & 255))
    return [Strip([Segment(text, style)], columns) for text in _placeholder_rows(columns, rows)]


@lru_cache(8)
def _placeholder_rows(columns: int, rows: int) -> list[str]:
    # The third mark is the highest byte of the number, always 0. iTerm2 takes a missing one for -1.
    ends = [mark + MARKS[0] for mark in MARKS[:columns]]
    return ["".join(_LETTER + MARKS[row] + end for end in ends) for row in range(rows)]


class KittyPictures:
    """The pictures that this program keeps in a kitty terminal: shown under a key, counted, and taken back.

    write: sends text to the terminal; tmux: commands are wrapped for it.
    """

    def __init__(self, write: Callable[[str], None], *, tmux: bool = False) -> None:
        self._write, self._tmux = write, tmux
        self.held: dict[int, Hashable] = {}
        """Number -> key of all that the terminal has of us, oldest first."""
        self._next = 1 + secrets.randbelow(2**23)  # numbers belong to the window: another program's are left alone
        self.bytes_sent = 0

    def find(self, key: Hashable) -> int | None:
        """The newest picture the terminal holds for `key`."""
        return next((number for number in reversed(self.held) if self.held[number] == key), None)

    def show(self, key: Hashable, png: bytes, columns: int, rows: int) -> int:
        """Send a picture that will fill columns x rows cells; returns its number, for `placeholders`."""
        number = self._next
        self._next = number % (2**24 - 1) + 1
        self.held[number] = key
        data = base64.b64encode(png).decode()
        head = f"a=T,U=1,q=2,f=100,i={number},c={columns},r={rows},"
        commands = []
        for start in range(0, len(data), _CHUNK):
            more = int(start + _CHUNK < len(data))
            commands.append(self._wrap(f"\x1b_G{head}m={more};{data[start : start + _CHUNK]}\x1b\\"))
            head = "q=2,"
        self._send("".join(commands))
        return number

    def delete(self, numbers: list[int]) -> None:
        """Take pictures back, their data included; numbers that are gone already are passed over."""
        gone = [number for number in numbers if self.held.pop(number, None) is not None]
        if gone:
            self._send("".join(self._wrap(f"\x1b_Ga=d,d=I,q=2,i={number}\x1b\\") for number in gone))

    def _wrap(self, command: str) -> str:
        return "\x1bPtmux;" + command.replace("\x1b", "\x1b\x1b") + "\x1b\\" if self._tmux else command

    def _send(self, text: str) -> None:
        self.bytes_sent += len(text)
        self._write(text)


def inline_picture(jpeg: bytes, x: int, y: int, columns: int, rows: int) -> str:
    """iTerm2's command that draws a picture over columns x rows cells from cell x, y (from 0), cursor left in place."""
    data = base64.b64encode(jpeg).decode()
    options = f"inline=1;size={len(jpeg)};width={columns};height={rows};preserveAspectRatio=0;doNotMoveCursor=1"
    return f"\x1b7\x1b[{y + 1};{x + 1}H\x1b]1337;File={options}:{data}\x07\x1b8"


def encode(
    draw: Callable[[tuple[int, int]], Image.Image], size: tuple[int, int], kind: str, side: int, limit: int
) -> bytes:
    """A PNG (kitty takes no JPEG) or JPEG file of what `draw(size)` gives, small enough to send.

    size: in pixels, what the cells it goes to could show; side: the longest that is sent, the terminal enlarges it;
    limit: bytes as they go over the wire, in base64. Noise does not compress, so it is sent with fewer pixels.
    """
    scale = min(1.0, side / max(size))
    while True:
        width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        file = io.BytesIO()
        if kind == "png":
            draw((width, height)).save(file, "PNG", compress_level=1)  # level 6 takes three times as long for 10 %
        else:
            draw((width, height)).save(file, "JPEG", quality=85, subsampling=0)
        data = file.getvalue()
        wire = len(data) * 4 / 3
        if wire <= limit or width == height == 1:
            return data
        scale *= 0.95 * (limit / wire) ** 0.5

"""A widget that shows a drawing as well as the terminal can: half-blocks always, pixels above them where there are any.

What is quick is shown at once: half-blocks, or a small picture. The sharp picture follows when the hand rests, encoded
on another thread, so that no key waits for it. Pixels are taken back when the widget is hidden, resized, covered by
another screen or removed, when the program is stopped with Ctrl+Z, and when it ends, be it by an exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual.geometry import Region
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from . import driver, images, pixels
from .terminal import DEFAULT_CELL, Terminal, cell_pixels, detect

if TYPE_CHECKING:
    from PIL import Image

_REST = 0.15
"""Seconds without a change after which the sharp picture is made."""
_HALF_BLOCK_BYTES, _PLACEHOLDER_BYTES = 40, 11
"""What one cell takes on the wire, roughly."""


@dataclass(frozen=True)
class Drawing:
    """What is to be seen, in how many cells."""

    key: Hashable
    """Drawings with one key are the same, and are not sent twice."""
    columns: int
    rows: int
    draw: Callable[[tuple[int, int]], Image.Image]
    """An RGB image of that width and height. Called on other threads too."""
    lasting: bool = True
    """False for what the next moment replaces: the sharp picture is not worth its bytes."""


class Canvas(Widget):
    """Shows what `paint` is given, in the middle.

    terminal, depth: what the terminal can do, found out if None. Without a terminal (tests, screenshots) it is
    half-blocks in full colour.
    """

    ALLOW_SELECT = False

    def __init__(
        self,
        *,
        terminal: Terminal | None = None,
        depth: images.Depth | None = None,
        name: str | None = None,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(name=name, id=id, classes=classes)
        self.terminal = terminal or Terminal()
        self.depth: images.Depth = depth or "truecolor"
        self.inline_bytes_sent = 0
        self._asked = terminal is None, depth is None
        self._drawing: Drawing | None = None
        self._strips: list[Strip] = []
        self._kitty: pixels.KittyPictures | None = None
        self._number: int | None = None
        """Of the kitty picture that is to be seen."""
        self._kept: tuple[Hashable, ...] = ()
        self._sharp: dict[Hashable, bytes] = {}
        self._inline: bytes | None = None
        self._inline_place: Region | None = None
        """Where an inline picture was last drawn and still stands, as far as we know."""
        self._rest: Timer | None = None
        self._inline_due = False
        self._left = False

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of a character in pixels, asked anew each time: people change the size of the font."""
        return (None if self.app.is_headless else cell_pixels()) or DEFAULT_CELL

    @property
    def takes_pixels(self) -> bool:
        return self._kitty is not None or self.terminal.pictures == "iterm"

    @property
    def bytes_sent(self) -> int:
        """Bytes of pictures sent as pixels so far; cells are not counted."""
        return self.inline_bytes_sent + (self._kitty.bytes_sent if self._kitty else 0)

    @property
    def _in_sight(self) -> bool:
        """Whether pixels may be sent: we have room (none while hidden), no dialog is on top, the terminal is ours."""
        return not self._left and bool(self.size) and self.screen is self.app.screen

    @property
    def picture_rows(self) -> int:
        """Rows of cells the drawing may take."""
        return self.size.height

    def paint(self, drawing: Drawing | None, keep: tuple[Hashable, ...] = ()) -> int:
        """Show `drawing`, or nothing; returns roughly how many bytes that takes on the wire.

        keep: keys of drawings that will be wanted back at once, as when two are flipped: the terminal keeps those.
        """
        self._drawing, self._kept = drawing, keep
        if self._rest is not None:
            self._rest.stop()
        if drawing is None or self.terminal.pictures == "none" or not self.size:
            self._strips = []
            self._forget_pixels()
            self.refresh()
            return 0
        if not self.takes_pixels or not self._in_sight:
            self._inline = self._inline_place = None
            self._strips = self._half_blocks(drawing)
            self.refresh()
            return _HALF_BLOCK_BYTES * drawing.columns * drawing.rows
        before = self.bytes_sent
        self._show_pixels(drawing, None)
        if drawing.lasting and drawing.key not in self._sharp:
            self._rest = self.set_timer(_REST, lambda: self._sharpen(drawing))
        return self.bytes_sent - before + _PLACEHOLDER_BYTES * drawing.columns * drawing.rows

    def render_line(self, y: int) -> Strip:
        base, width = self.rich_style, self.size.width
        row = y - (self.picture_rows - len(self._strips)) // 2
        if not 0 <= row < len(self._strips):
            return Strip.blank(width, base)
        if self._inline is not None and not self._inline_due:  # these cells are about to wipe it
            self._inline_due = True
            self.call_after_refresh(self._write_inline)
        strip = self._strips[row]
        if self.depth == "shades":
            strip = strip.apply_style(base)
        left = (width - strip.cell_length) // 2
        return Strip.join([Strip.blank(left, base), strip, Strip.blank(width - left - strip.cell_length, base)])

    def _half_blocks(self, drawing: Drawing) -> list[Strip]:
        size = images.samples(drawing.columns, drawing.rows, self.depth)
        return images.strips(drawing.draw(size), self.depth)

    # Pixels

    def _show_pixels(self, drawing: Drawing, sharp: bytes | None) -> None:
        """Send the drawing unless the terminal has it: `sharp` if it is there, else the small one."""
        if self._kitty is not None:
            number = None if sharp else self._kitty.find(drawing.key)
            if number is None:
                data = sharp or self._sharp.get(drawing.key) or self._encode_quick(drawing)
                number = self._kitty.show(drawing.key, data, drawing.columns, drawing.rows)
            self._number = number
            self._strips = pixels.placeholders(number, drawing.columns, drawing.rows)
            self.refresh()
            replaced = [n for n, key in self._kitty.held.items() if n != number and key not in self._kept]
            if replaced:  # only when the new cells are out, or the old picture would leave a hole for a moment
                self.call_after_refresh(self._delete, replaced)
            return
        self._inline = sharp or self._sharp.get(drawing.key) or self._encode_quick(drawing)
        self._strips = self._half_blocks(drawing)
        if self._inline_place == self._place(drawing):
            self._write_inline()  # over the old one: the half-blocks below need not flash up
        else:
            self.refresh()

    def _delete(self, numbers: list[int]) -> None:
        """Take kitty pictures back, but for those that are wanted again by now."""
        if self._kitty is not None:
            held = self._kitty.held
            self._kitty.delete([n for n in numbers if n != self._number and held.get(n) not in self._kept])

    def _sharpen(self, drawing: Drawing) -> None:
        self.run_worker(self._send_sharp(drawing), group="sharp", exclusive=True)

    async def _send_sharp(self, drawing: Drawing) -> None:
        data = await asyncio.to_thread(self._encode, drawing, pixels.SHARP_SIDE, pixels.SHARP_BYTES)
        if self._drawing is not drawing or not self._in_sight:
            return  # and not kept: what was sent of it is the small picture, and `_sharp` says that it is sharp
        self._sharp[drawing.key] = data
        for key in list(self._sharp)[:-2]:  # two, as one flips between two
            del self._sharp[key]
        self._show_pixels(drawing, data)

    def _encode_quick(self, drawing: Drawing) -> bytes:
        return self._encode(drawing, pixels.QUICK_SIDE, pixels.QUICK_BYTES)

    def _encode(self, drawing: Drawing, side: int, limit: int) -> bytes:
        size = drawing.columns * self.cell[0], drawing.rows * self.cell[1]
        return pixels.encode(drawing.draw, size, "jpeg" if self._kitty is None else "png", side, limit)

    def _forget_pixels(self) -> None:
        """Take back all that the terminal holds of us. The cells must be redrawn by whoever calls this."""
        if self._kitty is not None:
            self._kitty.delete(list(self._kitty.held))
        self._inline = self._inline_place = None

    # iTerm2's pictures lie over the cells, so they have to know where, and what else is there

    def _place(self, drawing: Drawing) -> Region:
        area = self.content_region
        left = area.x + (area.width - drawing.columns) // 2
        return Region(left, area.y + (self.picture_rows - drawing.rows) // 2, drawing.columns, drawing.rows)

    def _write_inline(self) -> None:
        self._inline_due = False
        if self._inline is None or self._drawing is None:
            return
        place = self._place(self._drawing)
        # In the last row VS Code scrolls the screen to make room.
        if (
            self._covered(place)
            or place.bottom >= self.app.size.height
            or not self.app.size.region.contains_region(place)
        ):
            self._inline_place = None
            return
        text = pixels.inline_picture(self._inline, place.x, place.y, place.width, place.height)
        self.inline_bytes_sent += len(text)
        driver.write(self.app, text)
        self._inline_place = place

    def _covered(self, place: Region) -> bool:
        """Whether something else stands on these cells, such as a toast."""
        family = {*self.ancestors_with_self, *self.walk_children()}
        return any(
            widget.visible and widget.display and widget not in family and widget.region.overlaps(place)
            for widget in self.screen.walk_children(Widget)
        )

    def _on_layout(self, _: Any) -> None:
        """Something moved, came or went: the picture is drawn again where it now stands free."""
        if self._inline is not None and self._drawing is not None and self._inline_place != self._place(self._drawing):
            self._write_inline()
        elif self._inline_place is not None and self._covered(self._inline_place):
            self._inline_place = None

    # Coming and going

    def on_mount(self) -> None:
        terminal_unknown, depth_unknown = self._asked
        if terminal_unknown and not self.app.is_headless:
            self.terminal = detect()
        if depth_unknown and not self.app.is_headless:
            system = self.app.console.color_system
            plain = self.app.no_color or system not in ("truecolor", "256")
            self.depth = "shades" if plain else "truecolor" if system == "truecolor" else "256"
        if self.terminal.pictures == "kitty" and self.depth == "truecolor":  # a picture's number is sent as a colour
            self._kitty = pixels.KittyPictures(lambda text: driver.write(self.app, text), tmux=self.terminal.tmux)
        driver.before_leaving(self.app, self._leave)
        self.app.app_resume_signal.subscribe(self, self._come_back)
        self.app.screen_change_signal.subscribe(self, self._on_screen_change, immediate=True)
        self.screen.screen_layout_refresh_signal.subscribe(self, self._on_layout)

    def on_unmount(self) -> None:
        self._forget_pixels()

    def on_hide(self) -> None:
        self._forget_pixels()

    def on_show(self) -> None:
        self.paint(self._drawing, self._kept)

    def _on_screen_change(self, screen: Any) -> None:
        """A dialog on top tints our colours, and colours are picture numbers: half-blocks until it is gone."""
        if screen is not self.screen:
            self._forget_pixels()
        self.paint(self._drawing, self._kept)

    def _leave(self) -> None:
        self._left = True
        self._forget_pixels()

    def _come_back(self, _: Any) -> None:
        self._left = False
        self.paint(self._drawing, self._kept)

"""The stage: one picture as large as there is room, zoom and pan, a second one to compare with, live previews."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from rich.cells import set_cell_size
from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.timer import Timer

from mlx_kontext.terminal import safe_text

from . import driver, images, viewport
from .canvas import Canvas, Drawing
from .pixels import MOST_CELLS
from .viewport import Stand, View

if TYPE_CHECKING:
    from PIL import Image

PREVIEW_SECONDS = 0.25
"""Least time between two previews."""
BYTES_PER_SECOND, REMOTE_BYTES_PER_SECOND = 1_000_000, 250_000
_BUSY_WRITES = 2
"""With more writes waiting than this the terminal is behind, and previews wait."""


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture on the stage. Two are the same only if they are one object, so each can stand in a Drawing's key."""

    image: Image.Image
    caption: str
    small: Image.Image | None
    """A quarter of the size, where the picture is a large photo: drawing all of it takes from this one."""

    @classmethod
    def of(cls, image: Image.Image, caption: str) -> Shown:
        flat = images.flat(image)
        return cls(flat, caption, flat.reduce(4) if flat.width * flat.height > 4_000_000 else None)

    def at(self, scale: float) -> Image.Image:
        return self.small if self.small is not None and scale <= 0.25 else self.image


class Stage(Canvas, can_focus=True):
    """Shows a picture; see `show_picture`, `show_second`, `show_preview` and the actions. Its last row is a caption."""

    DEFAULT_CSS = "Stage { width: 1fr; height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "flip", "Flip", id="stage.flip"),
        Binding("s", "split", "Split", id="stage.split"),
        Binding("plus,equals_sign", "zoom_in", "Zoom in", id="stage.zoom_in", show=False),
        Binding("minus", "zoom_out", "Zoom out", id="stage.zoom_out", show=False),
        Binding("0", "fit", "Whole picture", id="stage.fit", show=False),
        Binding("1", "actual_size", "Actual size", id="stage.actual_size", show=False),
        Binding("left", "move(-1, 0)", "Divider or picture left", id="stage.left", show=False),
        Binding("right", "move(1, 0)", "Divider or picture right", id="stage.right", show=False),
        Binding("up", "move(0, -1)", "Picture up", id="stage.up", show=False),
        Binding("down", "move(0, 1)", "Picture down", id="stage.down", show=False),
        Binding("shift+left", "pan(-1, 0)", "Picture left", id="stage.pan_left", show=False),
        Binding("shift+right", "pan(1, 0)", "Picture right", id="stage.pan_right", show=False),
    ]

    view = View()
    compare: Literal["off", "flip", "split"] = "off"
    flipped = False
    """With flip: the second picture is the one to be seen."""
    divider = 0.5
    """With split: the part of the width, from the left, that shows the second picture."""
    previews_drawn = 0

    _picture: Shown | None = None
    _second: Shown | None = None
    _preview: Shown | None = None
    _next_preview: Shown | None = None
    _preview_due = 0.0
    _preview_timer: Timer | None = None

    # What the app calls

    def show_picture(self, image: Image.Image, caption: str = "") -> None:
        """Put a picture on the stage; a preview makes room for it. The view stays, so that edits can be compared."""
        self._picture = Shown.of(image, caption)
        self.end_preview()

    def show_second(self, image: Image.Image | None, caption: str = "") -> None:
        """The picture to compare with, or None for none."""
        self._second = None if image is None else Shown.of(image, caption)
        if image is None:
            self.compare, self.flipped = "off", False
        self.redraw()

    def show_preview(self, image: Image.Image, caption: str = "") -> None:
        """Show where an edit is heading. Call it as often as you like: frames that come too fast are dropped."""
        self._next_preview = Shown.of(image, caption)
        if self._preview_timer is None:
            self._draw_preview()

    def end_preview(self) -> None:
        """Back to the picture, as when an edit was given up."""
        self._preview = self._next_preview = None
        if self._preview_timer is not None:
            self._preview_timer.stop()
            self._preview_timer = None
        self.redraw()

    def clear(self) -> None:
        """An empty stage."""
        self._picture = self._second = None
        self.view, self.compare, self.flipped = View(), "off", False
        self.end_preview()

    # Actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Comparing needs a second picture; its keys are greyed out until there is one."""
        return None if action in ("flip", "split") and self._second is None else True

    def action_zoom_in(self) -> None:
        self._zoom(viewport.ZOOM_STEP)

    def action_zoom_out(self) -> None:
        self._zoom(1 / viewport.ZOOM_STEP)

    def action_fit(self) -> None:
        """The whole picture."""
        self.view = View()
        self.redraw()

    def action_actual_size(self) -> None:
        """One picture pixel for each pixel of the terminal, or for each half-block where those are all it has."""
        if (front := self._front) is not None:
            self.view = viewport.actual(self.view, self._actual_scale, front.image.size, self._stand)
            self.redraw()

    def action_pan(self, right: int, down: int) -> None:
        """Move by an eighth of what is seen."""
        self._pan(right / 8, down / 8)

    def action_move(self, right: int, down: int) -> None:
        """Move the divider where there is one, else the picture."""
        if self._split and right:
            self._divide(self.divider + right / 20)
        else:
            self.action_pan(right, down)

    def action_flip(self) -> None:
        """The other picture in the same place."""
        if self._second is not None:
            before = self._drawing.key if self._drawing else None
            self.compare, self.flipped = "flip", not self.flipped
            self.redraw(keep=(before,))

    def action_split(self) -> None:
        """Both pictures with a divider between them; again for the picture alone."""
        if self._second is not None:
            self.compare = "off" if self.compare == "split" else "split"
            self.flipped = False
            self.redraw()

    def _zoom(self, factor: float) -> None:
        if (front := self._front) is not None:
            self.view = viewport.zoomed(self.view, factor, front.image.size, self._stand)
            self.redraw()

    def _pan(self, right: float, down: float) -> None:
        if (front := self._front) is not None:
            self.view = viewport.panned(self.view, right, down, front.image.size, self._stand)
            self.redraw()

    def _divide(self, divider: float) -> None:
        self.divider = min(max(divider, 0.0), 1.0)
        self.redraw()

    # Drawing

    @property
    def picture_rows(self) -> int:
        return max(1, self.size.height - 1)

    @property
    def _front(self) -> Shown | None:
        """The picture in front, which is the measure of the view."""
        return self._preview or (self._second if self.flipped else self._picture)

    @property
    def _split(self) -> bool:
        return self.compare == "split" and None not in (self._picture, self._second) and self._preview is None

    @property
    def _stand(self) -> Stand:
        columns, rows = max(1, self.size.width), self.picture_rows
        return Stand(min(columns, MOST_CELLS), min(rows, MOST_CELLS), self.cell)

    @property
    def _actual_scale(self) -> float:
        return 1.0 if self.takes_pixels else float(self.cell[0])

    def redraw(self, keep: tuple[object, ...] = ()) -> int:
        """Draw what is to be seen; returns roughly how many bytes that took."""
        front, stand = self._front, self._stand
        self.refresh_bindings()
        if front is None:
            return self.paint(None)
        window = viewport.look(self.view, front.image.size, stand)
        shown = (front, self._second) if self._split and self._second else (front,)
        divider = self.divider if len(shown) == 2 else None
        pictures = tuple(one.at(window.scale) for one in shown)
        draw = partial(viewport.draw, pictures, self.view, stand, divider)
        key = (shown, self.view, stand, divider)
        self.refresh(Region(0, self.size.height - 1, self.size.width, 1))  # an inline picture is replaced without it
        return self.paint(Drawing(key, window.columns, window.rows, draw, lasting=front is not self._preview), keep)

    def render_line(self, y: int) -> Strip:
        if y < self.size.height - 1 or self.size.height < 2:
            return super().render_line(y)
        width = self.size.width
        return Strip([Segment(set_cell_size(self.caption(), width), self.rich_style)], width)

    def caption(self) -> str:
        """The last row: what the pictures are called, as plain text whatever stands in it, and how large it is seen."""
        front = self._front
        if front is None:
            return ""
        parts = [front.caption]
        if self._split and self._second is not None:
            parts.insert(0, self._second.caption)
        if self.terminal.pictures == "none":
            parts.append(f"{front.image.width} × {front.image.height}, pictures are off: {self.terminal.reason}")
        elif self.view.zoom != 1:
            scale = viewport.look(self.view, front.image.size, self._stand).scale
            parts.append(f"{100 * scale / self._actual_scale:.0f} %")
        return safe_text(" │ ".join(part for part in parts if part)).replace("\n", " ")

    # Previews

    def _draw_preview(self) -> None:
        """Draw the newest frame if it is due and the terminal keeps up, else look again later."""
        wait = self._preview_due - time.monotonic()
        if driver.backlog(self.app) > _BUSY_WRITES:
            wait = max(wait, PREVIEW_SECONDS)
        if wait > 0.01:  # a timer of 0 seconds never fires
            self._preview_timer = self.set_timer(wait, self._draw_preview)
            return
        self._preview_timer = None
        self._preview, self._next_preview = self._next_preview, None
        self.previews_drawn += 1
        rate = REMOTE_BYTES_PER_SECOND if self.terminal.remote else BYTES_PER_SECOND
        self._preview_due = time.monotonic() + max(PREVIEW_SECONDS, self.redraw() / rate)

    # Events

    def on_resize(self) -> None:
        self.redraw()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.action_zoom_in()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.action_zoom_out()

    def on_mouse_down(self) -> None:
        self.capture_mouse()

    def on_mouse_up(self) -> None:
        self.release_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drag the divider, or the picture."""
        if self.app.mouse_captured is not self or self._drawing is None:
            return
        columns, rows = self._drawing.columns, self._drawing.rows
        if self._split:
            self._divide((event.x - (self.size.width - columns) // 2 + 0.5) / columns)
        else:
            self._pan(-event.delta_x / columns, -event.delta_y / rows)

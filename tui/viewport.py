"""Which part of a picture is on the stage: fit, zoom, pan, and two pictures side by side. Numbers only, no drawing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

ZOOM_STEP = 1.5
_DIVIDER = (255, 140, 0)
_LEAST_SEEN = 4.0
"""Zooming in stops where this many picture pixels are left across."""


@dataclass(frozen=True)
class View:
    """Where one looks, independent of the picture's size, so that a preview or a second picture is seen alike."""

    zoom: float = 1.0
    """1 is the whole picture as large as the stage allows."""
    x: float = 0.5
    y: float = 0.5
    """The point of the picture in the middle of the stage, 0 … 1."""


@dataclass(frozen=True)
class Window:
    """The part of one picture that is drawn, and the cells it takes."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom in pixels of the picture."""
    columns: int
    rows: int
    scale: float
    """Terminal pixels per picture pixel."""


@dataclass(frozen=True)
class Stand:
    """What a picture stands on: the stage's cells, and a cell's pixels (width, height)."""

    columns: int
    rows: int
    cell: tuple[int, int]


def fit_scale(size: tuple[int, int], stand: Stand) -> float:
    """Terminal pixels per picture pixel at which a picture of `size` (width, height) just fits."""
    return min(stand.columns * stand.cell[0] / size[0], stand.rows * stand.cell[1] / size[1])


def look(view: View, size: tuple[int, int], stand: Stand) -> Window:
    """The window that shows `view` of a picture of `size` (width, height), no larger than the stage."""
    scale = fit_scale(size, stand) * view.zoom
    cells, seen, starts = [], [], []
    for length, middle, available, pixels in zip(
        size, (view.x, view.y), (stand.columns, stand.rows), stand.cell, strict=True
    ):
        count = max(1, min(available, round(length * scale / pixels)))
        part = min(length, count * pixels / scale)
        if count < available:  # rounding to whole cells must not cut off the picture's edge
            part = length
        cells.append(count)
        seen.append(part)
        starts.append(min(max(middle * length - part / 2, 0.0), length - part))
    box = (starts[0], starts[1], starts[0] + seen[0], starts[1] + seen[1])
    return Window(box, cells[0], cells[1], scale)


def zoomed(view: View, factor: float, size: tuple[int, int], stand: Stand) -> View:
    """`view` enlarged by `factor` about its middle: no smaller than the whole picture, no larger than a few pixels."""
    most = max(1.0, stand.columns * stand.cell[0] / (_LEAST_SEEN * fit_scale(size, stand)))
    zoom = min(max(view.zoom * factor, 1.0), most)
    return View() if zoom < 1.01 else _settled(replace(view, zoom=zoom), size, stand)


def panned(view: View, right: float, down: float, size: tuple[int, int], stand: Stand) -> View:
    """`view` moved by parts of what is seen: panned(view, 0.25, 0, ...) goes right by a quarter of the window."""
    left, top, end, bottom = look(view, size, stand).box
    moved = replace(view, x=view.x + right * (end - left) / size[0], y=view.y + down * (bottom - top) / size[1])
    return _settled(moved, size, stand)


def actual(view: View, pixels: float, size: tuple[int, int], stand: Stand) -> View:
    """`view` at `pixels` terminal pixels per picture pixel; the whole picture where that is smaller than the stage."""
    return zoomed(replace(view, zoom=pixels / fit_scale(size, stand)), 1.0, size, stand)


def _settled(view: View, size: tuple[int, int], stand: Stand) -> View:
    """`view` with its middle where the window really is, so that going back from an edge moves at the first key."""
    left, top, right, bottom = look(view, size, stand).box
    return replace(view, x=(left + right) / 2 / size[0], y=(top + bottom) / 2 / size[1])


def draw(
    pictures: tuple[Image.Image, ...], view: View, stand: Stand, divider: float | None, size: tuple[int, int]
) -> Image.Image:
    """The window as an RGB image of exactly `size`.

    pictures: RGB, one or two; divider: with two, the part of the width (0 … 1) that the second takes on the left.
    """
    from PIL import ImageDraw

    first = _part(pictures[0], look(view, pictures[0].size, stand).box, size)
    if divider is None or len(pictures) < 2:
        return first
    cut = round(divider * size[0])
    second = _part(pictures[1], look(view, pictures[1].size, stand).box, size)
    first.paste(second.crop((0, 0, cut, size[1])), (0, 0))
    line = max(1, size[0] // 400)
    ImageDraw.Draw(first).rectangle((cut, 0, cut + line - 1, size[1]), fill=_DIVIDER)
    return first


def _part(picture: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """BOX averages where it shrinks and shows square pixels where it enlarges much, as a magnifier should."""
    from PIL import Image

    enlarged = size[0] / (box[2] - box[0])
    how = Image.Resampling.BICUBIC if 1 < enlarged <= 3 else Image.Resampling.BOX
    return picture.resize(size, how, box=box, reducing_gap=2.0)

"""A picture as rows of text: two pixels a cell in full colour or 256 dithered ones, or shades where there are no colours.

Pillow does the arithmetic. numpy would be no quicker here, measured, and takes 50 to 190 ms to import.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from rich.color import Color, ColorSystem, ColorType
from rich.color_triplet import ColorTriplet
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

if TYPE_CHECKING:
    from PIL import Image

Depth = Literal["truecolor", "256", "shades"]

_UPPER_HALF = "▀"
_SHADES = " ░▒▓█"
# Six bits a channel: no eye tells the difference in a half-block, and styles repeat often enough to be cached.
_SIX_BITS = [value & 0xFC | value >> 6 for value in range(256)] * 3


def samples(columns: int, rows: int, depth: Depth) -> tuple[int, int]:
    """Width and height of the image that `strips` wants for that many cells."""
    return (columns, rows) if depth == "shades" else (columns, 2 * rows)


def strips(image: Image.Image, depth: Depth) -> list[Strip]:
    """One strip for each row of cells, from an RGB image of the size that `samples` names.

    Shades carry no colours: more ink is brighter, which is right on a dark background.
    """
    if depth == "shades":
        return _shade_strips(image)
    if depth == "256":
        return _half_blocks(_dither(image))
    return _half_blocks(image.point(_SIX_BITS))


def _half_blocks(image: Image.Image) -> list[Strip]:
    """Two rows of pixels make one of cells: the upper is the letter's colour, the lower its background."""
    width, height = image.size
    data, stride = image.tobytes(), 3 * width
    found = []
    for start in range(0, stride * height, 2 * stride):
        upper, lower = data[start : start + stride], data[start + stride : start + 2 * stride]
        segments, last, count = [], b"", 0
        for offset in range(0, stride, 3):
            pair = upper[offset : offset + 3] + lower[offset : offset + 3]
            if pair == last:
                count += 1
                continue
            if count:
                segments.append(Segment(_UPPER_HALF * count, _pair_style(last)))
            last, count = pair, 1
        segments.append(Segment(_UPPER_HALF * count, _pair_style(last)))
        found.append(Strip(segments, width))
    return found


@lru_cache(32768)
def _pair_style(pair: bytes) -> Style:
    # Not Color.from_rgb: it formats a name for every colour, which takes longer than all the rest.
    upper, lower = ColorTriplet(*pair[:3]), ColorTriplet(*pair[3:])
    return Style.from_color(
        Color("", ColorType.TRUECOLOR, triplet=upper), Color("", ColorType.TRUECOLOR, triplet=lower)
    )


@cache
def palette() -> list[tuple[int, int, int]]:
    """The xterm colours 16 to 255 that Rich, which writes them to the terminal, turns into themselves and no other."""
    colours = dict.fromkeys(_xterm(number) for number in range(16, 256))
    return [colour for colour in colours if _xterm(_rich_number(colour)) == colour]


def _rich_number(colour: tuple[int, int, int]) -> int:
    number = Color.from_rgb(*colour).downgrade(ColorSystem.EIGHT_BIT).number
    assert number is not None
    return number


def _xterm(number: int) -> tuple[int, int, int]:
    """The colour with that number in xterm's cube or ramp of greys (16 to 255)."""
    if number >= 232:
        return (8 + 10 * (number - 232),) * 3
    levels = (0, 95, 135, 175, 215, 255)
    cube = number - 16
    return levels[cube // 36], levels[cube // 6 % 6], levels[cube % 6]


@cache
def _palette_image(greys: int = 0) -> Image.Image:
    """What Image.quantize wants: the 256 colours above, or `greys` even steps from black to white."""
    from PIL import Image

    colours = [(255 * i // (greys - 1),) * 3 for i in range(greys)] if greys else palette()
    colours = [*colours, *colours[:1] * (256 - len(colours))]
    image = Image.new("P", (1, 1))
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def _dither(image: Image.Image) -> Image.Image:
    """Floyd–Steinberg to the 256 colours; the nearest colour alone bands badly (mean local error 9.8 against 1.4)."""
    from PIL import Image

    return image.quantize(palette=_palette_image(), dither=Image.Dither.FLOYDSTEINBERG).convert("RGB")


def _shade_strips(image: Image.Image) -> list[Strip]:
    from PIL import Image

    grey = image.convert("L").convert("RGB")
    quantized = grey.quantize(palette=_palette_image(len(_SHADES)), dither=Image.Dither.FLOYDSTEINBERG)
    width, height = image.size
    text = quantized.tobytes().decode("latin-1").translate(dict(enumerate(_SHADES)))
    return [Strip([Segment(text[y * width : (y + 1) * width], Style())], width) for y in range(height)]


def flat(image: Image.Image) -> Image.Image:
    """`image` as RGB, what is transparent in it on white, as the edits see it."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

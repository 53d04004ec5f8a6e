"""The demo model's whole world: scenes of shapes, drawn and described, and edits of them in words.

A scene is a grid of cells of 32 pixels on one background colour; a cell holds a shape or nothing, each kind is there at most
once. Training (`assets/demo/train.py`) and tests draw from here, with different seeds. Everything is seeded.
"""

import dataclasses
import functools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

PALETTE = {
    "red": (220, 38, 38),
    "green": (34, 160, 60),
    "blue": (37, 80, 225),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 190),
    "orange": (245, 130, 25),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "pink": (245, 140, 190),
    "cyan": (60, 205, 225),
}
KINDS = ("circle", "square", "triangle", "star")
CELL = 32
GRIDS = ((2, 2), (2, 3), (3, 2), (3, 3))  # rows, columns
R = 10  # pixels, of a shape that an instruction adds

OPERATIONS = ("recolor", "remove", "background", "swap", "add")
PHRASES = {
    "recolor": (
        "make {it} {colour}",
        "paint {it} {colour}",
        "turn {it} {colour}",
        "recolor {it} to {colour}",
        "change {it} to {colour}",
        "change the color of {it} to {colour}",
        "set the color of {it} to {colour}",
        "change the colour of {it} to {colour}",
        "recolour {it} to {colour}",
        "color {it} {colour}",
    ),
    "remove": (
        "remove {it}",
        "delete {it}",
        "erase {it}",
        "take away {it}",
        "get rid of {it}",
    ),
    "background": (
        "make the background {colour}",
        "set the background to {colour}",
        "change the background to {colour}",
        "paint the background {colour}",
        "turn the background {colour}",
        "change the background color to {colour}",
    ),
    "swap": (
        "turn {it} into a {new}",
        "change {it} into a {new}",
        "replace {it} with a {new}",
        "swap {it} for a {new}",
        "make {it} a {new}",
    ),
    "add": (
        "add {a} {colour} {new} in the {place}",
        "put {a} {colour} {new} in the {place}",
        "draw {a} {colour} {new} in the {place}",
        "place {a} {colour} {new} in the {place}",
        "add {a} {colour} {new} at the {place}",
    ),
    "add anywhere": (  # the first free cell in reading order
        "add {a} {colour} {new}",
        "draw {a} {colour} {new}",
        "add {a} {colour} {new} to the picture",
        "put {a} {colour} {new} in the picture",
    ),
    "generate": (
        "{shapes} on {a} {colour} background",
        "a picture of {shapes} on {a} {colour} background",
        "{shapes} on {colour}",
    ),
}
WORDS = {  # other words for the same
    "circle": "disc",
    "square": "box",
    "purple": "violet",
    "cyan": "turquoise",
    "top": "upper",
    "bottom": "lower",
    "middle": "center",
}
ENDINGS = (".", ".", ".", "!", ", please", ", please.", ", keep everything else the same")


@dataclass(frozen=True)
class Shape:
    """kind and colour by name; rgb as drawn; cell: (row, column); centre and size in pixels."""

    kind: str
    colour: str
    rgb: tuple[int, ...]
    cell: tuple[int, int]
    x: float
    y: float
    r: float

    @staticmethod
    def added(kind: str, colour: str, cell: tuple[int, int]) -> "Shape":
        """A shape as an instruction makes it: the palette's colour, in the middle of its cell."""
        return Shape(kind, colour, PALETTE[colour], cell, CELL * (cell[1] + 0.5), CELL * (cell[0] + 0.5), R)


@dataclass(frozen=True)
class Scene:
    """A background colour and shapes on a grid of `rows` x `columns` cells of 32 pixels."""

    colour: str
    rgb: tuple[int, ...]
    shapes: tuple[Shape, ...]
    rows: int = 2
    columns: int = 2

    @property
    def cells(self) -> list[tuple[int, int]]:
        """All cells in reading order."""
        return [(row, column) for row in range(self.rows) for column in range(self.columns)]

    @property
    def free(self) -> list[tuple[int, int]]:
        taken = {shape.cell for shape in self.shapes}
        return [cell for cell in self.cells if cell not in taken]

    def pixels(self) -> np.ndarray:
        """The picture, antialiased: [H, W, 3] uint8."""
        pixels = np.empty((self.rows * CELL, self.columns * CELL, 3), np.float32)
        pixels[:] = self.rgb
        for shape in self.shapes:
            place, cover = window(shape), patch(shape)[..., None]
            pixels[place] += (np.array(shape.rgb, np.float32) - pixels[place]) * cover
        return pixels.round().astype(np.uint8)

    def render(self) -> Image.Image:
        return Image.fromarray(self.pixels())

    def cover(self, shape: Shape) -> np.ndarray:
        """How much of each pixel a shape covers: [H, W], 0 … 1."""
        cover = np.zeros((self.rows * CELL, self.columns * CELL), np.float32)
        cover[window(shape)] = patch(shape)
        return cover

    def find(self, kind: str) -> Shape:
        (shape,) = [shape for shape in self.shapes if shape.kind == kind]
        return shape

    def becomes(self, *shapes: Shape) -> "Scene":
        return dataclasses.replace(self, shapes=shapes)


@dataclass(frozen=True)
class Edit:
    """One instruction: `source` becomes `target`.

    operation: one of OPERATIONS, or "generate", whose source is not used. kind: the shape it is about ("" for the
    background); new_kind: what a swap makes of it; colour: the colour asked for, or that of the shape swapped or removed.
    """

    operation: str
    prompt: str
    source: Scene
    target: Scene
    kind: str
    new_kind: str = ""
    colour: str = ""


def window(shape: Shape) -> tuple[slice, slice]:
    """The pixels of a shape's cell."""
    row, column = shape.cell
    return slice(CELL * row, CELL * (row + 1)), slice(CELL * column, CELL * (column + 1))


def patch(shape: Shape) -> np.ndarray:
    """How much of each pixel of its cell a shape covers: [32, 32], half at its edge."""
    rows, columns = window(shape)
    return _patch(shape.kind, shape.x - columns.start, shape.y - rows.start, shape.r)


@functools.lru_cache(maxsize=4096)
def _patch(kind: str, x: float, y: float, r: float) -> np.ndarray:
    across = np.arange(CELL, dtype=np.float32) + 0.5
    cover: np.ndarray = np.clip(0.5 - distance(kind, across - x, across[:, None] - y, r), 0, 1)
    cover.flags.writeable = False
    return cover


def distance(kind: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Pixels from a point (y downwards) to the edge of a shape of size `r` around (0, 0), negative inside."""
    if kind == "circle":
        return np.hypot(x, y) - r
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if kind == "triangle":  # equilateral, a little below its middle
        return np.maximum(y - 0.8 * r, (math.sqrt(3) * np.abs(x) - y - 1.06 * r) / 2)
    # A star is ten times the same edge, from a tip (0, 1.2) to a notch (0.58 at 36 degrees): fold the plane onto it.
    turn = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + turn / 2) % turn - turn / 2)
    tip, notch = (1.2, 0.0), (0.58 * math.cos(turn / 2), 0.58 * math.sin(turn / 2))
    along = (notch[0] - tip[0], notch[1] - tip[1])
    radius = np.hypot(x, y)
    from_tip = (radius * np.cos(angle) - tip[0] * r, radius * np.sin(angle))
    return (from_tip[1] * -along[0] + from_tip[0] * along[1]) / math.hypot(*along)


def jittered(draw: random.Random, colour: str) -> tuple[int, ...]:
    """A palette colour as a picture has it: off by up to 12."""
    return tuple(min(255, max(0, value + draw.randint(-12, 12))) for value in PALETTE[colour])


def random_scene(draw: random.Random, grid: tuple[int, int] = (2, 2), most: int = 3) -> Scene:
    """One to `most` shapes of different kinds and colours, somewhere in their cells."""
    rows, columns = grid
    background, *colours = draw.sample(list(PALETTE), 5)
    scene = Scene(background, jittered(draw, background), (), rows, columns)
    count = draw.randint(1, most)
    shapes = []
    for (row, column), kind, colour in zip(
        draw.sample(scene.cells, count), draw.sample(KINDS, count), colours, strict=False
    ):
        x, y = (CELL * (side + 0.5) + draw.uniform(-2, 2) for side in (column, row))
        shapes.append(Shape(kind, colour, jittered(draw, colour), (row, column), x, y, draw.uniform(8, 11)))
    return scene.becomes(*shapes)


def place_name(cell: tuple[int, int], scene: Scene) -> str:
    """How an instruction calls a cell: "top left", "middle right", "middle"."""
    down = ("top", "bottom") if scene.rows == 2 else ("top", "middle", "bottom")
    along = ("left", "right") if scene.columns == 2 else ("left", "middle", "right")
    return " ".join(dict.fromkeys([down[cell[0]], along[cell[1]]]))


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def describe(draw: random.Random, edit: Edit, plain: bool = True) -> str:
    """An instruction for the edit, in the words of PHRASES alone or as people write it."""
    words = {"colour": edit.colour, "new": edit.new_kind, "a": article(edit.colour)}
    if draw.random() < 0.1:
        words["a"] = "a"  # as many write it, "a orange star"
    form = edit.operation
    if form in ("recolor", "remove", "swap"):
        old = edit.source.find(edit.kind).colour
        words["it"] = f"the {old} {edit.kind}" if draw.random() < 0.3 else f"the {edit.kind}"
    if form == "generate":
        named = [f"{article(s.colour)} {s.colour} {s.kind}" for s in edit.target.shapes]
        words["shapes"] = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    if form == "add":
        cell, words["new"] = edit.target.find(edit.kind).cell, edit.kind
        words["place"] = place_name(cell, edit.target)
        if "middle" not in words["place"] and draw.random() < 0.3:
            words["place"] += " corner"
        if cell == edit.source.free[0] and draw.random() < 0.6:
            form = "add anywhere"
    prompt = draw.choice(PHRASES[form]).format(**words)
    return prompt if plain else spoken(draw, prompt, edit.operation)


def spoken(draw: random.Random, text: str, operation: str) -> str:
    """The same as people write it: other words, a full stop, politeness."""
    text = " ".join(WORDS[word] if word in WORDS and draw.random() < 0.08 else word for word in text.split())
    if operation == "generate":
        return text + draw.choice(("", "", "."))
    if draw.random() < 0.04:
        text = "please " + text
    return text + (draw.choice(ENDINGS) if draw.random() < 0.3 else "")


def random_edit(draw: random.Random, operation: str, scene: Scene, colour: str = "", plain: bool = True) -> Edit | None:
    """An edit of that operation on `scene`; None if the scene has no room for it, or not with the colour asked for."""
    absent = [kind for kind in KINDS if kind not in {s.kind for s in scene.shapes}]
    chosen = [s for s in scene.shapes if operation == "recolor" or colour in ("", s.colour)]
    if (operation in ("recolor", "remove", "swap") and not chosen) or (operation in ("add", "swap") and not absent):
        return None
    if operation in ("remove", "swap"):
        shape = draw.choice(chosen)
        new = draw.choice(absent) if operation == "swap" else ""
        others = [s for s in scene.shapes if s is not shape]
        target = scene.becomes(*others, *([dataclasses.replace(shape, kind=new)] if new else []))
        edit = Edit(operation, "", scene, target, shape.kind, new, shape.colour)
        return dataclasses.replace(edit, prompt=describe(draw, edit, plain))
    about, taken = "", {scene.colour}
    if operation == "recolor":
        shape = draw.choice(chosen)
        about, taken = shape.kind, taken | {shape.colour}
    if operation == "background":
        taken |= {s.colour for s in scene.shapes}
    if colour in taken or (operation == "add" and not scene.free):
        return None
    colour = colour or draw.choice([c for c in PALETTE if c not in taken])
    if operation == "background":
        target = dataclasses.replace(scene, colour=colour, rgb=PALETTE[colour])
    elif operation == "recolor":
        others = [s for s in scene.shapes if s is not shape]
        target = scene.becomes(*others, dataclasses.replace(shape, colour=colour, rgb=PALETTE[colour]))
    else:
        about = draw.choice(absent)
        cell = scene.free[0] if draw.random() < 0.4 else draw.choice(scene.free)
        target = scene.becomes(*scene.shapes, Shape.added(about, colour, cell))
    edit = Edit(operation, "", scene, target, about, "", colour)
    return dataclasses.replace(edit, prompt=describe(draw, edit, plain))


def random_generation(draw: random.Random, grid: tuple[int, int] = (2, 2), count: int = 1, plain: bool = True) -> Edit:
    """A picture from nothing: `count` shapes in the first cells in reading order, as they are named."""
    rows, columns = grid
    background, *colours = draw.sample(list(PALETTE), 1 + count)
    scene = Scene(background, PALETTE[background], (), rows, columns)
    kinds = draw.sample(KINDS, count)
    target = scene.becomes(*(Shape.added(kind, colours[i], scene.cells[i]) for i, kind in enumerate(kinds)))
    edit = Edit("generate", "", scene, target, "", "", background)
    return dataclasses.replace(edit, prompt=describe(draw, edit, plain))


def draw_edit(draw: random.Random, operation: str, grid: tuple[int, int] = (2, 2), colour: str = "") -> Edit:
    """An edit of that operation, and colour if one is given, on a scene that has room for it."""
    while True:
        if edit := random_edit(draw, operation, random_scene(draw, grid), colour):
            return edit


def edits(count: int, seed: int, grids: Iterable[tuple[int, int]] = GRIDS) -> Iterator[Edit]:
    """`count` edits, operations, colours and grids in turn; the same ones for the same seed."""
    draw = random.Random(seed)
    grids = list(grids)
    for i in range(count):
        operation = OPERATIONS[i % len(OPERATIONS)]
        colour = list(PALETTE)[i // len(OPERATIONS) % len(PALETTE)]
        yield draw_edit(draw, operation, grids[i // len(OPERATIONS) // len(PALETTE) % len(grids)], colour)

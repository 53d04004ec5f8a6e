"""Shape scenes and the edits the demo model was trained on, drawn and described; seeded, so that a test can fix a set.

A scene is a grid of cells on one background colour; one to three cells hold a shape, each kind at most once.
"""

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

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
_FINE = 8  # shapes are drawn so many times larger and averaged down

PHRASES = {
    "recolor": (
        "make the {kind} {colour}",
        "paint the {kind} {colour}",
        "recolor the {kind} to {colour}",
        "change the color of the {kind} to {colour}",
        "change the {kind} to {colour}",
        "turn the {kind} {colour}",
        "make the {old} {kind} {colour}",
    ),
    "remove": (
        "remove the {kind}",
        "delete the {kind}",
        "erase the {kind}",
        "take away the {kind}",
        "remove the {old} {kind}",
    ),
    "background": (
        "make the background {colour}",
        "set the background to {colour}",
        "change the background to {colour}",
    ),
    "swap": ("turn the {kind} into a {new}", "change the {kind} into a {new}", "turn the {old} {kind} into a {new}"),
    # a place is always named: without one the sentence has several right answers
    "add": (
        "add a {colour} {new} in the {place}",
        "put a {colour} {new} in the {place}",
        "draw a {colour} {new} in the {place}",
    ),
}
PLACES = {(0, 0): "top left", (0, 1): "top right", (1, 0): "bottom left", (1, 1): "bottom right"}
# Never a result in the demo model's training: a colour and kind it composes fairly well, a pink background not at all.
UNTRAINED = {
    ("circle", "purple"),
    ("square", "orange"),
    ("triangle", "cyan"),
    ("star", "yellow"),
    ("background", "pink"),
}


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


@dataclass(frozen=True)
class Scene:
    """A background colour and shapes on a grid of `rows` x `columns` cells of 32 pixels."""

    colour: str
    rgb: tuple[int, ...]
    shapes: tuple[Shape, ...]
    rows: int = 2
    columns: int = 2

    def render(self) -> Image.Image:
        """The picture, antialiased."""
        pixels = np.empty((self.rows * CELL, self.columns * CELL, 3))
        pixels[:] = self.rgb
        for shape in self.shapes:
            cover = self.cover(shape)[..., None]
            pixels = pixels * (1 - cover) + np.array(shape.rgb) * cover
        return Image.fromarray(pixels.round().astype(np.uint8))

    def cover(self, shape: Shape) -> np.ndarray:
        """How much of each pixel a shape covers: [H, W], 0 … 1."""
        image = Image.new("L", (self.columns * CELL * _FINE, self.rows * CELL * _FINE))
        points = [
            ((shape.x + px * shape.r) * _FINE, (shape.y + py * shape.r) * _FINE) for px, py in outline(shape.kind)
        ]
        ImageDraw.Draw(image).polygon(points, fill=255)
        return np.asarray(image.reduce(_FINE), float) / 255

    def find(self, kind: str) -> Shape:
        (shape,) = [shape for shape in self.shapes if shape.kind == kind]
        return shape


@dataclass(frozen=True)
class Edit:
    """One instruction: `source` becomes `target`; `kind` is the shape it is about ("" for the background)."""

    operation: str
    prompt: str
    source: Scene
    target: Scene
    kind: str
    new_kind: str = ""
    colour: str = ""


def outline(kind: str) -> list[tuple[float, float]]:
    """The corners of a shape of size 1 around (0, 0), y downwards."""
    if kind == "circle":
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64, endpoint=False)]
    if kind == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if kind == "triangle":
        return [(0, -1.06), (1.075, 0.8), (-1.075, 0.8)]
    radii = [1.2, 0.58] * 5
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]


def jittered(draw: random.Random, colour: str) -> tuple[int, ...]:
    """A palette colour as a source has it: off by up to 12."""
    return tuple(min(255, max(0, value + draw.randint(-12, 12))) for value in PALETTE[colour])


def random_scene(draw: random.Random) -> Scene:
    background, *colours = draw.sample(list(PALETTE), 4)
    cells = draw.sample(list(PLACES), draw.randint(1, 3))
    shapes = []
    for (row, column), kind, colour in zip(cells, draw.sample(KINDS, len(cells)), colours, strict=False):
        x, y = (CELL * (side + 0.5) + draw.uniform(-2, 2) for side in (column, row))
        shapes.append(Shape(kind, colour, jittered(draw, colour), (row, column), x, y, draw.uniform(8, 11)))
    return Scene(background, jittered(draw, background), tuple(shapes))


def random_edit(draw: random.Random, operation: str) -> Edit | None:
    """An edit of that operation on a fresh scene; None if the scene has no room for it or training never saw its result."""
    scene = random_scene(draw)
    shape = draw.choice(scene.shapes)
    used = {scene.colour, *(s.colour for s in scene.shapes)}
    colour = draw.choice([c for c in PALETTE if c not in used])
    absent = draw.choice([k for k in KINDS if k not in {s.kind for s in scene.shapes}])
    cell = draw.choice([c for c in PLACES if c not in {s.cell for s in scene.shapes}])
    phrase = draw.choice(PHRASES[operation])
    prompt = phrase.format(kind=shape.kind, old=shape.colour, colour=colour, new=absent, place=PLACES[cell])
    others = tuple(s for s in scene.shapes if s is not shape)

    def becomes(*changed: Shape) -> Scene:
        return dataclasses.replace(scene, shapes=(*others, *changed))

    if operation == "recolor":
        result, about = (shape.kind, colour), shape.kind
        target = becomes(dataclasses.replace(shape, colour=colour, rgb=PALETTE[colour]))
    elif operation == "remove":
        result, about, target = ("", ""), shape.kind, becomes()
    elif operation == "background":
        result, about = ("background", colour), ""
        target = dataclasses.replace(scene, colour=colour, rgb=PALETTE[colour])
    elif operation == "swap":
        result, about, target = (absent, shape.colour), shape.kind, becomes(dataclasses.replace(shape, kind=absent))
    else:
        result, about = (absent, colour), absent
        added = Shape(absent, colour, PALETTE[colour], cell, CELL * (cell[1] + 0.5), CELL * (cell[0] + 0.5), 10)
        target = becomes(shape, added)
    if result in UNTRAINED:
        return None
    return Edit(operation, prompt, scene, target, about, absent if operation == "swap" else "", colour)


def edits(count: int, seed: int) -> Iterator[Edit]:
    """`count` edits, the operations in turn; the same ones for the same seed."""
    draw = random.Random(seed)
    operations = list(PHRASES)
    for i in range(count):
        edit = None
        while edit is None:
            edit = random_edit(draw, operations[i % len(operations)])
        yield edit

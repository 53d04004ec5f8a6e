"""The judge's own test: right pictures pass, each kind of wrong picture is caught, for the right reason."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from judge import judge
from PIL import Image, ImageFilter
from scenes import GRIDS, KINDS, OPERATIONS, PALETTE, Edit, Scene, Shape, edits, random_generation, spoken

RED_CIRCLE = Shape("circle", "red", (225, 30, 45), (0, 0), 16.5, 15.0, 9.5)
BLUE_SQUARE = Shape("square", "blue", (30, 85, 220), (1, 1), 47.0, 48.5, 10)
SCENE = Scene("yellow", (240, 220, 45), (RED_CIRCLE, BLUE_SQUARE))


def with_circle(**changes: object) -> Scene:
    return replace(SCENE, shapes=(BLUE_SQUARE, replace(RED_CIRCLE, **changes)))


STAR = Shape("star", "pink", PALETTE["pink"], (0, 1), 48, 16, 10)
EDITS = {
    "recolor": Edit("recolor", "", SCENE, with_circle(colour="green", rgb=PALETTE["green"]), "circle", colour="green"),
    "remove": Edit("remove", "", SCENE, replace(SCENE, shapes=(BLUE_SQUARE,)), "circle"),
    "background": Edit("background", "", SCENE, replace(SCENE, colour="cyan", rgb=PALETTE["cyan"]), "", colour="cyan"),
    "swap": Edit("swap", "", SCENE, with_circle(kind="triangle"), "circle", "triangle"),
    "add": Edit("add", "", SCENE, replace(SCENE, shapes=(*SCENE.shapes, STAR)), "star", colour="pink"),
}


def softened(image: Image.Image) -> Image.Image:
    """What an autoencoder does to a right picture: a little blur, a little noise, a slight tint."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), float)
    noise = np.random.default_rng(0).normal(0, 4, pixels.shape)
    return Image.fromarray((pixels + noise + [3, -3, 2]).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("operation", EDITS)
def test_right_pictures_pass(operation: str) -> None:
    edit = EDITS[operation]
    for output in (edit.target.render(), softened(edit.target.render())):
        assert judge(edit, edit.source.render(), output).complaints == ()


def test_every_drawn_edit_is_right_by_itself_and_wrong_if_nothing_happens() -> None:
    for edit in edits(60, seed=5):
        source, target = edit.source.render(), edit.target.render()
        assert judge(edit, source, softened(target)).right, edit.prompt
        assert not judge(edit, source, source).right, edit.prompt


def shapes(scene: Scene, *changed: Shape) -> Scene:
    return replace(scene, shapes=changed)


# what went wrong -> (operation, the scene that came out instead, what the judge must say)
WRONG: dict[str, tuple[str, Callable[[Scene], Scene], str]] = {
    "another colour": ("recolor", lambda s: with_circle(colour="blue", rgb=PALETTE["blue"]), "the circle is blue"),
    "half the way to the colour": ("recolor", lambda s: with_circle(rgb=(90, 130, 55)), "the circle is"),
    "the wrong shape recoloured": (
        "recolor",
        lambda s: shapes(s, RED_CIRCLE, replace(BLUE_SQUARE, rgb=PALETTE["green"])),
        "the circle is red",
    ),
    "moved": ("recolor", lambda s: shapes(s, BLUE_SQUARE, replace(s.find("circle"), x=21.0)), "overlaps its place"),
    "shrunk": ("recolor", lambda s: shapes(s, BLUE_SQUARE, replace(s.find("circle"), r=7.5)), "overlaps its place"),
    "melted into a star": (
        "recolor",
        lambda s: shapes(s, BLUE_SQUARE, replace(s.find("circle"), kind="star")),
        "like a star",
    ),
    "a bystander melted": (
        "remove",
        lambda s: shapes(s, replace(BLUE_SQUARE, kind="circle")),
        "the square looks like a circle",
    ),
    "a bystander recoloured": ("remove", lambda s: shapes(s, replace(BLUE_SQUARE, rgb=PALETTE["cyan"])), "untouched"),
    "a bystander gone": ("add", lambda s: shapes(s, RED_CIRCLE, STAR), "the square"),
    "not removed": ("remove", lambda s: SCENE, "still there"),
    "a pale ghost": ("remove", lambda s: with_circle(rgb=(235, 160, 45)), "still there"),
    "not swapped": ("swap", lambda s: SCENE, "looks like a circle"),
    "swapped and recoloured": (
        "swap",
        lambda s: with_circle(kind="triangle", rgb=PALETTE["cyan"]),
        "the triangle is cyan",
    ),
    "added at another place": (
        "add",
        lambda s: shapes(s, *SCENE.shapes, replace(STAR, cell=(1, 0), x=16, y=48)),
        "something stands in the empty cell 1, 0",
    ),
    "added twice": (
        "add",
        lambda s: shapes(s, *s.shapes, replace(STAR, cell=(1, 0), x=16, y=48)),
        "something stands in the empty cell 1, 0",
    ),
    "background changed by the way": (
        "recolor",
        lambda s: replace(s, rgb=PALETTE["orange"]),
        "untouched pixels changed",
    ),
    "background half the way": ("background", lambda s: replace(s, rgb=(150, 212, 135)), "the background is"),
    "a shape went with the background": (
        "background",
        lambda s: shapes(s, BLUE_SQUARE, replace(RED_CIRCLE, rgb=PALETTE["cyan"])),
        "untouched pixels changed",
    ),
}


def test_generated_pictures() -> None:
    """Without a source every shape counts: place, colour, kind, and nothing else."""
    for number in range(20):
        edit = random_generation(Random(number), GRIDS[number % 4], 1 + number % 3)
        picture = edit.target.render()
        assert judge(edit, picture, softened(picture)).right, edit.prompt
        first, *others = edit.target.shapes
        other = next(kind for kind in KINDS if kind not in {s.kind for s in edit.target.shapes})
        wrong = {
            "overlaps": edit.target.becomes(*others, replace(first, x=first.x + 6)),
            "looks like": edit.target.becomes(*others, replace(first, kind=other)),
            "the background is": replace(edit.target, rgb=(128, 128, 128)),
            "empty cell": edit.target.becomes(*edit.target.shapes, Shape.added(other, "red", edit.target.free[-1])),
        }
        for told, scene in wrong.items():
            verdict = judge(edit, picture, scene.render())
            if told == "empty cell" and edit.target.colour == "red":
                continue
            assert any(told in complaint for complaint in verdict.complaints), (told, edit.prompt, verdict)


def test_instructions_as_people_write_them() -> None:
    """Other words and manners name the same things."""
    said = {spoken(Random(i), "make the circle purple", "recolor") for i in range(300)}
    assert {
        "make the circle purple",
        "make the disc purple",
        "make the circle violet",
        "make the circle purple.",
    } <= said
    assert any(text.startswith("please ") for text in said) and any("everything else" in text for text in said)
    assert all("circle" in text or "disc" in text for text in said)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pictures_are_caught(name: str) -> None:
    operation, spoil, told = WRONG[name]
    edit = EDITS[operation]
    verdict = judge(edit, edit.source.render(), spoil(edit.target).render())
    assert not verdict.right and any(told in complaint for complaint in verdict.complaints), verdict


def test_a_blur_over_everything_is_caught() -> None:
    edit = EDITS["recolor"]
    blurred = edit.target.render().filter(ImageFilter.GaussianBlur(4))
    assert not judge(edit, edit.source.render(), blurred).right
    assert "size" in judge(edit, edit.source.render(), blurred.resize((32, 32))).complaints[0]


def test_drawings_are_what_they_say() -> None:
    """Sizes in units of r as documented, canonical colours, every operation and kind drawn."""
    for kind, area in {"circle": 3.14, "square": 3.10, "triangle": 2.0, "star": 2.05}.items():
        cover = SCENE.cover(Shape(kind, "red", PALETTE["red"], (0, 0), 16, 16, 10))
        assert cover.sum() / 100 == pytest.approx(area, rel=0.03)
    drawn = list(edits(200, seed=1))
    assert {edit.operation for edit in drawn} == set(OPERATIONS)
    assert {(edit.target.rows, edit.target.columns) for edit in drawn} == set(GRIDS)
    assert {(edit.operation, edit.colour) for edit in drawn} == {(o, c) for o in OPERATIONS for c in PALETTE}
    assert {shape.kind for edit in drawn for shape in edit.target.shapes} == set(KINDS)
    assert [e.prompt for e in drawn] == [e.prompt for e in edits(200, seed=1)]

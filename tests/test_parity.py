"""Our numbers against live diffusers, in fp32 on the same weights: every intermediate of an edit, case by case.

A failure names the quantities that are off in the order of computing, so the first one is where the two part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from diffusers.utils import load_image
from PIL import Image, ImageDraw
from reference import SHAPES, Recording

from mlx_kontext import EditResult, KontextPipeline
from mlx_kontext import pipeline as pipeline_module
from mlx_kontext.backend import mx
from mlx_kontext.hub import demo_folder
from mlx_kontext.models import flux as flux_module
from mlx_kontext.models.flux import Flux, sinusoid
from mlx_kontext.models.vae import AutoEncoder
from mlx_kontext.text import Conditioning, TextEncoders

TOLERANCE = 1e-4  # of the largest absolute value of the tensor
WEIGHT_SEEDS = (1, 2)

PLAIN = "make the red car blue, please"
UNUSUAL = "  Don't  PUT Ｆｕｌｌ ﬁ ½ café naïve\n🙂 你好 on the sky (test:1.2), it's 1024 wide! "
LONG = " ".join(["turn the circle into a star and keep the small cat;"] * 12)  # more tokens than CLIP's 77


@dataclass(frozen=True)
class Case:
    """One edit. `size` is (width, height) of the result, `photo` a row of PHOTOS, `options` diffusers' keywords."""

    shape: str
    size: tuple[int, int]
    photo: str | None = "odd"
    prompt: str = PLAIN
    steps: int = 2
    guidance: float = 2.5
    length: int = 24
    """T5 tokens. Relative distances have a bucket each up to 91, so from 160 on the last one is well used."""
    auto_resize: bool = True
    seed: int | None = None
    """Draw the noise from this seed on both sides; otherwise both get the same latents."""
    ask_size: bool = True
    """False: `size` is what our pipeline has to find by itself; diffusers must always be told."""
    options: dict[str, Any] = field(default_factory=dict)


CFG = {"negative_prompt": "a small cat", "true_cfg_scale": 2.5}

CASES = {
    "odd input size": Case("spec", (112, 64), ask_size=False, guidance=1),
    "output of another size": Case("spec", (64, 112), prompt=UNUSUAL, guidance=6),
    "no input image": Case("spec", (96, 80), photo=None),
    "true CFG": Case("spec", (80, 80), options=CFG, guidance=1),
    "T5 at the saturated bucket": Case("spec", (80, 80), length=160, steps=1),
    "T5 at full length, prompt cut by CLIP": Case("spec", (64, 64), length=512, steps=1, prompt=LONG),
    "turned by EXIF": Case("spec", (64, 112), photo="exif", ask_size=False),
    "transparency": Case("spec", (80, 80), photo="rgba"),
    "8 steps": Case("spec", (80, 64), steps=8, prompt=UNUSUAL),
    "input at its own size": Case("spec", (144, 96), auto_resize=False, ask_size=False, steps=1),
    "noise of a seed": Case("spec", (96, 80), seed=7, guidance=6),
    "narrow: odd input size, 1 step": Case("narrow", (96, 64), ask_size=False, steps=1, prompt=UNUSUAL, guidance=6),
    "narrow: another size, input at its own": Case("narrow", (48, 128), auto_resize=False, prompt=LONG),
    "narrow: no input image, true CFG": Case("narrow", (80, 80), photo=None, options=CFG, prompt=UNUSUAL),
    "narrow: saturated bucket": Case("narrow", (64, 96), length=200, guidance=1),
    "narrow: prompt cut by T5": Case("narrow", (64, 96), length=16, prompt=LONG, photo="exif"),
    "narrow: 8 steps, transparency": Case("narrow", (64, 48), photo="rgba", steps=8),
    "narrow: noise of a seed, 1 step": Case("narrow", (48, 48), photo=None, seed=2**40 + 5, steps=1, guidance=1),
    "deep: odd input size, 8 steps": Case("deep", (64, 64), ask_size=False, steps=8, guidance=1),
    "deep: another size, true CFG": Case("deep", (48, 80), photo="exif", options=CFG, prompt=UNUSUAL),
    "deep: no input image, saturated bucket": Case("deep", (64, 64), photo=None, length=160, guidance=6),
    "deep: input at its own size, transparency": Case("deep", (64, 112), photo="rgba", auto_resize=False, steps=1),
    "deep: full length": Case("deep", (64, 64), length=512, prompt=LONG),
    "deep: noise of a seed, 3 steps": Case("deep", (112, 48), seed=0, steps=3),
}


def picture(width: int, height: int, channels: int = 3) -> Image.Image:
    """Coarse random colours with fine noise."""
    random = np.random.RandomState(width * height)
    coarse = random.uniform(0, 255, (5, 7, channels))
    fine = np.kron(coarse, np.ones((height // 5 + 1, width // 7 + 1, 1)))[:height, :width]
    return Image.fromarray((0.8 * fine + random.uniform(0, 50, fine.shape)).astype(np.uint8))


def odd(_: Path) -> tuple[Image.Image, Image.Image]:
    return (picture(150, 101),) * 2


def exif(folder: Path) -> tuple[Path, Image.Image]:
    """A file that has to be turned a quarter: diffusers' documented way to a picture, `load_image`, turns it."""
    path, upside = folder / "turned.png", Image.Exif()
    upside[0x0112] = 6
    picture(150, 101).save(path, exif=upside)
    upright = load_image(str(path))
    assert upright.size == (101, 150)
    return path, upright


def rgba(_: Path) -> tuple[Image.Image, Image.Image]:
    """Transparency that shows white; diffusers would show what is hidden below, so it gets the picture composited."""
    clear = picture(110, 70, 4)
    colour, alpha = np.split(np.array(clear, np.float64), [3], axis=2)
    return clear, Image.fromarray(np.rint((colour * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8))


PHOTOS: dict[str, Callable[[Path], tuple[Any, Image.Image]]] = {"odd": odd, "exif": exif, "rgba": rgba}
"""Name -> what our pipeline gets, and what diffusers gets for the same picture."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Any, KontextPipeline]]:
    """(shape, weight seed) -> diffusers' pipeline and ours, from the same folder."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def pair(shape: str, seed: int) -> tuple[Any, KontextPipeline]:
        folder = root / f"{shape}-{seed}"
        reference.build(folder, SHAPES[shape], seed)
        return reference.load(folder), KontextPipeline.from_pretrained(folder, dtype="float32")

    return pair


@pytest.mark.parametrize("weights", WEIGHT_SEEDS, ids="weights {}".format)
@pytest.mark.parametrize("name", CASES)
def test_edit_is_diffusers(
    name: str, weights: int, models: Callable[[str, int], tuple[Any, KontextPipeline]], tmp_path: Path
) -> None:
    case = CASES[name]
    theirs, ours = models(case.shape, weights)
    our_photo, their_photo = PHOTOS[case.photo](tmp_path) if case.photo else (None, None)
    width, height = case.size
    common = {
        "prompt": case.prompt,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "max_sequence_length": case.length,
    } | case.options
    start = {"seed": case.seed} if case.seed is not None else {"latents": packed_noise(width, height, weights)}
    expected = reference.run(
        theirs,
        image=their_photo,
        size=case.size,
        sizes=SHAPES[case.shape].sizes,
        auto_resize=case.auto_resize,
        **common,
        **start,
    )
    asked = {"width": width, "height": height} if case.ask_size else {}
    found, result = record(ours, image=our_photo, auto_resize=case.auto_resize, **common, **start, **asked)
    assert result.image.size == case.size
    assert_same(found, expected)


def packed_noise(width: int, height: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((1, width * height // 256, 64)).astype(np.float32)


def record(pipe: KontextPipeline, **request: Any) -> tuple[Recording, EditResult]:
    """Edit with our pipeline and keep what `reference.run` keeps, under the same names."""
    record: Recording = {}
    passes: list[mx.array] = []
    prompts = 2 if request.get("negative_prompt") is not None else 1
    encode, moments, decode = TextEncoders.encode, AutoEncoder.encode_moments, AutoEncoder.decode
    velocity, euler = Flux.__call__, pipeline_module.euler

    def spy_encode(self: TextEncoders, prompt: str, length: int) -> Conditioning:
        conditioning = encode(self, prompt, length)
        which = "" if prompt == request["prompt"] else " (negative prompt)"
        record[f"pooled{which}"], record[f"text{which}"] = np.array(conditioning.vec), np.array(conditioning.txt)
        return conditioning

    def spy_moments(self: AutoEncoder, x: mx.array) -> mx.array:
        out = moments(self, x)
        record["moments"] = np.array(out)
        return out

    def spy_flux(self: Flux, img: mx.array, *rest: Any) -> mx.array:
        out = velocity(self, img, *rest)
        which = " (negative prompt)" if len(passes) % prompts else ""
        record.setdefault("tokens", np.array(img))
        record[f"pass {len(passes) // prompts + 1}{which}"] = np.array(out)
        passes.append(out)
        return out

    def spy_euler(combined: Callable[[int, mx.array], mx.array], x: mx.array, sigmas: np.ndarray) -> Iterator[Any]:
        record["sigmas"] = sigmas

        def recorded(i: int, x: mx.array) -> mx.array:
            out = combined(i, x)
            record[f"velocity {i + 1}"] = np.array(out)
            return out

        return euler(recorded, x, sigmas)

    def spy_decode(self: AutoEncoder, z: mx.array) -> mx.array:
        out = decode(self, z)
        record["decoded"] = np.array(out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoders, "encode", spy_encode)
        patch.setattr(AutoEncoder, "encode_moments", spy_moments)
        patch.setattr(AutoEncoder, "decode", spy_decode)
        patch.setattr(Flux, "__call__", spy_flux)
        patch.setattr(pipeline_module, "euler", spy_euler)
        (result,) = [step.result for step in pipe.stream(**request) if step.result is not None]
    return record | {"latents": result.latents, "image": np.array(result.image)}, result


def assert_same(found: Recording, expected: Recording) -> None:
    assert sorted(found) == sorted(expected)
    shapes = {name: (found[name].shape, value.shape) for name, value in expected.items()}
    assert {name: pair for name, pair in shapes.items() if pair[0] != pair[1]} == {}
    errors = {name: relative_error(found[name], value) for name, value in expected.items() if name != "image"}
    assert {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE} == {}
    assert largest_difference(found["image"], expected["image"]) <= 1


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def largest_difference(found: np.ndarray, expected: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_runs_round_time_and_guidance_as_diffusers(
    dtype: str, models: Callable[[str, int], tuple[Any, KontextPipeline]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sinusoid is the cosine of 1000 σ itself, so one rounding more or less is another embedding."""
    folder = models("narrow", 1)[1].checkpoint.folder
    edit = {"prompt": PLAIN, "num_inference_steps": 28, "guidance_scale": 2.7, "max_sequence_length": 8}
    seen: list[float] = []

    theirs = reference.load(folder).to(getattr(torch, dtype))
    embed = theirs.transformer.time_text_embed.time_proj
    embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].item()))
    reference.run(theirs, size=(32, 32), sizes=SHAPES["narrow"].sizes, seed=0, **edit)
    times, guidances = seen[::2], seen[1::2]

    ours: list[np.ndarray] = []

    def spy(v: mx.array) -> mx.array:
        ours.append(np.array(v.astype(mx.float32)))
        return sinusoid(v)

    monkeypatch.setattr(flux_module, "sinusoid", spy)
    KontextPipeline.from_pretrained(folder, dtype=dtype)(width=32, height=32, seed=0, **edit)
    assert [*ours[0]] == times
    assert {*ours[1]} == {*guidances} and len(times) == 28


# --- the demo model ---

COLORS = {
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

# background, shapes by cell (top left, top right, bottom left, bottom right), instruction
EDITS = (
    ("blue", ("red star", "purple triangle", "", ""), "set the background to cyan"),
    ("blue", ("red star", "purple triangle", "", ""), "put a purple square in the bottom right"),
    ("green", ("purple triangle", "blue star", "", "black square"), "paint the square red"),
    ("green", ("purple triangle", "blue star", "", "black square"), "make the background cyan"),
    ("white", ("cyan square", "", "", "red star"), "take away the star"),
    ("white", ("cyan square", "", "", "red star"), "draw a red triangle in the top right"),
    ("white", ("", "blue square", "red circle", ""), "erase the square"),
    ("white", ("", "blue square", "red circle", ""), "put a black star in the top left"),
    ("red", ("blue square", "", "green triangle", ""), "add a orange circle"),
    ("red", ("blue square", "", "green triangle", ""), "change the color of the square to purple"),
    ("orange", ("green square", "", "purple star", ""), "recolor the star to pink"),
    ("orange", ("green square", "", "purple star", ""), "remove the green square"),
    ("black", ("", "red triangle", "red circle", "blue star"), "make the red circle yellow"),
    ("black", ("", "red triangle", "red circle", "blue star"), "remove the red triangle"),
    ("cyan", ("", "orange circle", "blue square", ""), "turn the square into a star"),
    ("cyan", ("", "orange circle", "blue square", ""), "add a green star in the top left"),
    ("pink", ("", "white circle", "", "green triangle"), "change the circle into a square"),
    ("pink", ("", "white circle", "", "green triangle"), "turn the triangle black"),
    ("yellow", ("", "", "blue circle", "black square"), "change the background to white"),
    ("purple", ("yellow star", "", "", "cyan circle"), "delete the star"),
)


def scene(background: str, cells: tuple[str, ...], size: tuple[int, int]) -> Image.Image:
    """Shapes on a plain ground, one in each quarter at most, drawn large and scaled down for smooth edges."""
    width, height = size
    image = Image.new("RGB", (4 * width, 4 * height), COLORS[background])
    draw = ImageDraw.Draw(image)
    r = 0.6 * min(width, height)  # of the picture drawn large
    for i, cell in enumerate(cells):
        if cell:
            color, kind = cell.split()
            x, y = width * (1 + 2 * (i % 2)), height * (1 + 2 * (i // 2))
            draw.polygon([(x + r * dx, y + r * dy) for dx, dy in outline(kind)], fill=COLORS[color])
    return image.resize(size, Image.Resampling.BOX)


def outline(kind: str) -> list[tuple[float, float]]:
    """The corners of a shape, in units of its radius around its centre; y points down."""
    corners, radii = {
        "circle": (90, (1,)),
        "square": (4, (0.88 * 2**0.5,)),
        "triangle": (3, (1,)),
        "star": (10, (1.2, 0.46)),
    }[kind]
    first = np.pi / 4 if kind == "square" else -np.pi / 2  # a square lies on its side, the others point up
    angles = first + 2 * np.pi * np.arange(corners) / corners
    return [(radii[i % len(radii)] * np.cos(a), radii[i % len(radii)] * np.sin(a)) for i, a in enumerate(angles)]


def test_demo_model_gives_the_pictures_of_diffusers() -> None:
    """20 edits with the trained model that we ship, read into diffusers from our own folder."""
    folder = demo_folder()
    theirs = reference.diffusers_from_ours(folder)
    ours = KontextPipeline.from_pretrained(folder, dtype="float32")
    width = height = 64
    edit = {"num_inference_steps": 8, "guidance_scale": 2.5, "max_sequence_length": 32}
    off = {}
    for number, (background, cells, prompt) in enumerate(EDITS):
        photo = scene(background, cells, (width, height))
        latents = packed_noise(width, height, number)
        expected = reference.run(
            theirs, image=photo, prompt=prompt, size=(width, height), sizes=((64, 64),), latents=latents, **edit
        )["image"]
        exact = {"width": width, "height": height, "auto_resize": False}
        found = np.array(ours(image=photo, prompt=prompt, latents=latents, **exact, **edit).image)
        off[prompt] = largest_difference(found, expected)
        # orange on red, the least of these edits, is 92 levels away
        assert largest_difference(expected, np.array(photo)) > 80, f"{prompt!r} edits nothing: a poor test"
    assert len(off) == len(EDITS) == 20
    assert {prompt: difference for prompt, difference in off.items() if difference > 2} == {}

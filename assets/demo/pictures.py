"""Draw README's picture with the demo model: `python assets/demo/pictures.py`. Single edits above, a chain below."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from scenes import Scene, Shape  # noqa: E402

from mlx_kontext import KontextPipeline  # noqa: E402

SCENE = Scene(
    "cyan",
    (66, 200, 220),
    (
        Shape("circle", "red", (216, 44, 40), (0, 0), 17, 15, 10.5),
        Shape("square", "blue", (40, 84, 218), (1, 1), 47, 48.5, 10),
        Shape("triangle", "white", (240, 242, 244), (0, 2), 80, 17, 10),
    ),
    3,
    3,
)
SINGLE = (
    "make the circle yellow",
    "remove the square",
    "turn the triangle into a star",
    "make the background black",
    "add a pink star in the bottom left",
)
CHAIN = (
    "add a green star",
    "make the triangle orange",
    "make the background white",
    "paint the circle black",
    "remove the star",
)
SIDE, GAP, TEXT = 180, 14, 30


def main() -> None:
    pipe = KontextPipeline.from_pretrained("demo")
    first = SCENE.render()
    chain = []
    for prompt in CHAIN:
        chain.append((prompt, pipe(image=chain[-1][1] if chain else first, prompt=prompt, seed=7).image))
    rows = [
        [("the input", first), *((prompt, pipe(image=first, prompt=prompt, seed=7).image) for prompt in SINGLE)],
        [("the input, then one by one", first), *chain],
    ]
    sheet = Image.new("RGB", (6 * (SIDE + GAP) + GAP, 2 * (SIDE + GAP + TEXT) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for y, row in enumerate(rows):
        for x, (text, picture) in enumerate(row):
            left, top = GAP + x * (SIDE + GAP), GAP + y * (SIDE + GAP + TEXT)
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
            draw.text((left, top + SIDE + 5), text, "black", font)
    sheet.save(HERE.parent / "edits.png", optimize=True)


if __name__ == "__main__":
    main()

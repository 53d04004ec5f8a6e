"""Was an instruction carried out? A judge that looks at pixels: source, output and what should have happened.

An edit is right if nothing is on the list of complaints: colour, overlap with the place expected, removal, the identity of
every shape, and pixels that were none of the edit's business. PSNR alone would hide a square that melts into a star.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter
from scenes import KINDS, PALETTE, Edit, Scene, Shape

COLOUR = 40  # of 255, any channel of the mean colour, and the nearest name must be the one asked for
OVERLAP = {"star": 0.7}  # intersection over union; the points of a star are thin
OVERLAP_ELSE = 0.8
REMOVED = 16  # of 255, mean difference to the background where the shape was
UNTOUCHED = 22.0  # dB against the source, outside the edit


@dataclass(frozen=True)
class Verdict:
    """What was found; `complaints` in words, empty for a right edit. untouched: dB."""

    complaints: tuple[str, ...]
    untouched: float

    @property
    def right(self) -> bool:
        return not self.complaints

    @property
    def identities(self) -> bool:
        """Whether every shape is most like its own kind."""
        return not any("looks like" in complaint for complaint in self.complaints)


def judge(edit: Edit, source: Image.Image, output: Image.Image) -> Verdict:
    """Compare pictures of equal size (RGB) with the scene the edit should have led to; `source` counts in edits only."""
    before, after = np.asarray(source, float), np.asarray(output, float)
    complaints = []
    if before.shape != after.shape:
        return Verdict((f"size is {output.size} instead of {source.size}",), 0.0)
    if edit.operation == "generate":
        complaints += check_background(edit.target, after)
        for shape in edit.target.shapes:
            complaints += check_shape(edit.target, shape, after)
        complaints += check_identities(edit.target, after) + check_empty_cells(edit, after)
        return Verdict(tuple(complaints), float("inf"))
    if edit.operation == "background":
        complaints += check_background(edit.target, after)
    if edit.operation == "remove":
        complaints += check_removed(edit, after)
    if edit.operation in ("recolor", "add", "swap"):
        complaints += check_shape(edit.target, edit.target.find(edit.new_kind or edit.kind), after)
    complaints += check_identities(edit.target, after)
    complaints += check_empty_cells(edit, after)
    untouched = psnr(before, after, untouched_pixels(edit))
    if untouched < UNTOUCHED:
        complaints.append(f"untouched pixels changed: {untouched:.1f} dB")
    return Verdict(tuple(complaints), untouched)


def check_shape(scene: Scene, shape: Shape, pixels: np.ndarray) -> list[str]:
    """The shape that was asked for has its colour and covers its place."""
    solid = scene.cover(shape) > 0.5
    found = pixels[shrunk(solid)].mean(0)
    complaints = check_colour(f"the {shape.kind}", found, shape.colour, shape.rgb)
    overlap = iou(segment(scene, shape, pixels), solid)
    if overlap < OVERLAP.get(shape.kind, OVERLAP_ELSE):
        complaints.append(f"the {shape.kind} overlaps its place by {overlap:.2f}")
    return complaints


def check_colour(what: str, found: np.ndarray, name: str, rgb: tuple[int, ...]) -> list[str]:
    nearest = min(PALETTE, key=lambda n: np.linalg.norm(found - np.array(PALETTE[n])))
    off = np.abs(found - np.array(rgb)).max()
    return [f"{what} is {nearest}, off by {off:.0f}, not {name}"] if nearest != name or off > COLOUR else []


def check_background(scene: Scene, pixels: np.ndarray) -> list[str]:
    around = ~grown(covered(scene), 2)
    return check_colour("the background", pixels[around].mean(0), scene.colour, scene.rgb)


def check_removed(edit: Edit, pixels: np.ndarray) -> list[str]:
    gone = edit.source.cover(edit.source.find(edit.kind)) > 0.5
    off = np.abs(pixels[gone] - np.array(edit.target.rgb)).mean()
    return [f"the {edit.kind} is still there, by {off:.0f}"] if off > REMOVED else []


def check_identities(scene: Scene, pixels: np.ndarray) -> list[str]:
    """Every shape that should be there is most like its own kind."""
    complaints = []
    for shape in scene.shapes:
        seen = segment(scene, shape, pixels)
        likeness = {kind: max(iou(seen, mask) for mask in variants(scene, replace(shape, kind=kind))) for kind in KINDS}
        best = max(likeness, key=likeness.__getitem__)
        if best != shape.kind:
            complaints.append(
                f"the {shape.kind} looks like a {best} ({likeness[best]:.2f} to {likeness[shape.kind]:.2f})"
            )
    return complaints


def check_empty_cells(edit: Edit, pixels: np.ndarray) -> list[str]:
    """No ghost of a shape where none should be."""
    taken = {shape.cell for shape in (*edit.target.shapes, *edit.source.shapes)}
    complaints = []
    for row, column in edit.target.cells:
        if (row, column) not in taken:
            cell = pixels[32 * row + 4 : 32 * row + 28, 32 * column + 4 : 32 * column + 28]
            strange = (np.abs(cell - np.array(edit.target.rgb)).max(-1) > 2 * COLOUR).mean()
            if strange > 0.05:
                complaints.append(f"something stands in the empty cell {row}, {column}")
    return complaints


def untouched_pixels(edit: Edit) -> np.ndarray:
    """Where the source should still be seen: [H, W]. Edges are left out, any 8x autoencoder softens them."""
    if edit.operation == "background":
        return shrunk(covered(edit.source), 2)
    return ~grown(touched(edit), 3)


def touched(edit: Edit) -> np.ndarray:
    """What an edit of a shape is about, before and after: [H, W]."""
    masks = [
        scene.cover(s) > 0
        for scene in (edit.source, edit.target)
        for s in scene.shapes
        if s.kind in (edit.kind, edit.new_kind)
    ]
    return np.any(masks, axis=0)


def segment(scene: Scene, shape: Shape, pixels: np.ndarray) -> np.ndarray:
    """The pixels of a shape's cell that are nearer to the shape's colour than to the background's: [H, W]."""
    front = pixels[shrunk(scene.cover(shape) > 0.5, 2)].mean(0)
    back = pixels[~grown(covered(scene), 2)].mean(0)
    across = front - back
    share = (pixels - back) @ across / max(across @ across, 1.0)
    cell = np.zeros(share.shape, bool)
    row, column = shape.cell
    cell[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = True
    return (share > 0.5) & cell


def variants(scene: Scene, shape: Shape) -> list[np.ndarray]:
    """A kind at the shape's place, up to a pixel moved each way and a tenth smaller or larger."""
    sizes = [scene.cover(replace(shape, r=shape.r * scale)) > 0.5 for scale in (0.9, 1.0, 1.1)]
    return [np.roll(mask, (dy, dx), (0, 1)) for mask in sizes for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def covered(scene: Scene) -> np.ndarray:
    """Pixels that any shape covers: [H, W]."""
    blank = np.zeros((32 * scene.rows, 32 * scene.columns), bool)
    return np.any([blank, *(scene.cover(shape) > 0.5 for shape in scene.shapes)], axis=0)


def grown(mask: np.ndarray, pixels: int = 1) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def shrunk(mask: np.ndarray, pixels: int = 1) -> np.ndarray:
    return ~grown(~mask, pixels)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """dB over the pixels `where`; infinite for equal ones."""
    error = ((a - b)[where] ** 2).mean() if where.any() else 0.0
    return float(10 * np.log10(255**2 / error)) if error else float("inf")

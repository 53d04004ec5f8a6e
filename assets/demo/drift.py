"""Do kept latents drift less than PNGs? `python assets/demo/drift.py --chains 400 --processes 2`.

The same chains of edits twice, with the same scenes, prompts and seeds: each edit of the latents of the one before, as a
session does it, and each of its picture, as a PNG gives it. Prints a table; `--json FILE` keeps every figure.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from evaluate import HERE, pipe, start
from judge import check_identities, iou, judge, psnr, segment, untouched_pixels, variants
from PIL import Image
from scenes import GRIDS, KINDS, OPERATIONS, Edit, Scene, random_edit, random_scene

LEAST = 64  # pixels that no edit touched; with fewer, their PSNR says nothing
MOST = 60.0  # dB; equal pixels would be infinitely good
FIGURES = ("same", "margin", "right", "untouched")


def edits_of_chain(number: int, length: int) -> list[Edit]:
    """Edits in a row, each of the scene that the one before led to."""
    draw = random.Random(f"drift {number}")
    scene = random_scene(draw, GRIDS[number % 4])
    edits: list[Edit] = []
    while len(edits) < length:
        if edit := random_edit(draw, draw.choice(OPERATIONS), scene):
            edits.append(edit)
            scene = edit.target
    return edits


def margin(scene: Scene, pixels: np.ndarray) -> float:
    """How much more the shapes look like their own kind than like the next one (overlap, mean): identity before it breaks."""
    margins = []
    for shape in scene.shapes:
        seen = segment(scene, shape, pixels)
        alike = {kind: max(iou(seen, mask) for mask in variants(scene, replace(shape, kind=kind))) for kind in KINDS}
        margins.append(alike.pop(shape.kind) - max(alike.values()))
    return float(np.mean(margins)) if margins else math.nan


def through_png(image: Image.Image) -> Image.Image:
    file = BytesIO()
    image.save(file, "PNG")
    return Image.open(BytesIO(file.getvalue())).convert("RGB")


def chain(task: dict[str, Any]) -> dict[str, Any]:
    """One chain both ways. By step: is every shape its own kind, and by how much, is the edit right, PSNR of untouched pixels."""
    edits = edits_of_chain(task["chain"], task["edits"])
    first = edits[0].source.render()
    found: dict[str, Any] = {"chain": task["chain"], "prompts": [edit.prompt for edit in edits]}
    for way in ("latents", "png"):
        given: Any = first
        clean = np.ones((first.height, first.width), bool)
        same, margins, right, untouched = [], [], [], []
        for step, edit in enumerate(edits):
            size = {"width": first.width, "height": first.height, "auto_resize": False}
            seed = task["edits"] * task["chain"] + step
            result = pipe()(image=given, prompt=edit.prompt, seed=seed, **size, **task["options"])
            before = given if isinstance(given, Image.Image) else given.image
            right.append(judge(edit, before, result.image).right)
            after = np.asarray(result.image, float)
            same.append(not check_identities(edit.target, after))
            margins.append(margin(edit.target, after))
            clean &= untouched_pixels(edit)
            kept = psnr(np.asarray(first, float), after, clean)
            untouched.append(min(kept, MOST) if clean.sum() >= LEAST else math.nan)
            given = result if way == "latents" else through_png(result.image)
        found[way] = {"same": same, "margin": margins, "right": right, "untouched": untouched}
    return found


def difference(values: list[tuple[float, float]]) -> str:
    """Mean of latents minus PNG over pairs, with its standard error."""
    pairs = [a - b for a, b in values if not math.isnan(a - b)]
    if len(pairs) < 2:
        return f"too few pairs ({len(pairs)})"
    mean, error = float(np.mean(pairs)), float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
    ratio = f"{mean / error:+.1f} standard errors" if error else "no spread"
    return f"{mean:+.4f} ± {error:.4f}  ({ratio}, {len(pairs)} pairs)"


def table(results: list[dict[str, Any]]) -> list[str]:
    length = len(results[0]["prompts"])
    lines = [f"{len(results)} pairs of chains of {length} edits", "", "edit       latents                       PNG"]
    lines.append("        same margin  right    dB      same margin  right    dB")
    for step in range(length):
        cells = []
        for way in ("latents", "png"):
            found = [np.array([r[way][key][step] for r in results], float) for key in FIGURES]
            same, margins, right, untouched = (np.nanmean(f) if not np.isnan(f).all() else math.nan for f in found)
            cells.append(f"{100 * same:5.1f}  {margins:5.3f}  {100 * right:5.1f}  {untouched:4.1f}")
        lines.append(f"{step + 1:4}   {cells[0]}     {cells[1]}")
    pairs = {
        "shape identity, mean of a chain": ("same", np.nanmean),
        "shape identity, last edit": ("same", last),
        "margin of identity, last edit": ("margin", last),
        "right edits, mean of a chain": ("right", np.nanmean),
        "untouched pixels, last edit, dB": ("untouched", last),
    }
    lines += ["", "latents minus PNG, paired by chain"]
    for name, (key, figure) in pairs.items():
        values = [(float(figure(r["latents"][key])), float(figure(r["png"][key]))) for r in results]
        lines.append(f"{name:33} {difference(values)}")
    return lines


def last(values: list[float]) -> float:
    """The last that could be measured: a chain may end without shapes, or without an untouched pixel."""
    known = [value for value in values if not math.isnan(value)]
    return known[-1] if known else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "model"), help="model folder (default: the one beside this file)")
    parser.add_argument("--chains", type=int, default=400)
    parser.add_argument("--edits", type=int, default=10, help="of each chain")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write figures and every single result to this file, now and then")
    args = parser.parse_args()
    options = {"num_inference_steps": args.steps} if args.steps else {}
    tasks = [{"chain": i, "edits": args.edits, "options": options} for i in range(args.chains)]
    begun, results = time.time(), []
    with multiprocessing.get_context("spawn").Pool(args.processes, start, ({"model": args.model},)) as pool:
        for found in pool.imap(chain, tasks):
            results.append(found)
            if len(results) % 20 == 0 or len(results) == len(tasks):
                lines = table(results)
                print(
                    f"{len(results)} of {len(tasks)} chains, {time.time() - begun:.0f} s", file=sys.stderr, flush=True
                )
                if args.json:
                    args.json.write_text(json.dumps({"table": lines, "results": results}, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

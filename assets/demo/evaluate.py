"""Judge the demo model through our own pipeline: `python assets/demo/evaluate.py`. Half an hour on two cores.

Scenes and prompts are drawn with seeds that training never uses. Prints a table; `--json FILE` keeps every figure.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
from judge import check_identities, grown, judge, psnr, touched  # noqa: E402
from scenes import GRIDS, OPERATIONS, PALETTE, draw_edit, random_edit, random_generation, random_scene, spoken  # noqa: E402

OPTIONS: dict[str, Any] = {}


def round_trip(task: dict[str, Any]) -> dict[str, Any]:
    """How well the autoencoder alone keeps a scene."""
    from mlx_kontext.backend import mx
    from mlx_kontext.image import to_array, to_image

    source = random_scene(random.Random(f"picture {task['seed']}"), GRIDS[task["seed"] % 4]).render()
    vae = pipe().vae
    output = to_image(np.array(vae.decode(vae.encode(mx.array(to_array(source, *source.size))))))
    everywhere = np.ones((source.height, source.width), bool)
    return {"psnr": psnr(np.asarray(source, float), np.asarray(output, float), everywhere)}


def single(task: dict[str, Any]) -> dict[str, Any]:
    """One edit; operations, colours and grids in turn."""
    i = task["seed"]
    draw = random.Random(f"held out {i}")
    operation = OPERATIONS[i % 5]
    edit = draw_edit(draw, operation, GRIDS[i // 50 % 4], list(PALETTE)[i // 5 % 10])
    prompt, options = edit.prompt, dict(task["options"])
    manner = options.pop("manner", "")
    if manner == "capitals":
        prompt = [prompt.capitalize() + ".", prompt.upper(), prompt.title()][i % 3]
    if manner == "spoken":
        prompt = spoken(draw, prompt, operation)
    if manner == "another prompt":  # of another operation: two of one operation often ask for the same
        prompt = draw_edit(random.Random(f"another {i}"), OPERATIONS[(i + 1) % 5], GRIDS[i // 50 % 4]).prompt
    source = edit.source.render()
    size = {"width": source.width, "height": source.height, "auto_resize": False}
    output = source if manner == "nothing" else pipe()(image=source, prompt=prompt, seed=i, **size, **options).image
    verdict = judge(edit, source, output)
    return {
        "operation": operation,
        "colour": edit.colour,
        "grid": "{}x{}".format(*GRIDS[i // 50 % 4]),
        "prompt": prompt,
        "right": verdict.right,
        "identities": verdict.identities,
        "untouched": verdict.untouched,
        "complaints": verdict.complaints,
    }


def generated(task: dict[str, Any]) -> dict[str, Any]:
    i = task["seed"]
    options = dict(task["options"])
    edit = random_generation(random.Random(f"generated {i}"), GRIDS[i % 4], options.pop("shapes"))
    picture = edit.target.render()
    output = pipe()(prompt=edit.prompt, seed=i, width=picture.width, height=picture.height, **options).image
    verdict = judge(edit, picture, output)
    return {"right": verdict.right, "prompt": edit.prompt, "complaints": verdict.complaints}


def chain(task: dict[str, Any]) -> dict[str, Any]:
    """Five edits, each of the picture before as a PNG would give it."""
    i = task["seed"]
    draw = random.Random(f"chain {i}")
    grid = GRIDS[i % 4]
    scene = random_scene(draw, grid)
    first = picture = scene.render()
    clean = np.ones((first.height, first.width), bool)
    right, identities, background = [], [], False
    for step in range(5):
        edit = None
        while edit is None:
            edit = random_edit(draw, draw.choice(OPERATIONS), scene)
        size = {"width": first.width, "height": first.height, "auto_resize": False}
        output = pipe()(image=picture, prompt=edit.prompt, seed=10 * i + step, **size, **task["options"]).image
        right.append(judge(edit, picture, output).right)
        identities.append(not check_identities(edit.target, np.asarray(output, float)))
        if edit.operation == "background":
            background = True
        else:
            clean &= ~grown(touched(edit), 3)
        scene, picture = edit.target, output
    kept = math.nan if background else psnr(np.asarray(first, float), np.asarray(picture, float), clean)
    return {"right": right, "identities": identities, "untouched": kept}


_PIPE: list[Any] = []


def pipe() -> Any:
    """The model, loaded once in each process."""
    if not _PIPE:
        from mlx_kontext import KontextPipeline

        _PIPE.append(KontextPipeline.from_pretrained(OPTIONS["model"], quantize=OPTIONS.get("quantize")))
    return _PIPE[0]


def start(options: dict[str, Any]) -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the processes share the cores
    OPTIONS.update(options)


def share(values: list[bool]) -> float:
    return 100 * sum(values) / len(values)


def lower_bound(values: list[bool]) -> float:
    """Wilson's 95 % lower bound of a share, in percent."""
    n, p, z = len(values), sum(values) / len(values), 1.96
    middle = p + z * z / (2 * n)
    return 100 * (middle - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of single edits."""
    cells, operations, grids = defaultdict(list), defaultdict(list), defaultdict(list)
    for r in results:
        cells[f"{r['operation']} {r['colour']}"].append(r["right"])
        operations[r["operation"]].append(r["right"])
        grids[r["grid"]].append(r["right"])
    right = [r["right"] for r in results]
    worst = min(cells, key=lambda c: share(cells[c]))
    return {
        "edits": len(right),
        "right": share(right),
        "at least (95 %)": lower_bound(right),
        **{name: share(values) for name, values in operations.items()},
        **{f"grid {name}": share(values) for name, values in sorted(grids.items())},
        "worst colour x operation": [worst, share(cells[worst]), len(cells[worst])],
        "shape identity": share([r["identities"] for r in results]),
        "untouched dB": float(np.mean([min(r["untouched"], 60) for r in results])),
    }


def chain_summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    steps = range(5)
    kept = [r["untouched"] for r in results if not math.isnan(r["untouched"])]
    return {
        "chains": len(results),
        "right by step": [round(share([r["right"][i] for r in results]), 1) for i in steps],
        "shape identity by step": [round(share([r["identities"][i] for r in results]), 1) for i in steps],
        "untouched dB after five": float(np.mean(kept)),
        "chains it is measured on": len(kept),
    }


def right_share(results: list[dict[str, Any]]) -> dict[str, Any]:
    right = [r["right"] for r in results]
    return {"pictures": len(right), "right": share(right), "at least (95 %)": lower_bound(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "model"), help="model folder (default: the one beside this file)")
    parser.add_argument("-q", "--quantize", metavar="SCHEME", help="q8, q6, q4m, q4: judge the quantized model")
    parser.add_argument("--only", nargs="*", help="names of sections to run (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of each section's edits, for a quick look")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write figures and every single result to this file")
    args = parser.parse_args()
    full, quick = {"num_inference_steps": 28}, {"num_inference_steps": 8}

    def tasks(count: int, options: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"seed": i, "options": options} for i in range(max(10, int(count * args.share)))]

    sections: dict[str, tuple[Callable, list[dict[str, Any]], Callable]] = {
        "autoencoder": (
            round_trip,
            tasks(200, {}),
            lambda rs: {"pictures": len(rs), "round trip dB": float(np.mean([r["psnr"] for r in rs]))},
        ),
        "edits, 28 steps": (single, tasks(1500, full), summary),
        "edits, 8 steps": (single, tasks(1500, quick), summary),
        "capitals, 8 steps": (single, tasks(500, quick | {"manner": "capitals"}), summary),
        "as people write, 8 steps": (single, tasks(300, quick | {"manner": "spoken"}), summary),
        "T5 length 64, 8 steps": (single, tasks(100, quick | {"max_sequence_length": 64}), summary),
        "T5 length 512, 8 steps": (single, tasks(100, quick | {"max_sequence_length": 512}), summary),
        "control: input handed back": (single, tasks(100, {"manner": "nothing"}), right_share),
        "control: another prompt, 8 steps": (single, tasks(100, quick | {"manner": "another prompt"}), right_share),
        "text to image, one shape, 28 steps": (generated, tasks(300, full | {"shapes": 1}), right_share),
        "text to image, two shapes, 28 steps": (generated, tasks(300, full | {"shapes": 2}), right_share),
        "chains of five, 28 steps": (chain, tasks(300, full), chain_summary),
    }
    kept: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(
        args.processes, start, ({"model": args.model, "quantize": args.quantize},)
    ) as pool:
        for name, (work, todo, summarize) in sections.items():
            if args.only and not any(name.startswith(only) for only in args.only):
                continue
            begun = time.time()
            results = pool.map(work, todo, chunksize=4)
            figures = summarize(results)
            kept[name] = {"figures": figures, "results": results}
            print(f"{name}  ({time.time() - begun:.0f} s)")
            for label, value in figures.items():
                print(f"    {label:26} {value:.2f}" if isinstance(value, float) else f"    {label:26} {value}")
            sys.stdout.flush()
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()

"""The demo model carries out instructions: a fixed hundred here, thousands in `assets/demo/evaluate.py`."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from judge import check_identities, judge
from scenes import GRIDS, OPERATIONS, Edit, edits, random_edit, random_generation, random_scene

from mlx_kontext import KontextPipeline


@pytest.fixture(scope="module")
def pipe() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def carry_out(pipe: KontextPipeline, wanted: Iterable[Edit], **options: int) -> tuple[float, float, str]:
    """Share of edits that came out right, mean dB of untouched pixels, and a table of operations and complaints."""
    right, wrong, untouched = defaultdict(list), [], []
    for seed, edit in enumerate(wanted):
        source = edit.source.render()
        verdict = judge(edit, source, pipe(image=source, prompt=edit.prompt, seed=seed, **exact(edit), **options).image)
        right[edit.operation].append(verdict.right)
        untouched.append(min(verdict.untouched, 60))
        if not verdict.right:
            wrong.append(f"{edit.prompt}: {'; '.join(verdict.complaints)}")
    rows = [f"{name:12} {sum(r):4} of {len(r)}" for name, r in right.items()]
    every = [r for results in right.values() for r in results]
    table = "\n".join([f"{sum(every)} of {len(every)} right", *rows, *wrong])
    return sum(every) / len(every), float(np.mean(untouched)), table


def exact(edit: Edit) -> dict[str, int | bool]:
    """The picture's own size, which for the smallest is none of the model's buckets."""
    return {"width": 32 * edit.target.columns, "height": 32 * edit.target.rows, "auto_resize": False}


def test_every_operation_and_colour(pipe: KontextPipeline) -> None:
    share, untouched, table = carry_out(pipe, edits(50, seed=2))
    assert share >= 0.98, table
    assert untouched >= 34, untouched


def test_capitals_and_full_length(pipe: KontextPipeline) -> None:
    shouted = [replace(edit, prompt=edit.prompt.upper() + "!") for edit in edits(10, seed=3, grids=[(2, 3)])]
    assert carry_out(pipe, shouted)[0] == 1
    share, _, table = carry_out(pipe, edits(5, seed=4, grids=[(2, 2)]), max_sequence_length=512)
    assert share >= 0.8, table


def test_pictures_from_nothing(pipe: KontextPipeline) -> None:
    wanted = [random_generation(Random(i), GRIDS[i % 4], count=1 + i % 2) for i in range(10)]
    right = []
    for seed, edit in enumerate(wanted):
        size = exact(edit)
        made = pipe(prompt=edit.prompt, seed=seed, width=size["width"], height=size["height"]).image
        right.append(judge(edit, edit.target.render(), made).right)
    assert sum(right) >= 9, right


def test_a_chain_of_five_keeps_its_shapes(pipe: KontextPipeline) -> None:
    same, total = 0, 0
    for number in range(4):
        draw = Random(f"test chain {number}")
        scene = random_scene(draw, GRIDS[number])
        picture = scene.render()
        for step in range(5):
            edit = None
            while edit is None:
                edit = random_edit(draw, draw.choice(OPERATIONS), scene)
            picture = pipe(image=picture, prompt=edit.prompt, seed=step, **exact(edit)).image
            scene = edit.target
        same += not check_identities(scene, np.asarray(picture, float))
        total += 1
    assert same >= total - 1


@pytest.mark.slow
def test_fifty_edits_at_28_steps(pipe: KontextPipeline) -> None:
    """One of each operation and colour, on the largest grid."""
    share, untouched, table = carry_out(pipe, edits(50, seed=1, grids=[(3, 3)]), num_inference_steps=28)
    assert share >= 0.98 and untouched >= 34, table

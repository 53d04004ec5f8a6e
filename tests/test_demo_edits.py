"""The demo model carries out instructions: twenty in the ordinary tests, six hundred in the slow ones."""

from collections import defaultdict
from collections.abc import Iterable

import pytest
from judge import judge
from scenes import Edit, edits

from mlx_kontext import KontextPipeline


@pytest.fixture(scope="module")
def pipe() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def carry_out(pipe: KontextPipeline, wanted: Iterable[Edit]) -> tuple[float, str]:
    """Share of edits that came out right, and a table of operations and complaints."""
    right, wrong = defaultdict(list), []
    for seed, edit in enumerate(wanted):
        source = edit.source.render()
        verdict = judge(edit, source, pipe(image=source, prompt=edit.prompt, seed=seed).image)
        right[edit.operation].append(verdict.right)
        if not verdict.right:
            wrong.append(f"{edit.prompt}: {'; '.join(verdict.complaints)}")
    rows = [f"{name:12} {sum(r):4} of {len(r)}" for name, r in right.items()]
    every = [r for results in right.values() for r in results]
    return sum(every) / len(every), "\n".join([f"{sum(every)} of {len(every)} right", *rows, *wrong])


def test_twenty_fixed_edits(pipe: KontextPipeline) -> None:
    share, table = carry_out(pipe, edits(20, seed=2))
    assert share >= 0.95, table


@pytest.mark.slow
def test_six_hundred_edits(pipe: KontextPipeline) -> None:
    share, table = carry_out(pipe, (edit for seed in (1, 2, 3) for edit in edits(200, seed=seed)))
    print(table)
    assert share >= 0.95, table

"""Kept latents drift less than PNGs; `assets/demo/drift.py` measures it on hundreds of chains."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "assets" / "demo" / "drift.py"


@pytest.mark.slow
def test_chains_through_latents_and_through_pngs(tmp_path: Path) -> None:
    options = ["--chains", "12", "--steps", "4", "--json", str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(results) == 12 and "12 pairs of chains of 10 edits" in done.stdout
    same = {way: np.mean([r[way]["same"] for r in results]) for way in ("latents", "png")}
    untouched = {way: np.nanmean([r[way]["untouched"][4:] for r in results]) for way in ("latents", "png")}
    assert same["latents"] >= max(same["png"], 0.98), done.stdout
    assert untouched["latents"] > untouched["png"], done.stdout

"""The full-size model is opened, counted and judged from headers alone: 34 GB of files that take no room on disk."""

import dataclasses
import json
import resource
import shutil
import struct
import time
from pathlib import Path

import pytest

from mlx_kontext import plan as planning
from mlx_kontext.backend import tree_flatten
from mlx_kontext.hub import demo_folder
from mlx_kontext.inspection import inspect_model
from mlx_kontext.plan import gigabytes
from mlx_kontext.weights.load import MODELS

PARAMETERS = {
    "transformer": 11_901_408_320,
    "vae": 83_819_683,
    "text_encoder": 123_060_480,
    "text_encoder_2": 4_762_310_656,
}


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A sound bf16 safetensors file whose tensors are a hole in the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our folder with FLUX.1 Kontext's sizes; the text files are the demo's."""
    folder = Path(shutil.copytree(demo_folder(), tmp_path_factory.mktemp("full") / "FLUX.1-Kontext-dev"))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KontextPipeline"}))
    for part, (config, model) in MODELS.items():
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(dataclasses.asdict(config())))
        shapes = {name: value.shape for name, value in tree_flatten(model(config()).parameters())}
        write_sparse(folder / part / "model.safetensors", shapes)
    return folder


def test_full_size_is_counted_without_being_read(full_size: Path) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = inspect_model(str(full_size), "bfloat16")
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert {name: part.parameters for name, part in found.parts.items()} == PARAMETERS
    assert (found.width, found.height) == (1024, 1024)
    assert "11,901,408,320 parameters   780 tensors   23.8 GB  BF16" in found.page()


@pytest.mark.parametrize(
    ("machine", "budget", "fits", "keep_all"),
    [("16 GB Mac", 11.5e9, False, False), ("32 GB Mac", 22.9e9, False, False), ("48 GB Mac", 38e9, True, True)],
)
def test_verdicts(
    full_size: Path, monkeypatch: pytest.MonkeyPatch, machine: str, budget: float, fits: bool, keep_all: bool
) -> None:
    monkeypatch.setattr(planning, "memory_budget", lambda: int(budget))
    monkeypatch.setattr(planning, "accelerator", lambda: "metal")
    plan = inspect_model(str(full_size), "bfloat16").plan
    assert (plan.fits, plan.keep_all) == (fits, keep_all), machine
    assert gigabytes(plan.peak) == ("37.1 GB" if keep_all else "27.4 GB")  # the README's figures
    assert plan.weights["vae"] == 4 * PARAMETERS["vae"] and plan.weights["transformer"] == 2 * PARAMETERS["transformer"]


def test_sixteen_bits_halve_the_memory(full_size: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "accelerator", lambda: "metal")
    half, whole = (inspect_model(str(full_size), dtype).plan for dtype in ("bfloat16", "float32"))
    assert 1.8 < whole.denoise / half.denoise < 2.05


@pytest.mark.parametrize(
    ("scheme", "transformer", "peak"),
    [("q8", 12_708_227_200, "16.3 GB"), ("q6", 10_556_549_248, "14.1 GB"), ("q4m", 9_196_415_104, "12.8 GB")],
)
def test_what_quantizing_would_save(
    full_size: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, transformer: int, peak: str
) -> None:
    """Text encoders and transformer taking turns; 27.4 GB unquantized."""
    monkeypatch.setattr(planning, "memory_budget", lambda: int(15e9))
    monkeypatch.setattr(planning, "accelerator", lambda: "metal")
    plan = inspect_model(str(full_size), "bfloat16", scheme).plan
    assert (plan.weights["transformer"], gigabytes(plan.peak), plan.fits) == (transformer, peak, scheme != "q8")

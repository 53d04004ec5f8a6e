"""Is this installation sound? One page that a stranger can paste: the machine, and with `selftest` every kernel we use.

Nothing here was written with a Mac at hand, so the page is how Metal gets tested: each check runs on each device there is,
against numpy in float64, against the CPU, or against results stored beside the demo model.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import __version__
from .backend import HAS_OPENBLAS, accelerator, compute_dtype, devices, memory_budget, mx, on_device, physical_memory
from .config import settings
from .edit import EditResult
from .errors import KontextError
from .hub import demo_folder, find_model
from .image import noise, pack, to_array
from .pipeline import KontextPipeline
from .plan import gigabytes

_PACKAGES = (
    "mlx",
    "mlx-metal",
    "mlx-cpu",
    "numpy",
    "pillow",
    "tokenizers",
    "sentencepiece",
    "huggingface_hub",
    "click",
)
_PROMPT, _SEED, _STORED = "make the circle green", 7, "selftest.json"
_SAMPLES = 64  # numbers kept of each stored array, evenly spread
_TORCH_NOISE = (-1.125840, -1.152360, -0.250579, -0.433879)  # torch.manual_seed(0); torch.randn(1, 16, 128, 128)

# Largest difference allowed, relative to the largest value. GPUs may run fp32 products in TF32, with 10 bits of fraction (M5 and
# recent CUDA cards do), so fp32 is wider there. 16-bit formats round every result to 11 or 8 bits.
_LIMITS = {
    ("cpu", "float32"): 1e-5,
    ("gpu", "float32"): 5e-3,
    ("cpu", "float16"): 5e-3,
    ("gpu", "float16"): 1e-2,
    ("cpu", "bfloat16"): 4e-2,
    ("gpu", "bfloat16"): 4e-2,
}
Pipes = Callable[[str], KontextPipeline]  # dtype -> the demo model in it, on the device under test
_MODES = [("affine", bits, group) for bits in (3, 4, 5, 6, 8) for group in (32, 64, 128)]
_MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@dataclass(frozen=True)
class Row:
    """One check: what was measured, and the most it may be (no limit for figures that only inform)."""

    name: str
    device: str
    ok: bool
    figure: float | None
    limit: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The machine in words, and the checks that were run."""

    about: dict[str, str]
    rows: tuple[Row, ...] = ()

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {"about": self.about, "ok": self.ok, "checks": [dataclasses.asdict(row) for row in self.rows]}

    def page(self) -> str:
        """At most 60 lines of 100 columns."""
        lines = [f"{name:14} {value}"[:100] for name, value in self.about.items()]
        for row in self.rows:
            figure = "" if row.figure is None else f"{row.figure:.2e}" if row.limit is not None else f"{row.figure:.4g}"
            limit = "" if row.limit is None else f"<= {row.limit:.0e}"
            verdict = "ok" if row.ok else "FAIL"
            lines.append(
                f"{verdict:4} {row.device:5} {row.name:40} {figure:>9} {limit:8} {row.seconds:5.1f} s {row.note}"[:100]
            )
        if self.rows:
            failed = sum(not row.ok for row in self.rows)
            lines.append(f"{len(self.rows)} checks, " + (f"{failed} FAILED" if failed else "all ok"))
        return "\n".join(lines)


def diagnose(selftest: bool) -> Report:
    """Describe the machine; with `selftest` run every check on every device. Never raises for a check that fails."""
    rows: list[Row] = []
    if selftest:
        for device in devices():
            rows += [run_check(name, device, limit, check) for name, limit, check in checks(device)]
        if len(devices()) == 1:
            rows.append(Row("no GPU here: Metal and CUDA not tested", "", True, None, None, 0.0))
    return Report(describe(), tuple(rows))


def describe() -> dict[str, str]:
    """Versions, machine, devices, models. No user name, no folders."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    info = mx.device_info()
    system = (
        f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"
    )
    about = {
        "mlx_kontext": f"{__version__}, Python {platform.python_version()}",
        "packages": ", ".join(versions[:5]),
        "": ", ".join(versions[5:]),
        "system": f"{system}, {platform.machine()}, {os.cpu_count()} cores, {gigabytes(physical_memory())}",
        "device": f"{accelerator()}, {info.get('device_name', 'unnamed')} {info.get('architecture', '')}".strip(),
        "memory": f"{gigabytes(memory_budget())} for a run",
        "computes in": str(compute_dtype()).removeprefix("mlx.core."),
        "free disk": gigabytes(shutil.disk_usage(Path.home()).free),
    }
    if sys.platform.startswith("linux"):
        about["OpenBLAS"] = (
            "found" if HAS_OPENBLAS else "not found; fp32 is many times slower: apt install libopenblas0-pthread"
        )
    for name, model in {"demo model": "demo", "default model": settings()["model"].value}.items():
        try:
            find_model(model, local_files_only=True)
            about[name] = "present"
        except KontextError:
            about[name] = "not on this machine"
    return about


def run_check(name: str, device: str, limit: float | None, check: Callable[[], float | None]) -> Row:
    """One row; a check that raises is one that failed."""
    started = time.perf_counter()
    try:
        with on_device(devices()[device]):
            figure = check()
        ok, note = figure is None or limit is None or bool(figure <= limit), ""  # NaN is not below a limit
    except Exception as error:
        ok, figure, note = False, None, " ".join(f"{type(error).__name__}: {error}".split())
    return Row(name, device, ok, figure, limit, time.perf_counter() - started, note)


def checks(device: str) -> Iterator[tuple[str, float | None, Callable[[], float | None]]]:
    """Name, limit and function of every check on one device; the functions run with that device as the default."""
    kind = "cpu" if device == "cpu" else "gpu"
    fp32 = _LIMITS[kind, "float32"]
    yield "noise equals torch's", 1e-6, lambda: _off(noise(0, 128, 128, 16)[0, 0, :4, 0], np.array(_TORCH_NOISE))
    for dtype in ("float32", "float16", "bfloat16"):
        limit = _LIMITS[kind, dtype]
        yield f"products and norms, {dtype}", limit, partial(check_products, dtype)
        yield f"attention, {dtype}", limit, partial(check_attention, dtype)
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        kinds = [(bits, group) for name, bits, group in _MODES if name == mode]
        what = f"quantized products, {mode} ({len(kinds)} kinds)"
        yield what, 10 * fp32, partial(check_quantized, mode, kinds)
    pipes: dict[str, KontextPipeline] = {}

    def pipe(dtype: str) -> KontextPipeline:
        return pipes.setdefault(dtype, KontextPipeline.from_pretrained("demo", dtype=dtype))

    found = cache(stages)  # one edit serves five rows
    for what in ("t5", "clip", "reference", "velocity", "latents"):
        limit = 20 * fp32  # errors add up over eight steps and forty layers
        yield f"demo {what}, float32, as stored", limit, partial(check_stored, what, lambda: found(pipe("float32")))
    for dtype, limit in {"float32": 1e-2, "float16": 1e-2, "bfloat16": 2e-2}.items():
        yield f"demo picture, {dtype}, mean off", limit, partial(check_picture, dtype, pipe)
    for size in ((16, 16), (48, 80), (112, 64)):
        yield (
            f"VAE at {size[0]}x{size[1]}, against the CPU",
            20 * fp32,
            partial(check_vae, pipe, *size),
        )
    yield "demo, seconds a step", None, partial(time_step, pipe)
    for dtype in ("float32", "float16", "bfloat16"):
        yield f"product speed, {dtype}, TFLOP/s", None, partial(time_product, device, dtype)


def check_products(dtype: str) -> float:
    """Matrix product with bias, layer norm, RMS norm at sizes that fill no tile."""
    draw = np.random.default_rng(0)
    x, w, b = (draw.normal(size=size) for size in ((77, 300), (300, 129), (129,)))
    (mx_x, x), (mx_w, w), (mx_b, b) = (_in(dtype, value) for value in (x, w, b))
    centred = x - x.mean(-1, keepdims=True)
    return max(
        _off(mx.addmm(mx_b, mx_x, mx_w), x @ w + b),
        _off(mx.fast.layer_norm(mx_x, None, None, 1e-6), centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6)),
        _off(mx.fast.rms_norm(mx_x, None, 1e-6), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)),
    )


def check_attention(dtype: str) -> float:
    """Our three uses: plain at odd lengths and with more keys than queries, T5's added bias without scale, CLIP's causal mask."""
    draw, worst = np.random.default_rng(0), 0.0
    cases = [(32, 77, 77, ""), (64, 513, 513, ""), (128, 200, 1000, ""), (64, 77, 77, "bias"), (64, 77, 77, "causal")]
    for size, queries, keys, mask in cases:
        q, k, v = (draw.normal(size=(1, 2, length, size)) for length in (queries, keys, keys))
        (mx_q, q), (mx_k, k), (mx_v, v) = (_in(dtype, value) for value in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) * size**-0.5
        given: mx.array | str | None = None
        if mask == "bias":
            given, bias = _in(dtype, draw.normal(size=(1, 2, queries, keys)))
            scores = scores + bias
        elif mask == "causal":
            given, scores = "causal", np.where(np.tri(queries, keys, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        exact = weights / weights.sum(-1, keepdims=True) @ v
        out = mx.fast.scaled_dot_product_attention(mx_q, mx_k, mx_v, scale=size**-0.5, mask=given)
        worst = max(worst, _off(out, exact))
    return worst


def check_quantized(mode: str, kinds: list[tuple[int, int]]) -> float:
    """The worst of several (bits, group size) of one mode."""
    return max(check_quantization(mode, bits, group) for bits, group in kinds)


def check_quantization(mode: str, bits: int, group: int) -> float:
    """Dequantized weights are the CPU's, and the fused product equals the dense one, in fp32."""
    draw = np.random.default_rng(0)
    w, x = (mx.array(draw.normal(size=size).astype(np.float32)) for size in ((96, 256), (5, 256)))
    packed = mx.quantize(w, group_size=group, bits=bits, mode=mode)
    options: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
    plain = mx.dequantize(*packed, **options).astype(mx.float32)
    with on_device(devices()["cpu"]):
        mx.eval(packed)
        same = _off(plain, np.array(mx.dequantize(*packed, **options).astype(mx.float32)))
    return max(same, _off(mx.quantized_matmul(x, *packed, **options), np.array(x, float) @ np.array(plain, float).T))


def check_stored(what: str, found: Callable[[], dict[str, np.ndarray]]) -> float:
    """One stage of the demo edit against the stored samples of it."""
    stored = json.loads((demo_folder() / _STORED).read_text())
    return _off(np.array(_samples(found()[what])), np.array(stored[what]))


def check_picture(dtype: str, pipe: Pipes) -> float:
    """Mean difference of the edited picture to the stored one, 0 … 1."""
    with Image.open(demo_folder() / "selftest.png") as stored:
        return float(np.abs(np.array(_edit(pipe(dtype)).image, float) - np.array(stored, float)).mean() / 255)


def check_vae(pipe: Pipes, width: int, height: int) -> float:
    """Encode and decode at an odd size, here and on the CPU."""
    picture = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32))
    vae = pipe("float32").vae
    here = vae.decode(vae.encode(picture))
    mx.eval(here)
    with on_device(devices()["cpu"]):
        exact = np.array(vae.decode(vae.encode(picture)))
    return _off(here, exact)


def stages(pipe: KontextPipeline) -> dict[str, np.ndarray]:
    """The arrays a wrong kernel would show in, in the order they arise."""
    conditioning = pipe.text.encode(_PROMPT, pipe.defaults.max_sequence_length)
    width, height = _edit(pipe).image.size
    start = pack(noise(_SEED, height // 8, width // 8, 16))
    with Image.open(_input()) as picture:
        pixels = to_array(picture.convert("RGB"), width, height)
    found = {
        "t5": conditioning.txt,
        "clip": conditioning.vec,
        "reference": pipe.vae.encode(mx.array(pixels)),
        "velocity": start - _edit(pipe, num_inference_steps=1).latents,
        "latents": _edit(pipe).latents,
    }
    return {name: np.array(mx.array(value).astype(mx.float32)) for name, value in found.items()}


def store() -> None:
    """Keep this machine's fp32 CPU results as the ones to compare with; for whoever replaces the demo model."""
    with on_device(devices()["cpu"]):
        pipe = KontextPipeline.from_pretrained("demo", dtype="float32")
        values = {name: _samples(value) for name, value in stages(pipe).items()}
        (demo_folder() / _STORED).write_text(json.dumps(values) + "\n")
        _edit(pipe).image.save(demo_folder() / "selftest.png")


def time_step(pipe: Pipes) -> float:
    dtype = str(compute_dtype()).removeprefix("mlx.core.")
    return min(step.seconds for step in pipe(dtype).stream(image=_input(), prompt=_PROMPT, seed=_SEED))


def time_product(device: str, dtype: str) -> float:
    """TFLOP/s of a square product, best of three."""
    side = 512 if device == "cpu" else 4096
    x = mx.random.normal((side, side)).astype(getattr(mx, dtype))
    mx.eval(x @ x)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(x @ x)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e12


def _edit(pipe: KontextPipeline, **options: Any) -> EditResult:
    result = pipe(image=_input(), prompt=_PROMPT, seed=_SEED, **options)
    assert isinstance(result, EditResult)  # one seed, one result
    return result


def _input() -> Path:
    return demo_folder() / "selftest-input.png"


def _in(dtype: str, value: np.ndarray) -> tuple[mx.array, np.ndarray]:
    """An array rounded to `dtype`, on the device and exactly in float64."""
    rounded = mx.array(value.astype(np.float32)).astype(getattr(mx, dtype))
    return rounded, np.array(rounded.astype(mx.float32), np.float64)


def _off(found: Any, exact: np.ndarray) -> float:
    """Largest difference relative to the largest exact value; NaN if anything is not finite."""
    values = np.array(mx.array(found).astype(mx.float32), np.float64)
    return float(np.abs(values - exact).max() / np.abs(exact).max())


def _samples(value: np.ndarray) -> list[float]:
    flat = value.ravel()
    return [float(x) for x in flat[np.linspace(0, flat.size - 1, _SAMPLES).astype(int)]]


if __name__ == "__main__":
    if sys.argv[1:] != ["--store"]:
        sys.exit(
            "usage: python -m mlx_kontext.doctor --store   (replaces the stored results; see mlx-kontext doctor --selftest)"
        )
    store()

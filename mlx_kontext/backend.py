"""The one door to MLX: load it well, say what this machine is, choose the number format.

Every other module takes `mx` and `nn` from here, so that OpenBLAS is in place before MLX starts and a machine that
cannot run MLX gets one clear line. Whatever differs between Metal, CUDA and CPU is decided in this file.
"""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator

from .errors import KontextError, RequestError


def preload_openblas() -> bool:
    """Put OpenBLAS in front of the slow BLAS inside MLX's Linux wheel: 5 -> 200 GFLOP/s in fp32. True if it was found."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        return True
    return False


def why_no_mlx(error: ImportError) -> str:
    """One line for a machine on which `import mlx.core` failed."""
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return "MLX needs a Mac with Apple silicon (M1 or newer) and a native arm64 Python; this Python is x86_64"
        if int(platform.mac_ver()[0].split(".")[0] or 0) < 14:
            return f"MLX needs macOS 14 or newer; this is {platform.mac_ver()[0]}: update macOS, then pip install mlx"
        return f"MLX cannot be loaded ({error}); type: pip install --force-reinstall mlx"
    if sys.platform.startswith("linux"):
        return f'MLX cannot be loaded ({error}); type: pip install "mlx[cpu]" (or "mlx[cuda13]" in place of it)'
    return "mlx_kontext runs on macOS (Apple silicon) and Linux; on Windows use WSL"


HAS_OPENBLAS = preload_openblas()
try:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
except ImportError as error:
    raise KontextError(why_no_mlx(error)) from None

__all__ = [
    "HAS_OPENBLAS",
    "accelerator",
    "compute_dtype",
    "devices",
    "memory_budget",
    "mx",
    "nn",
    "on_device",
    "part_dtype",
    "physical_memory",
    "tree_flatten",
]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def accelerator() -> str:
    """Where MLX computes by default: "metal", "cuda" or "cpu"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _prepare_cpu() -> None:
    """On CPU mx.compile calls a C++ compiler at run time, which costs seconds or is missing: do without."""
    if accelerator() == "cpu":
        mx.disable_compile()


_prepare_cpu()


def devices() -> dict[str, mx.DeviceType]:
    """Every device MLX can compute on here: "cpu", then "metal" or "cuda" where there is one."""
    found = {"cpu": mx.DeviceType(mx.cpu)}
    if mx.is_available(mx.gpu):
        found["metal" if mx.metal.is_available() else "cuda"] = mx.DeviceType(mx.gpu)
    return found


@contextlib.contextmanager
def on_device(device: mx.DeviceType) -> Iterator[None]:
    """Compute on this device inside the block, without mx.compile on the CPU; afterwards all is as it was."""
    before = mx.default_device()
    mx.set_default_device(device)
    _prepare_cpu()
    try:
        yield
    finally:
        mx.set_default_device(before)
        if before != mx.cpu and "MLX_DISABLE_COMPILE" not in os.environ:  # the user's own switch stays off
            mx.enable_compile()


def compute_dtype(name: str | None = None) -> mx.Dtype:
    """The format activations and weights are computed in: bf16 on Metal and CUDA, fp32 on CPU, or the one named.

    bf16 on CPU is slow, and MLX's quantized product there accumulates in bf16 (12 % error at 12288 terms).
    """
    if name is None:
        return mx.float32 if accelerator() == "cpu" else mx.bfloat16
    if name not in DTYPES:
        raise RequestError(f"dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def part_dtype(part: str, dtype: mx.Dtype) -> mx.Dtype:
    """What one part computes in when the transformer computes in `dtype`.

    The VAE is small and shows banding in bf16 and overflows in fp16: always fp32. T5 overflows in fp16: bf16 there.
    """
    if part == "vae":
        return mx.float32
    if part == "text_encoder_2" and dtype == mx.float16:
        return mx.bfloat16
    return dtype


def physical_memory() -> int:
    """Bytes of RAM in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_budget() -> int:
    """Bytes a run may hold without hurting the machine: Metal's working set, a CUDA card's memory, or 3/4 of RAM."""
    if accelerator() != "cpu":
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory"):
            if key in info:
                return int(info[key])
    return physical_memory() * 3 // 4

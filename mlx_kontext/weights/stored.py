"""Tensors as files hold them: plain, fp8, MLX's groups or GGUF's blocks; and one function that makes arrays of them.

Everything is decided by headers. fp8 becomes numbers by a table of its 256 codes: MLX gives e4m3 as bytes and refuses
whole files for one e5m2. Decoding is lazy where MLX can read the file, and tensor by tensor where it cannot.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backend import mx
from ..errors import CheckpointError
from ..models.quantized import Packing
from . import ggml
from .formats import Tensors
from .gguf import GGUF, GGUFTensor, read_gguf
from .header import TensorInfo, _cut, _line, _opened, read_header, read_index

FP8 = ("F8_E4M3", "F8_E5M2")
_PLAIN = ("F32", "F16", "BF16")
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
_NUMPY = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "U8": "u1",
    "I8": "i1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "U32": "<u4",
}
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's old and new word for what fp8 and int8 weights are multiplied by
_ASIDE = (*_SCALES, "scale_input", "input_scale", "comfy_quant")  # not weights; input scales serve fp8 products only
_MAX_NOTES = 2**20  # letters of ComfyUI's metadata; 8 MB of JSON could take 300 MB to parse
_INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file. name: as the file says; info.dtype may be GGUF's word for a type.

    odd_file: whether MLX cannot read the file.
    """

    name: str
    path: Path
    info: TensorInfo
    block: GGUFTensor | None = None
    odd_file: bool = False


@dataclass(frozen=True)
class Contents:
    """What the files of one source hold, from headers alone."""

    where: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    gguf: GGUF | None = None


def read_contents(where: Path) -> Contents:
    """Headers of a file, or of a folder's shards. Raises CheckpointError for all but sound safetensors and GGUF files."""
    paths = _shards(where) if where.is_dir() else [where]
    if len(paths) == 1 and _is_gguf(paths[0]):
        gguf = read_gguf(paths[0])
        tensors = {
            name: Stored(name, where, TensorInfo(entry.type, entry.shape, entry.nbytes), entry)
            for name, entry in gguf.tensors.items()
        }
        return Contents(where, tensors, {k: v for k, v in gguf.metadata.items() if isinstance(v, str)}, gguf)
    found: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = read_header(path)
        metadata |= header.metadata
        odd = any(info.dtype == "F8_E5M2" for info in header.tensors.values())
        for name, info in header.tensors.items():
            if name in found:
                raise CheckpointError(_line(f"{path}: {name} is in another shard too; download the model again"))
            found[name] = Stored(name, path, info, odd_file=odd)
    return Contents(where, found, metadata)


def _shards(folder: Path) -> list[Path]:
    for name in _INDEXES:
        if (folder / name).is_file():
            return sorted(set(read_index(folder / name).values()))
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder} has no safetensors files; give the file of one part, or its folder")
    return found


def _is_gguf(path: Path) -> bool:
    with _opened(path) as file:
        return file.read(4) == b"GGUF"


def read_bytes(stored: Stored) -> np.ndarray:
    """The numbers of one tensor of a safetensors file, as numpy holds them (bf16 as uint16, fp8 as bytes)."""
    with _opened(stored.path) as file:
        file.seek(stored.info.begin)
        raw = file.read(stored.info.nbytes)
        if len(raw) < stored.info.nbytes:
            raise ValueError(f"the file has become shorter, {_cut(stored.name)} is cut off")
    return np.frombuffer(raw, _NUMPY[stored.info.dtype]).reshape(stored.info.shape)


def check(where: Path, tensors: Mapping[str, Stored]) -> None:
    """Raises CheckpointError for a tensor of a type we do not decode, or one whose scales are missing or misshaped."""
    scaled = "scaled_fp8" in tensors or any(name.endswith(_SCALES) for name in tensors)
    for name, stored in tensors.items():
        stem, _, kind = name.rpartition(".")
        dtype, scale = stored.info.dtype, _scale(tensors, stem)
        if stored.block or dtype in _PLAIN or _is_aside(name):
            continue
        if dtype == "U32" and kind == "weight":
            for other in ("scales", "biases"):
                if f"{stem}.{other}" not in tensors:
                    raise _wrong(where, f"{name} is quantized and {stem}.{other} is missing")
                if tensors[f"{stem}.{other}"].info.dtype not in _PLAIN or len(stored.info.shape) != 2:
                    raise _wrong(where, f"{stem} is quantized in a way this version does not read (affine groups are)")
        elif dtype in FP8 or dtype == "I8":
            if scale is None and kind == "weight" and len(stored.info.shape) > 1 and (scaled or dtype == "I8"):
                raise _wrong(where, f"{name} is {dtype} and {stem}.scale_weight (or weight_scale) is missing")
            if kind == "weight" and scale and not _fits(scale.info, stored.info.shape[:1]):
                told = f"{scale.name} is {scale.info.dtype} {list(scale.info.shape)}"
                raise _wrong(
                    where, f"{told}; expected one number, or one for each of {(*stored.info.shape, 1)[0]} rows"
                )
        else:
            raise _wrong(where, f"{name} is {dtype}; this version reads F32, F16, BF16, fp8, MLX's groups and GGUF")


def _fits(scale: TensorInfo, rows: tuple[int, ...]) -> bool:
    return scale.dtype in _PLAIN and scale.shape in ((), (1,), (1, 1), rows, (*rows, 1))


def _scale(tensors: Mapping[str, Stored], stem: str) -> Stored | None:
    return next((tensors[f"{stem}.{word}"] for word in _SCALES if f"{stem}.{word}" in tensors), None)


def _wrong(where: Path, told: str) -> CheckpointError:
    return CheckpointError(_line(f"{where}: {told}; download the model again, or take its bf16 version"))


def outline(where: Path, tensors: Mapping[str, Stored], *, repacked: bool, dtype: mx.Dtype = mx.float32) -> Tensors:
    """Stand-ins for what `decode` gives, of the same names and shapes, without touching a weight; only to be looked at.

    dtype: of what is decoded. repacked: else blocks of GGUF are as if plain. Raises CheckpointError as `check` does.
    """
    check(where, tensors)
    out: Tensors = {}
    for name, stored in tensors.items():
        if _is_aside(name):
            continue
        if repacked and stored.block and _repacks(name, stored.block):
            packing, scales = Packing(ggml.GROUP, ggml.code_bits(stored.block)), ggml.scale_dtype(stored.block)
            for suffix, (shape, dtype) in packing.tensors(*stored.info.shape).items():
                out[f"{name.removesuffix('weight')}{suffix}"] = mx.zeros(
                    shape, mx.uint32 if dtype == mx.uint32 else scales
                )
        else:
            decoded = stored.block is not None or stored.info.dtype in (*FP8, "I8")
            out[name] = mx.zeros(stored.info.shape, dtype if decoded else _DTYPES[stored.info.dtype])
    return out


def decode(where: Path, tensors: Mapping[str, Stored], dtype: mx.Dtype, *, zero_nan: bool = False) -> Tensors:
    """Name -> array: plain as stored, fp8 and int8 times their scale in `dtype`, groups as weight, scales and biases.

    Blocks of GGUF that MLX can hold become groups whose scales and biases are not rounded; other blocks are in `dtype`.
    zero_nan: codes that are no number are 0, as some T5 in fp8 have them.
    Raises CheckpointError as `check` does, and for scales that are not finite.
    """
    check(where, tensors)
    files: dict[Path, Tensors] = {}
    out: Tensors = {}
    for name, stored in tensors.items():
        stem, _, kind = name.rpartition(".")
        if _is_aside(name):
            continue
        if stored.block:
            out |= _from_block(name, stored.block, dtype)
        else:
            value = _value(stored, files)
            if stored.info.dtype in (*FP8, "I8"):
                scale = _scale(tensors, stem) if kind == "weight" else None
                value = _decoded(value, stored.info.dtype, zero_nan)
                if scale:
                    value = value * _finite(scale, len(stored.info.shape))
                value = value.astype(dtype)
            out[name] = value
    return out


def _is_aside(name: str) -> bool:
    return name.rpartition(".")[2] in _ASIDE or name == "scaled_fp8"


def _repacks(name: str, block: GGUFTensor) -> bool:
    return name.endswith(".weight") and ggml.can_repack(block)


def _from_block(name: str, block: GGUFTensor, dtype: mx.Dtype) -> Tensors:
    if not _repacks(name, block):
        return {name: ggml.load(block, dtype)}
    weight, scales, biases, _, _ = ggml.repack(block, ggml.scale_dtype(block))
    stem = name.removesuffix("weight")
    return {name: weight, f"{stem}scales": scales, f"{stem}biases": biases}


def _value(stored: Stored, files: dict[Path, Tensors]) -> mx.array:
    """The array as stored: lazily, by MLX, unless its file has a type MLX does not know, for which it refuses the file."""
    if not stored.odd_file:
        if stored.path not in files:
            files[stored.path] = mx.load(str(stored.path), format="safetensors")  # type: ignore[assignment]  # a dict
        return files[stored.path][stored.name]
    value = mx.array(read_bytes(stored))
    return value.view(mx.bfloat16) if stored.info.dtype == "BF16" else value


def _decoded(codes: mx.array, dtype: str, zero_nan: bool) -> mx.array:
    if dtype == "I8":
        return codes.astype(mx.float32)
    table = fp8_table(dtype)
    return mx.array(np.nan_to_num(table) if zero_nan else table)[codes.astype(mx.uint32)]


def fp8_table(dtype: str) -> np.ndarray:
    """What each of the 256 codes of an fp8 format is worth, float32. e5m2 is the upper half of float16.

    e4m3fn has 4 bits of exponent, biased by 7, 3 of fraction, no infinities, and no number at 0x7f and 0xff
    (https://arxiv.org/abs/2209.05433).
    """
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)
    exponent, fraction = (codes >> 3 & 15).astype(np.int32), (codes & 7) / 8
    size = np.where(exponent > 0, np.ldexp(1 + fraction, exponent - 7), np.ldexp(fraction, -6))
    size[codes & 127 == 127] = np.nan
    return (np.where(codes > 127, -1.0, 1.0) * size).astype(np.float32)


def _finite(stored: Stored, ndim: int) -> mx.array:
    """A scale as fp32 that multiplies a weight of `ndim` axes; read now, it is small."""
    raw = read_bytes(stored)
    value = (raw.astype("<u4") << 16).view("<f4") if stored.info.dtype == "BF16" else raw.astype(np.float32)
    if not np.isfinite(value).all():
        raise _wrong(stored.path, f"{stored.name} holds a scale that is not a finite number")
    return mx.array(value.reshape(-1, *[1] * (ndim - 1)))


def comfy_formats(contents: Contents) -> dict[str, str]:
    """Layer -> the quantization ComfyUI notes for it, in a small tensor `comfy_quant` or in the metadata."""
    found: dict[str, str] = {}
    try:
        notes = contents.metadata.get("_quantization_metadata", "{}")
        layers = json.loads(notes if len(notes) < _MAX_NOTES else "").get("layers", {})
        for name, stored in contents.tensors.items():
            if name.endswith(".comfy_quant") and stored.info.dtype == "U8" and stored.info.nbytes <= 4096:
                layers[name.removesuffix(".comfy_quant")] = json.loads(read_bytes(stored).tobytes())
        for name, words in layers.items():
            found[name] = str(words["format"]) + (" with convrot" if words.get("convrot") else "")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise _wrong(contents.where, "its notes on quantization are not what ComfyUI writes") from None
    return found


def is_packed(tensors: Mapping[str, Stored]) -> bool:
    """Whether there are groups of MLX or quantized blocks of GGUF among them; fp8 and int8 become plain numbers."""
    return any(
        stored.info.dtype == "U32" or (stored.block is not None and stored.info.dtype not in _PLAIN)
        for stored in tensors.values()
    )

"""The blocks in which GGUF stores weights: to floats, or repacked into MLX's own quantization.

A block is a run of 32 or 256 numbers along a row. In all quantized types but Q6_K it comes down to codes of 4, 5 or 8 bits
without sign, and a scale and a bias for each 32 of them: number = scale * code + bias, MLX's affine quantization in groups
of 32. Layouts: ggml's ggml-common.h and ggml-quants.c.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import mx
from ..errors import CheckpointError
from .gguf import BLOCKS, GGUFTensor
from .header import _cut, _line, _opened

_Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]
_Parts = tuple[NDArray[Any], ...]
_CHUNK = 2**20  # numbers at a time, a multiple of every block: some 20 MB of working memory whatever the tensor
GROUP = 32  # numbers that share a scale once repacked


def dequantize(tensor: GGUFTensor) -> _Floats:
    """The numbers of a tensor as float32, in its shape; read in chunks.

    Raises CheckpointError if the file has become shorter, or holds infinite or undefined numbers.
    """
    out = np.empty(tensor.shape, np.float32)
    flat, at = out.reshape(-1), 0
    for (values,) in _chunks(tensor, _floats(tensor.type)):
        flat[at : at + values.size] = values
        at += values.size
    return out


def load(tensor: GGUFTensor, dtype: mx.Dtype) -> mx.array:
    """The numbers of a tensor as an array of `dtype`, evaluated, in its shape; read in chunks.

    Raises CheckpointError as `dequantize` does, and for numbers too large for `dtype` (over 65504 in float16).
    """
    chunks = [_cast(tensor, values, dtype) for (values,) in _chunks(tensor, _floats(tensor.type))]
    out = mx.concatenate(chunks).reshape(tensor.shape)
    mx.eval(out)
    return out


def can_repack(tensor: GGUFTensor) -> bool:
    """Whether `repack` takes it: a matrix of any quantized type but Q6_K, whose groups of 16 MLX does not have."""
    return tensor.type in _AFFINE and len(tensor.shape) == 2


def code_bits(tensor: GGUFTensor) -> int:
    """Bits of a code of a tensor that `can_repack` says yes to."""
    return _AFFINE[tensor.type][0]


def scale_dtype(tensor: GGUFTensor) -> mx.Dtype:
    """The dtype in which `repack` does not round scales and biases: float32 for K-quants, where they are products."""
    return mx.float32 if tensor.type.endswith("_K") else mx.float16


def repack(tensor: GGUFTensor, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array, int, int]:
    """A matrix [N, K] as MLX holds a quantized one, evaluated: weight [N, K * bits / 32] uint32, scales and biases
    [N, K / 32] of `dtype`, the group size (32) and the bits (4, 5 or 8).

    The codes stay those of the file; only scales and biases are rounded, to `dtype`. In float32 they are exact. In float16
    they are exact for Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, which store them so, and off by up to 2^-11 for Q4_K and Q5_K, where
    they are products. In bfloat16 they are off by up to 2^-8. Where the bias is a multiple of the scale (Q4_0, Q5_0, Q8_0)
    each weight is then off by that 0.4 % at most; else by 0.4 % of scale * code and 0.4 % of the bias: for groups around
    zero up to a tenth of the step between two codes at 4 bits, a fifth at 5.
    Raises CheckpointError as `load` does, and for a tensor that `can_repack` says no to.
    """
    if not can_repack(tensor):
        raise _refusal(tensor, f"is {tensor.type} {list(tensor.shape)}, which MLX cannot hold as it is; dequantize it")
    bits, split = _AFFINE[tensor.type]
    parts: tuple[list[mx.array], list[mx.array], list[mx.array]] = ([], [], [])
    for codes, scales, biases in _chunks(tensor, split):
        parts[0].append(mx.array(_pack(codes, bits)))
        parts[1].append(_cast(tensor, scales, dtype))
        parts[2].append(_cast(tensor, biases, dtype))
    weight, scale, bias = (mx.concatenate(part).reshape(tensor.shape[0], -1) for part in parts)
    mx.eval(weight, scale, bias)
    return weight, scale, bias, GROUP, bits


def _chunks(tensor: GGUFTensor, make: Callable[[_Bytes], _Parts]) -> Iterator[_Parts]:
    """What `make` makes of the blocks [n, bytes of a block] of a tensor, flat, at most _CHUNK numbers at a time."""
    numbers, nbytes = BLOCKS[tensor.type]
    step = _CHUNK // numbers * nbytes
    with _opened(tensor.path) as file:
        file.seek(tensor.offset)
        for at in range(0, tensor.nbytes, step):
            raw = file.read(min(step, tensor.nbytes - at))
            if len(raw) < min(step, tensor.nbytes - at):
                raise ValueError(f"the file has become shorter, {_cut(tensor.name)} is cut off")
            with np.errstate(all="ignore"):  # looked for below
                parts = tuple(part.reshape(-1) for part in make(np.frombuffer(raw, np.uint8).reshape(-1, nbytes)))
            if not all(np.isfinite(part).all() for part in parts):
                raise ValueError(f"{_cut(tensor.name)} holds infinite or undefined numbers")
            yield parts


def _cast(tensor: GGUFTensor, values: NDArray[Any], dtype: mx.Dtype) -> mx.array:
    out = mx.array(values).astype(dtype)
    if not mx.all(mx.isfinite(out)).item():
        name = str(dtype).removeprefix("mlx.core.")
        raise _refusal(tensor, f"holds numbers too large for {name}; take bfloat16 or float32")
    return out


def _refusal(tensor: GGUFTensor, told: str) -> CheckpointError:
    return CheckpointError(_line(f"{tensor.path}: {_cut(tensor.name)} {told}"))


def _pack(codes: _Bytes, bits: int) -> NDArray[np.uint32]:
    """Codes into a row of bits, lowest bit first, cut into uint32: the order of mx.quantize for any number of bits."""
    packed = codes
    if bits == 4:
        packed = codes[0::2] | codes[1::2] * np.uint8(16)
    elif bits == 5:  # 8 codes are 40 bits, the low 5 bytes of 8
        wide = codes.reshape(-1, 8).astype("<u8") << np.arange(0, 40, 5, dtype="<u8")
        packed = np.bitwise_or.reduce(wide, axis=1)[:, None].view(np.uint8)[:, :5]
    return np.ascontiguousarray(packed).reshape(-1).view("<u4")


# Types whose blocks are floats, or become floats at once: [n, bytes] -> ([n, numbers],)


def _floats(kind: str) -> Callable[[_Bytes], _Parts]:
    if kind not in _AFFINE:
        return _PLAIN[kind]

    def made(raw: _Bytes) -> _Parts:
        codes, scales, biases = _AFFINE[kind][1](raw)
        return (codes.reshape(*scales.shape, GROUP) * scales[..., None] + biases[..., None],)

    return made


def _f32(raw: _Bytes) -> _Parts:
    return (raw.view("<f4"),)


def _f16(raw: _Bytes) -> _Parts:
    return (raw.view("<f2").astype(np.float32),)


def _bf16(raw: _Bytes) -> _Parts:
    return ((raw.view("<u2").astype("<u4") << 16).view("<f4"),)


def _q6_k(raw: _Bytes) -> _Parts:
    """ql [128] low four bits, qh [64] high two, 16 scales of 8 bits, one scale of them all.

    Each half of 128 numbers has 64 bytes of ql, read for their low, then their high nibbles, and 32 bytes of qh, read two
    bits at a time from the lowest up.
    """
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = low.reshape(-1, 16, 16) | high.reshape(-1, 16, 16) << 4
    scales = _half(raw, 208) * raw[:, 192:208].view(np.int8)
    return ((codes.astype(np.float32) - 32) * scales[..., None],)


_PLAIN = {"F32": _f32, "F16": _f16, "BF16": _bf16, "Q6_K": _q6_k}


# Types of codes, scales and biases: [n, bytes] -> ([n, numbers], [n, groups], [n, groups])


def _q4_0(raw: _Bytes) -> _Parts:
    scale = _half(raw, 0)
    return _nibbles(raw[:, 2:]), scale, -8 * scale


def _q4_1(raw: _Bytes) -> _Parts:
    return _nibbles(raw[:, 4:]), _half(raw, 0), _half(raw, 2)


def _q5_0(raw: _Bytes) -> _Parts:
    scale = _half(raw, 0)
    return _nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6]), scale, -16 * scale


def _q5_1(raw: _Bytes) -> _Parts:
    return _nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8]), _half(raw, 0), _half(raw, 2)


def _q8_0(raw: _Bytes) -> _Parts:
    scale = _half(raw, 0)
    return raw[:, 2:] ^ 0x80, scale, -128 * scale  # from signed to 128 more, without sign


def _q4_k(raw: _Bytes) -> _Parts:
    return _nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256), *_k_scales(raw)


def _q5_k(raw: _Bytes) -> _Parts:
    """Bit j of byte i of qh [32] is the fifth bit of number i in group j."""
    fifth = (raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    low = _nibbles(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (low | fifth).reshape(-1, 256), *_k_scales(raw)


_AFFINE: dict[str, tuple[int, Callable[[_Bytes], _Parts]]] = {
    "Q4_0": (4, _q4_0),
    "Q4_1": (4, _q4_1),
    "Q5_0": (5, _q5_0),
    "Q5_1": (5, _q5_1),
    "Q8_0": (8, _q8_0),
    "Q4_K": (4, _q4_k),
    "Q5_K": (5, _q5_k),
}


def _half(raw: _Bytes, at: int) -> _Floats:
    """The float16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(raw: _Bytes) -> _Bytes:
    """[..., m] -> [..., 2 * m]: the low four bits of all bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _fifth_bits(raw: _Bytes) -> _Bytes:
    """[n, 4] -> [n, 32]: bit i, moved to where it is worth 16."""
    return np.unpackbits(raw, axis=1, bitorder="little") * np.uint8(16)


def _k_scales(raw: _Bytes) -> tuple[_Floats, _Floats]:
    """Scales and biases [n, 8] of Q4_K and Q5_K: two float16, and 8 scales and 8 minima of 6 bits packed in 12 bytes.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the others have their low four bits in bytes 8-11
    (scales low, minima high) and their high two bits on top of bytes 0-3 and 4-7.
    """
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return _half(raw, 0) * scales, -_half(raw, 2) * minima

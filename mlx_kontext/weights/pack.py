"""Packing of weights into few bits: one matrix by chunks of rows, a dictionary of tensors one matrix after another."""

from collections.abc import Callable, Mapping

from ..backend import mx
from ..errors import CheckpointError
from ..models.quantized import Packing

Tensors = dict[str, mx.array]

_SEARCHED_BITS = 4  # at 5 bits and more a search gains less than a tenth of the error
_CHUNK = 2**21  # numbers packed at a time: 8 MB in fp32, a dozen such arrays are alive during the search
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
_REFITS = 3


def quantize_tensors(tensors: Tensors, layers: Mapping[str, Packing]) -> None:
    """Pack these layers in place, one after another: above the result only one unpacked matrix is in memory."""
    take = Taker(tensors.pop, layers)
    for path, packing in layers.items():
        for suffix in packing.tensors(1, packing.group_size):
            tensors[f"{path}.{suffix}"] = take(f"{path}.{suffix}")
        mx.clear_cache()


class Taker:
    """Takes tensors by the names they have once packed, packing a matrix when it is first asked for.

    pop: gives a tensor by its name before packing, and keeps no hold of it.
    """

    def __init__(self, pop: Callable[[str], mx.array], layers: Mapping[str, Packing]):
        self._pop, self._layers = pop, layers
        self._ready: Tensors = {}

    def __call__(self, name: str) -> mx.array:
        if name in self._ready:
            return self._ready.pop(name)
        path, _, suffix = name.rpartition(".")
        if path not in self._layers or suffix == "bias":
            return self._pop(name)
        packed = pack_matrix(self._pop(f"{path}.weight"), self._layers[path], path)
        self._ready |= {f"{path}.{key}": value for key, value in packed.items()}
        return self._ready.pop(name)


def pack_matrix(weight: mx.array, packing: Packing, name: str = "weight") -> Tensors:
    """Pack a matrix [rows, columns] by chunks of rows; evaluated. Up to 4 bits the range of each group is searched.

    Returns `weight`, `scales` and, in affine mode, `biases`. Raises CheckpointError for weights that are not finite.
    """
    dtype = scale_dtype(weight, name) if packing.mode == "affine" else mx.float32
    rows = max(1, _CHUNK // weight.shape[1])
    chunks = []
    for start in range(0, weight.shape[0], rows):
        chunk = weight[start : start + rows]
        packed: tuple[mx.array, ...]
        if packing.mode == "affine" and packing.bits <= _SEARCHED_BITS:
            packed = search(chunk, packing, dtype)
        else:  # in fp32, where MLX is fastest on a CPU; codes are chosen before scales are rounded in any dtype
            packed = mx.quantize(chunk.astype(mx.float32), packing.group_size, packing.bits, packing.mode)
            if packing.mode == "affine":
                packed = (packed[0], *(x.astype(dtype) for x in packed[1:]))
        mx.eval(packed)
        chunks.append(packed)
    names = ("weight", "scales", "biases")
    result = {name: mx.concatenate(parts) for name, *parts in zip(names, *chunks, strict=False)}
    mx.eval(result)
    return result


def scale_dtype(weight: mx.array, name: str) -> mx.Dtype:
    """The dtype of scales and biases: fp16, or bf16 for weights too large or too small for it.

    At 8 bits a bf16 scale errs as much as the rounding of the weight: relative error 0.8 % with bf16, 0.5 % with fp16.
    """
    # by columns first: MLX reduces that way ten times faster on a CPU
    largest = float(mx.maximum(weight.max(axis=0), -weight.min(axis=0)).astype(mx.float32).max().item())  # type: ignore[arg-type]
    if not largest < float("inf"):
        raise CheckpointError(f"{name} holds numbers that are not finite; download the model again")
    # below the first bound even the largest step of an 8-bit group is a denormal of fp16; zeros fit any
    return mx.float16 if largest == 0 or 2**-7 < largest < 2**15 else mx.bfloat16


def search(weight: mx.array, packing: Packing, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize a matrix with the scale and bias of each group that make the squared error of its weights least.

    No data are needed: a few outliers cost less when clipped than the step they force on their 63 neighbours. Tried are
    MLX's own scale and bias, the range shrunk by several factors, and the best of these refitted to the codes it gave
    (least squares). So the error is never above that of mx.quantize. Returns weight, scales, biases.
    """
    top = 2**packing.bits - 1
    groups = weight.astype(mx.float32).reshape(weight.shape[0], -1, packing.group_size)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)

    def rounded(scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
        """As they will be stored; a step of zero, in a group of one number, would divide by zero."""
        scale, bias = scale.astype(dtype).astype(mx.float32), bias.astype(dtype).astype(mx.float32)
        return mx.where(scale == 0, 2.0**-14, scale), bias

    def codes(scale: mx.array, bias: mx.array) -> mx.array:
        return mx.clip(mx.round((groups - bias) / scale), 0, top)

    def error(scale: mx.array, bias: mx.array) -> mx.array:
        return mx.square(codes(scale, bias) * scale + bias - groups).sum(axis=-1, keepdims=True)

    _, *plain = mx.quantize(weight.astype(dtype), packing.group_size, packing.bits)
    scale, bias = rounded(plain[0][..., None], plain[1][..., None])
    least = error(scale, bias)
    for shrink in (*_SHRINKS, *[None] * _REFITS):
        if shrink is not None:
            found = rounded((high - low) * shrink / top, low * shrink)
        else:  # the line through the codes of the best so far
            code = codes(scale, bias)
            code_mean, mean = code.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
            spread = mx.square(code - code_mean).sum(axis=-1, keepdims=True)
            slope = ((code - code_mean) * (groups - mean)).sum(axis=-1, keepdims=True) / mx.maximum(spread, 1e-12)
            found = rounded(slope, mean - slope * code_mean)
        now = error(*found)
        better = now < least
        scale, bias = mx.where(better, found[0], scale), mx.where(better, found[1], bias)
        least = mx.minimum(now, least)
        mx.eval(scale, bias, least)  # one candidate in memory at a time
    packed = pack_codes(codes(scale, bias).astype(mx.uint32).reshape(weight.shape), packing.bits)
    return packed, scale[..., 0].astype(dtype), bias[..., 0].astype(dtype)


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes [rows, columns] as a row of bits, lowest first, cut into uint32: MLX's layout for any number of bits."""
    runs = codes.reshape(codes.shape[0], -1, 32)  # 32 codes are `bits` whole words
    words = []
    for word in range(bits):
        total = mx.zeros(runs.shape[:2], mx.uint32)
        for i in range(32):
            shift = i * bits - 32 * word
            if -bits < shift < 32:
                total = total | (runs[..., i] << shift if shift >= 0 else runs[..., i] >> -shift)
        words.append(total)
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)


def unpack_matrix(packed: Tensors, packing: Packing) -> mx.array:
    """The matrix [rows, columns] in fp32, as an fp32 run sees it."""
    weight, scales, biases = (packed.get(key) for key in ("weight", "scales", "biases"))
    if weight is None or scales is None:
        raise CheckpointError("a packed matrix has no weight or no scales; is this the whole model?")
    if packing.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32) if biases is not None else None
    return mx.dequantize(weight, scales, biases, packing.group_size, packing.bits, packing.mode, dtype=mx.float32)


def relative_error(found: mx.array, exact: mx.array) -> float:
    """Of all numbers together: the Frobenius norm of the difference by that of `exact`, in fp32."""
    exact = exact.astype(mx.float32)
    return float(mx.linalg.norm(found.astype(mx.float32) - exact) / mx.maximum(mx.linalg.norm(exact), 1e-30))

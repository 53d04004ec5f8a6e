"""Quantization: schemes by name, which layer gets how many bits, and the packing of one matrix in bounded memory.

A scheme only says what it wants of each layer; `choose` fits that to the sizes of a model. What stays as stored in every
scheme: embedders of picture, text, time, guidance and pooled vector, the final layer, norms, biases, VAE and CLIP. They are
0.5 % of the parameters, and published experience (SVDQuant, GGUF conversions, mflux) is that pictures suffer there first.
T5 and the modulation layers have 8 bits in every scheme: fewer cost T5 visible meaning, and modulation is computed once a
prompt, so that its bytes hardly count.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from .backend import mx
from .errors import CheckpointError, RequestError
from .models.quantized import Packing

Tensors = dict[str, mx.array]
Shapes = Mapping[str, tuple[int, ...]]

_EIGHT = Packing(64, 8)
_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_FP_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
_BLOCK = re.compile(
    r"(?P<kind>double|single)_blocks\.(?P<index>\d+)\."
    r"(?P<layer>(?P<stream>img|txt)_(attn\.(qkv|proj)|mlp\.[02])|linear[12])"
)
_MODULATION = re.compile(r"(double_blocks\.\d+\.(img|txt)_mod|single_blocks\.\d+\.modulation)\.lin")
_T5 = re.compile(r"shared|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo))")
_SEARCHED_BITS = 4  # at 5 bits and more, clipping gains less than a tenth of the error
_CHUNK = 2**21  # numbers packed at a time: 8 MB in fp32, a dozen such arrays are alive during the search
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
_REFITS = 3


@dataclass(frozen=True)
class Scheme:
    """Bits for the linear layers of the transformer's blocks; the rest is the same in every scheme (see above).

    bits, group_size, mode: as in mlx-lm; affine takes 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, the fp modes have
    sizes of their own. mixed: layers that matter more get more bits. Raises RequestError for what MLX does not have.
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.mode == "affine":
            good = self.bits in _AFFINE_BITS and self.group_size in _AFFINE_GROUPS
        else:
            good = _FP_MODES.get(self.mode) == (self.group_size, self.bits) and not self.mixed
        if not good:
            fp = ", ".join(f"{mode} ({bits} bits in groups of {size})" for mode, (size, bits) in _FP_MODES.items())
            raise RequestError(
                f"no quantization has mode {self.mode!r}, {self.bits!r} bits, groups of {self.group_size!r}; affine takes bits "
                f"{_listed(_AFFINE_BITS)} in groups of {_listed(_AFFINE_GROUPS)}; there are also {fp}"
            )

    @classmethod
    def of(cls, value: "str | int | Scheme | None") -> "Scheme | None":
        """A scheme by name ("q8", "q4m", "none"), by bits (8, "8"), or as it is. Raises RequestError for other words."""
        if value is None or isinstance(value, Scheme):
            return value
        name = str(value).strip().lower()
        if name == "none":
            return None
        if name.isdecimal():
            name = f"q{name}"
        if isinstance(value, bool) or name not in SCHEMES:
            raise RequestError(f"quantize is {value!r}; choose none, {_listed(SCHEMES)}, or bits: 8, 6, 5, 4, 3")
        return SCHEMES[name]

    @property
    def name(self) -> str:
        """Short and unambiguous: q8, q4m, q4-g32, nvfp4."""
        if self.mode != "affine":
            return self.mode
        return f"q{self.bits}" + "m" * self.mixed + f"-g{self.group_size}" * (self.group_size != 64)

    def for_module(self, part: str, path: str, config: Any) -> Packing | None:
        """What the scheme wants of one layer of a part, whatever its size; None: leave it as it is stored.

        config: of the part, for the number of blocks.
        """
        if part == "text_encoder_2":
            return _EIGHT if _T5.fullmatch(path) else None
        if part != "transformer":
            return None
        if _MODULATION.fullmatch(path):
            return _EIGHT
        block = _BLOCK.fullmatch(path)
        if block is None:
            return None
        return Packing(self.group_size, self._mixed_bits(block, config) if self.mixed else self.bits, self.mode)

    def _mixed_bits(self, block: re.Match[str], config: Any) -> int:
        """More bits where an error does most harm: the ends of the network, and the stream that carries the instruction.

        First double and last single blocks at 8 bits: uniform 4 bits on Qwen-Image gave cracked skin, 8 bits at the ends
        removed it. Text stream of the double blocks at 6: it is where the words act, and an eighth of the bytes.
        Of full size: doubles 0-2 and singles 35-37; two thirds of the block weights stay at 4 bits.
        """
        index = int(block["index"])
        if block["kind"] == "double" and index < max(1, round(0.16 * config.num_layers)):
            return 8
        last = config.num_single_layers - max(1, round(0.08 * config.num_single_layers))
        if block["kind"] == "single" and index >= last:
            return 8
        return max(6, self.bits) if block["stream"] == "txt" else self.bits


SCHEMES = {f"q{bits}": Scheme(bits) for bits in (3, 4, 5, 6, 8)} | {"q4m": Scheme(4, mixed=True)}


@dataclass(frozen=True)
class Chosen:
    """The packed layers of one part, and what people should be told about layers that did not fit."""

    layers: dict[str, Packing] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose(scheme: Scheme, part: str, config: Any, shapes: Shapes) -> Chosen:
    """Fit a scheme to a part. shapes: of its tensors as they are stored, by canonical name.

    A row that does not divide into the scheme's groups gets groups of 32; if it does not divide into these either, the
    layer stays as it is. Both are said in `notes`.
    """
    layers: dict[str, Packing] = {}
    narrowed, kept = [], []
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        wanted = scheme.for_module(part, path, config) if path != name and len(shape) == 2 else None
        if wanted is None:
            continue
        if shape[1] % wanted.group_size == 0:
            layers[path] = wanted
        elif wanted.mode == "affine" and shape[1] % 32 == 0:
            layers[path] = wanted._replace(group_size=32)
            narrowed.append(f"{path}, {shape[1]} wide")
        else:
            kept.append(f"{path}, {shape[1]} wide")
    notes = []
    if narrowed:
        notes.append(
            f"{part}: {len(narrowed)} layers are in groups of 32, their rows divide into no larger ({narrowed[0]})"
        )
    if kept:
        notes.append(f"{part}: {len(kept)} layers stay unquantized, their rows do not divide into groups ({kept[0]})")
    return Chosen(layers, tuple(notes))


def told(chosen: Mapping[str, Chosen], scheme: Scheme | None, stored: Any) -> str | None:
    """One word for a model's quantization: the scheme's name, the one its folder claims, else its bits; None if it has none."""
    packings = [packing for part in chosen.values() for packing in part.layers.values()]
    if not packings:
        return None
    if scheme is not None:
        return scheme.name
    if isinstance(stored, str) and re.fullmatch(r"[a-z0-9-]{1,20}", stored):
        return stored
    return "/".join(str(bits) for bits in sorted({packing.bits for packing in packings})) + "-bit"


# --- one matrix ---


def quantize_tensors(tensors: Tensors, layers: Mapping[str, Packing]) -> None:
    """Pack these layers in place, one after another: above the result only one unpacked matrix is in memory."""
    take = Taker(tensors, layers)
    for path, packing in layers.items():
        for suffix in packing.tensors(1, packing.group_size):
            tensors[f"{path}.{suffix}"] = take(f"{path}.{suffix}")
        mx.clear_cache()


class Taker:
    """Takes tensors out of a dictionary by the names they have once packed, packing a matrix when it is first asked for."""

    def __init__(self, tensors: Tensors, layers: Mapping[str, Packing]):
        self._tensors, self._layers = tensors, layers
        self._ready: Tensors = {}

    def __call__(self, name: str) -> mx.array:
        if name in self._ready:
            return self._ready.pop(name)
        path, _, suffix = name.rpartition(".")
        if path not in self._layers or suffix == "bias":
            return self._tensors.pop(name)
        packed = pack(self._tensors.pop(f"{path}.weight"), self._layers[path], path)
        self._ready |= {f"{path}.{key}": value for key, value in packed.items()}
        return self._ready.pop(name)


def pack(weight: mx.array, packing: Packing, name: str = "weight") -> Tensors:
    """Pack a matrix [rows, columns] by chunks of rows; evaluated. Up to 4 bits the range of each group is searched.

    Returns `weight`, `scales` and, in affine mode, `biases`. Raises CheckpointError for weights that are not finite.
    """
    dtype = scale_dtype(weight, name) if packing.mode == "affine" else mx.float32
    rows = max(1, _CHUNK // weight.shape[1])
    chunks = []
    for start in range(0, weight.shape[0], rows):
        chunk = weight[start : start + rows]
        if packing.mode == "affine" and packing.bits <= _SEARCHED_BITS:
            packed = search(chunk, packing, dtype)
        else:
            packed = mx.quantize(chunk.astype(dtype), packing.group_size, packing.bits, packing.mode)
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
    largest = float(mx.maximum(weight.max(), -weight.min()).astype(mx.float32).item())  # type: ignore[arg-type]
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


# --- config.json ---


def to_block(layers: Mapping[str, Packing]) -> dict[str, Any]:
    """The `quantization` block of a part's config.json in mlx-lm's form: the commonest packing, then every other layer's."""
    common = Counter(layers.values()).most_common(1)[0][0]
    return common._asdict() | {path: packing._asdict() for path, packing in layers.items() if packing != common}


def from_block(block: Any, paths: list[str], where: str) -> dict[str, Packing]:
    """The packing of each of `paths`, the layers that have scales. Raises CheckpointError for a block that does not fit them."""
    if not isinstance(block, dict):
        raise CheckpointError(
            f"{where}: the weights are quantized ({paths[0]}.scales) and there is no quantization block that says how; "
            "expected group_size and bits; download the model again"
        )
    common = {key: value for key, value in block.items() if key in Packing._fields}
    own = {key: value for key, value in block.items() if isinstance(value, dict)}
    if astray := sorted(own.keys() - set(paths)):
        raise CheckpointError(
            f"{where}: {astray[0][:80]} is said to be quantized and has no scales; is this the whole model?"
        )
    layers = {}
    for path in paths:
        values: dict[str, Any] = {"mode": "affine"} | own.get(path, common)
        try:
            packing = Packing(**values)
            Scheme(packing.bits, packing.group_size, packing.mode)  # checks
        except (TypeError, RequestError):
            raise CheckpointError(
                f"{where}: the quantization of {path} is {str(values)[:100]}; expected group_size, bits and mode that MLX has"
            ) from None
        layers[path] = packing
    return layers


def unpacked_shapes(shapes: Shapes, layers: Mapping[str, Packing]) -> dict[str, tuple[int, ...]]:
    """Shapes of a quantized part's tensors as if nothing were packed; scales and biases of packed layers fall away."""
    out = {}
    for name, shape in shapes.items():
        path, _, suffix = name.rpartition(".")
        if path not in layers or suffix == "bias":
            out[name] = shape
        elif suffix == "weight":
            out[name] = (shape[0], shape[1] * 32 // layers[path].bits)
    return out


def packed_sizes(
    shapes: Shapes, layers: Mapping[str, Packing], size: int, scale_size: int = 2
) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor once packed. shapes: unpacked; size: bytes of a number that is not packed."""
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path == name or path not in layers:
            yield name, prod(shape) * size
            continue
        for suffix, (packed, dtype) in layers[path].tensors(*shape).items():
            yield f"{path}.{suffix}", prod(packed) * (scale_size if dtype == mx.float16 else dtype.size)


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)

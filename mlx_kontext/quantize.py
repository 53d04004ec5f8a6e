"""Quantization: schemes by name, which layer gets how many bits, and what that does to a model.

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
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import mx
from .errors import CheckpointError, RequestError
from .image import nearest_size, noise, pack, position_ids, to_array
from .models.quantized import Packing
from .photo import read_photo
from .weights.pack import pack_matrix, relative_error, unpack_matrix

if TYPE_CHECKING:
    from .pipeline import KontextPipeline

Shapes = Mapping[str, tuple[int, ...]]

_EIGHT = Packing(64, 8)
_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FP_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
_BLOCK = re.compile(
    r"(?P<kind>double|single)_blocks\.(?P<index>\d+)\."
    r"(?P<layer>(?P<stream>img|txt)_(attn\.(qkv|proj)|mlp\.[02])|linear[12])"
)
_MODULATION = re.compile(r"(double_blocks\.\d+\.(img|txt)_mod|single_blocks\.\d+\.modulation)\.lin")
_T5 = re.compile(r"shared|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo))")


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
            good = FP_MODES.get(self.mode) == (self.group_size, self.bits) and not self.mixed
        if not good:
            fp = ", ".join(f"{mode} ({bits} bits in groups of {size})" for mode, (size, bits) in FP_MODES.items())
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
        """More bits where an error does most harm: the ends of the network, and the layers that follow GELU.

        First double and last single blocks at 8 bits: uniform 4 bits on Qwen-Image gave cracked skin, 8 bits at the ends
        removed it. The last layer of each MLP, whose inputs have outliers, one bit more. Chosen by one-step error a byte on
        the demo model (at sigma 0.5: uniform 0.116, ends 0.096, ends and MLP 0.086); 6 bits for the text stream, often
        advised, gained nothing there (0.115). Full size: doubles 0-2, singles 35-37; over half of the weights stay at 4 bits.
        """
        index = int(block["index"])
        if block["kind"] == "double" and index < max(1, round(0.16 * config.num_layers)):
            return 8
        last = config.num_single_layers - max(1, round(0.08 * config.num_single_layers))
        if block["kind"] == "single" and index >= last:
            return 8
        after_gelu = block["layer"] in ("img_mlp.2", "linear2")
        return min((bits for bits in _AFFINE_BITS if bits > self.bits), default=8) if after_gelu else self.bits


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
            if (
                type(packing.bits) is not int or type(packing.group_size) is not int
            ):  # 4.0 and True are as good as 4 and 1
                raise TypeError
            Scheme(packing.bits, packing.group_size, packing.mode)  # checks
        except (TypeError, RequestError):
            raise CheckpointError(
                f"{where}: the quantization of {path} is {str(values)[:100]}; expected group_size, bits and mode that MLX has"
            ) from None
        layers[path] = packing
    return layers


def from_shapes(shapes: Shapes, widths: Mapping[str, int], where: str) -> dict[str, Packing]:
    """The packing of each layer that has scales, for files that do not note it. widths: numbers in a row, by layer.

    Raises CheckpointError for shapes that no packed layer has. Layers of no known width are for strict loading to report.
    """
    layers = {}
    for path in [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]:
        weight, scales, columns = shapes.get(f"{path}.weight", ()), shapes[f"{path}.scales"], widths.get(path)
        if columns is None or not weight or not scales:
            continue
        packing = Packing(columns // max(scales[-1], 1), weight[-1] * 32 // columns)
        rows = (weight[0], columns)
        sound = packing.bits in _AFFINE_BITS and packing.group_size in _AFFINE_GROUPS
        found = {f"{path}.{suffix}": shape for suffix, (shape, _) in packing.tensors(*rows).items()} if sound else {}
        if not sound or any(shapes.get(name, shape) != shape for name, shape in found.items()):
            raise CheckpointError(
                f"{where}: {path} is packed as {weight} with scales {scales}; for {columns} inputs no bits (2 to 8) and "
                "groups (32, 64, 128) give that, download the model again"
            )
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


# --- what it costs ---


@dataclass(frozen=True)
class LayerError:
    """One packed layer. error: of its weights, relative (Frobenius norms); bytes_before: as the original stores it."""

    part: str
    path: str
    bits: int
    group_size: int
    error: float
    bytes_before: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """Every packed layer of a model beside its original."""

    rows: list[LayerError]

    def to_json(self) -> list[dict[str, Any]]:
        return [vars(row) for row in self.rows]

    def table(self) -> str:
        """The same for people, with one line of sums."""
        lines = [f"{'layer':58} bits group   error      bytes     before"]
        for row in self.rows:
            name = f"{row.part} {row.path}"
            lines.append(
                f"{name:58} {row.bits:4} {row.group_size:5} {row.error:7.4f} {row.bytes:10,} {row.bytes_before:10,}"
            )
        mean = sum(row.error for row in self.rows) / max(len(self.rows), 1)
        size, before = sum(row.bytes for row in self.rows), sum(row.bytes_before for row in self.rows)
        return "\n".join([*lines, f"{len(self.rows)} layers, mean{'':51} {mean:7.4f} {size:10,} {before:10,}"])


def report(original: "KontextPipeline", quantized: "KontextPipeline") -> Report:
    """Compare the weights of two pipelines of one model, layer by layer; neither model is loaded whole.

    Raises RequestError if `original` is quantized or the two are not the same model.
    """
    if original.quantization:
        raise RequestError(f"{original.name} is quantized ({original.quantization}); compare with the original weights")
    rows = []
    for part, chosen in quantized.checkpoint.quantization.items():
        before, after = original.checkpoint.tensors(part), quantized.checkpoint.tensors(part)
        for path, packing in chosen.layers.items():
            name = f"{path}.weight"
            weight = before.pop(name, None)
            if quantized.checkpoint.scheme and name in after:
                packed = pack_matrix(after.pop(name), packing, path)
            else:
                names = ("weight", "scales", "biases")
                packed = {key: after.pop(f"{path}.{key}") for key in names if f"{path}.{key}" in after}
            plain = unpack_matrix(packed, packing)
            if weight is None or weight.shape != plain.shape:
                raise RequestError(f"{original.name} and {quantized.name} are not the same model: {name} differs")
            error = relative_error(plain, weight)
            size = sum(value.nbytes for value in packed.values())
            rows.append(LayerError(part, path, packing.bits, packing.group_size, error, weight.nbytes, size))
            mx.clear_cache()
    return Report(rows)


def velocity_errors(
    original: "KontextPipeline",
    quantized: "KontextPipeline",
    image: Any,
    prompt: str,
    *,
    sigmas: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25),
    seed: int = 0,
) -> dict[float, float]:
    """Relative error (L2) of one velocity at each noise level, on inputs that are the same for both transformers.

    A whole edit is chaotic: after 28 steps a tiny error may be another picture just as good. One step is not. The noisy
    picture is sigma noise + (1 - sigma) input, text states and reference are the original's.
    """
    photo, vae = read_photo(image).image, original.checkpoint.config("vae")
    multiple = 2 * vae.downsampling
    width, height = nearest_size(photo.width, photo.height, original.sizes, multiple)
    rows, columns = height // multiple, width // multiple
    clean = pack(original.vae.encode(mx.array(to_array(photo, width, height))))
    noisy = mx.array(pack(noise(seed, 2 * rows, 2 * columns, vae.latent_channels)))
    read = original.text.encode(prompt, original.defaults.max_sequence_length)
    text = np.zeros((read.txt.shape[1], 3), np.int32)
    ids = mx.array(np.concatenate([text, position_ids(rows, columns, 0), position_ids(rows, columns, 1)]))

    def velocities(pipe: "KontextPipeline") -> list[mx.array]:
        flux, found = pipe.flux, []
        modulation = flux.modulation(mx.array(sigmas), original.defaults.guidance_scale, read.vec)
        for i, sigma in enumerate(sigmas):
            tokens = mx.concatenate([sigma * noisy + (1 - sigma) * clean, clean], axis=1).astype(original.dtype)
            v = flux(tokens, read.txt, flux.rope(ids), modulation.at(i))[:, : noisy.shape[1]].astype(mx.float32)
            mx.eval(v)
            found.append(v)
        return found

    pairs = zip(sigmas, velocities(original), velocities(quantized), strict=True)
    return {sigma: float(mx.linalg.norm(b - a) / mx.linalg.norm(a)) for sigma, a, b in pairs}


def _listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)

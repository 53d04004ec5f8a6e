"""Open a model folder and fill models from it, lazily and strictly.

No file reaches MLX before the header gate: a crafted safetensors file can crash the process otherwise.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..backend import mx, nn, tree_flatten
from ..errors import CheckpointError, RequestError
from ..models.clip import CLIPConfig, CLIPText
from ..models.flux import Flux, FluxConfig
from ..models.quantized import Packed, Packing, quantize_layers
from ..models.t5 import T5Config, T5Encoder
from ..models.vae import AutoEncoder, VAEConfig
from ..quantize import Chosen, Scheme, choose, from_block, packed_sizes, unpacked_shapes
from ..sampling import ScheduleConfig
from .formats import FORMATS, PARTS, Format, Piece, Tensors
from .header import TensorInfo, _cut, read_header, read_index, read_small
from .pack import quantize_tensors

MODELS: dict[str, tuple[Any, Any]] = {
    "transformer": (FluxConfig, Flux),
    "vae": (VAEConfig, AutoEncoder),
    "text_encoder": (CLIPConfig, CLIPText),
    "text_encoder_2": (T5Config, T5Encoder),
}
_BASES = ("model", "diffusion_pytorch_model")
_READABLE = ("F32", "F16", "BF16")
_PACKED = {"weight": "U32", "scales": "U8"}  # of a quantized layer; fp modes have scales of one byte
_MAX_VALUES = 2**19  # of a JSON file; a tokenizer.json of CLIP has half as many
_CODES = (mx.uint32, mx.uint8)  # never cast: packed weights, and the scales of fp modes
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder of a known format; nothing but its JSON files has been read.

    scheme: quantize while loading or saving; None leaves the weights as they are stored, quantized or not.
    notices: what a user should know of this model before an edit.
    """

    folder: Path
    format: Format
    index: dict[str, Any]
    scheme: Scheme | None = None
    notices: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path, scheme: Scheme | None = None) -> "Checkpoint":
        """Raises CheckpointError if the folder is of no format we read."""
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(
                f"{folder} has no model_index.json; expected a folder in diffusers' layout, or one that save_pretrained wrote"
            )
        index = read_json(folder / "model_index.json")
        for form in FORMATS:
            if form.matches(index):
                return cls(folder, form, index, scheme)
        raise CheckpointError(
            f"{folder} holds a {str(index.get('_class_name', 'model of no named class'))[:80]}; expected FluxKontextPipeline "
            "(FLUX.1 Kontext [dev]) or our own KontextPipeline"
        )

    def config(self, part: str) -> Any:
        """The sizes of one part, as its model's dataclass. Raises CheckpointError for what that model cannot be."""
        return from_json(MODELS[part][0], self.folder / part / "config.json")

    def schedule_config(self) -> ScheduleConfig:
        return from_json(ScheduleConfig, self.folder / "scheduler" / "scheduler_config.json")

    def files(self, part: str) -> list[Path]:
        """The safetensors files of one part, in order. Raises CheckpointError naming the shard that is missing."""
        folder = self.folder / part
        for base in _BASES:
            index = folder / f"{base}.safetensors.index.json"
            if index.is_file():
                return sorted(set(read_index(index).values()))
            if (folder / f"{base}.safetensors").is_file():
                return [folder / f"{base}.safetensors"]
        found = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
        what = f"found {', '.join(found[:4])}" if found else "it is empty or missing"
        raise CheckpointError(
            f"{folder}: no model.safetensors (or shards with an index) for the {PARTS[part]}; {what}; download the model again"
        )

    def headers(self, part: str) -> dict[str, TensorInfo]:
        """Name, shape and dtype of every stored tensor of one part, from the headers alone."""
        tensors: dict[str, TensorInfo] = {}
        odd: dict[str, Path] = {}
        for path in self.files(part):
            for name, info in read_header(path).tensors.items():
                if name in tensors:
                    raise CheckpointError(f"{path}: {name} is in another shard too; download the model again")
                if info.dtype not in _READABLE:
                    odd[name] = path
                tensors[name] = info
        for name, path in odd.items():
            module, _, suffix = name.rpartition(".")
            if f"{module}.scales" not in tensors or _PACKED.get(suffix) != tensors[name].dtype:
                raise CheckpointError(
                    f"{path}: {name} is {tensors[name].dtype}; this version reads {', '.join(_READABLE)}, "
                    "take the unquantized model"
                )
        return tensors

    def tensors(self, part: str, dtype: mx.Dtype | None = None) -> Tensors:
        """Canonical name -> lazy array, as stored: no bytes are read before an array is evaluated.

        dtype: what formats that have to be decoded, fp8 and GGUF, are decoded to.
        """
        self.headers(part)  # the gate
        tensors: Tensors = {}
        for path in self.files(part):
            tensors.update(mx.load(str(path)))  # type: ignore[arg-type]  # a dict, for safetensors
        try:
            return self.format.to_canonical[part](tensors)
        except ValueError as error:  # MLX's word for projections whose shapes do not join
            raise CheckpointError(
                f"{self.folder / part}: tensors of the {PARTS[part]} do not fit together ({str(error).splitlines()[0]}); "
                "download the model again"
            ) from None

    def pieces(self, part: str, dtype: mx.Dtype) -> list[Piece]:
        """A part in pieces, so that it can pass through less memory than it takes.

        dtype: of the stand-ins of what has to be decoded; what a piece loads is then fp32, to be rounded once.
        """
        tensors = self.tensors(part)
        outline = {name: mx.zeros(value.shape, value.dtype) for name, value in tensors.items()}
        return [Piece(outline, lambda: tensors)]  # lazy; who takes one out and lets it go has its memory back

    def check(self, part: str) -> None:
        """Raises CheckpointError listing tensors that the part's model misses, does not know, or has in another shape."""
        model = MODELS[part][1](self.config(part))
        if not self.scheme:
            quantize_layers(model, self.quantization[part].layers)
        found = {name: value for piece in self.pieces(part, mx.float32) for name, value in piece.outline.items()}
        check_shapes(model, found, f"{self.where(part)}")

    def config_json(self, part: str) -> dict[str, Any]:
        """A part's config.json as a folder of its own would have it."""
        return read_json(self.folder / part / "config.json")

    def schedule_json(self) -> dict[str, Any]:
        """scheduler_config.json, likewise."""
        return read_json(self.folder / "scheduler" / "scheduler_config.json")

    @cached_property
    def quantization(self) -> dict[str, Chosen]:
        """Part -> its quantized layers, as they are stored or as the scheme chooses; from headers and JSON alone.

        Raises RequestError for a scheme on a model that is quantized already: packing twice would only lose more.
        """
        return {part: self._quantization(part) for part in PARTS}

    def _quantization(self, part: str) -> Chosen:
        scaled = any(name.endswith(".scales") for name in self.headers(part))
        if not scaled and self.scheme is None:
            return Chosen()
        shapes = self.shapes(part)
        if scaled:
            if self.scheme is not None:
                raise RequestError(
                    f"{self.folder} is quantized already; open it without quantize, or quantize the original model"
                )
            file = self.folder / part / "config.json"
            paths = [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]
            return Chosen(from_block(read_json(file).get("quantization"), paths, str(file)))
        assert self.scheme is not None
        return choose(self.scheme, part, self.config(part), shapes)

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor as it is stored."""
        return {name: tuple(value.shape) for name, value in self.tensors(part).items()}

    def plain_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor as if nothing were quantized."""
        shapes = self.shapes(part)
        return shapes if self.scheme else unpacked_shapes(shapes, self.quantization[part].layers)

    def ends(self, part: str, names: tuple[str, ...]) -> Tensors:
        """At least these tensors of a part."""
        return self.tensors(part)

    def where(self, part: str) -> Path:
        """The place of a part, for messages."""
        return self.folder / part

    def tokenizer(self, name: str) -> Path:
        """The folder of "tokenizer" (CLIP) or "tokenizer_2" (T5)."""
        return self.folder / name

    def t5_vocabulary(self) -> dict[str, Any] | None:
        """The contents of T5's tokenizer.json where it comes out of a weights file and no folder has it."""
        return None

    def parameters(self, part: str) -> int:
        """How many numbers a part has, as if nothing were quantized."""
        return sum(prod(shape) for shape in self.plain_shapes(part).values())

    def loaded_bytes(self, part: str, size: int) -> int:
        """Bytes of a part once loaded, and quantized if there is a scheme, for computing in numbers of `size` bytes."""
        layers = self.quantization[part].layers
        if not layers:
            return sum(prod(info.shape) for info in self.headers(part).values()) * size
        # fp32 runs hold scales in fp32 too
        return sum(n for _, n in packed_sizes(self.plain_shapes(part), layers, size, max(2, size)))

    def model(self, part: str, dtype: mx.Dtype) -> nn.Module:
        """The model of one part with its weights in `dtype`, lazily; what the scheme quantizes is packed here."""
        model, where, layers = MODELS[part][1](self.config(part)), f"{self.where(part)}", self.quantization[part].layers
        if self.scheme:
            tensors = self.tensors(part, mx.float32)  # what is decoded is rounded once, by packing
            check_shapes(model, tensors, where)  # before the minutes that packing takes
            quantize_tensors(tensors, layers)
        else:
            tensors = self.tensors(part, dtype)
        fill(model, tensors, dtype, where, layers)
        return model

    @cached_property
    def identity(self) -> dict[str, str]:
        """A short hash of transformer and VAE, from tensors at their two ends: tells fine-tunes of one size apart."""
        ends = {
            "transformer": ("img_in.weight", "final_layer.linear.weight"),
            "vae": ("encoder.conv_in.weight", "decoder.conv_out.weight"),
        }
        hashes = {}
        for part, names in ends.items():
            tensors, digest = self.ends(part, names), hashlib.sha256()
            for name in names:
                if name not in tensors:
                    raise CheckpointError(f"{self.where(part)}: 1 missing ({name}); is this the whole, right model?")
                value = tensors[name].astype(mx.float32)
                mx.eval(value)
                digest.update(np.array(value).tobytes())
            hashes[part] = digest.hexdigest()[:16]
        return hashes


def fill(
    model: nn.Module, tensors: Tensors, dtype: mx.Dtype, where: str, layers: Mapping[str, Packing] | None = None
) -> None:
    """Put tensors into a model, cast lazily; `layers` are packed: `weight`, `scales`, and `biases` in affine mode.

    Scales keep their own dtype, except that in fp32 all is fp32: unpacking in 16 bits would round again.
    Raises CheckpointError listing what is missing, unexpected or misshaped, and for packed tensors that cannot be such.
    """
    if layers:
        quantize_layers(model, layers)
    check_shapes(model, tensors, where)
    whole = set()
    for path, layer in model.named_modules() if layers else ():
        if isinstance(layer, Packed):
            whole |= check_packed(path, layer, tensors, where)
    model.load_weights(
        [
            (
                name,
                value if name in whole and (value.dtype in _CODES or dtype != mx.float32) else value.astype(dtype),
            )
            for name, value in tensors.items()
        ]
    )
    model.eval()


def check_packed(path: str, layer: Packed, tensors: Tensors, where: str) -> set[str]:
    """Names of a packed layer's tensors. Raises CheckpointError for dtypes that do not fit, or scales that are not finite."""
    names = {suffix: f"{path}.{suffix}" for suffix in ("weight", "scales", "biases") if suffix in layer}
    for suffix, name in names.items():
        found, packed = tensors[name].dtype, layer[suffix].dtype
        if found != packed and not (packed == mx.float16 and found in (mx.float16, mx.bfloat16, mx.float32)):
            raise CheckpointError(
                f"{where}: {name} is {_word(found)}; a layer of {layer.bits} bits in mode {layer.mode} has {_word(packed)} there"
            )
        if packed == mx.float16 and not mx.isfinite(tensors[name]).all().item():
            raise CheckpointError(f"{where}: {name} holds numbers that are not finite; download the model again")
    return set(names.values())


def check_shapes(model: nn.Module, tensors: Tensors, where: str) -> None:
    """Raises CheckpointError listing tensors that a model misses, does not know, or has in another shape."""
    expected = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshaped": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != tuple(shape)
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names)
        raise CheckpointError(f"{where}: tensors do not fit config.json: {told}; is this the whole, right model?")


def from_json(config: type[_T], path: Path) -> _T:
    """A config dataclass from its JSON file; keys it has no field for belong to other programs and are left alone.

    Raises CheckpointError if a field is of another type, or a key says something the model cannot be.
    """
    values = read_json(path)
    for key, needed in getattr(config, "REQUIRED", {}).items():
        if values.get(key, needed) != needed:
            raise CheckpointError(
                f"{path}: {key} is {_cut(values[key])}; FLUX.1 Kontext has {needed!r}, this is another model"
            )
    taken = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, default = values[field.name], field.default
        if isinstance(default, tuple):
            ok = isinstance(value, list) and value and all(type(item) is int and 0 < item <= 2**16 for item in value)
            value = tuple(value) if ok else value
        elif isinstance(default, bool):
            ok = isinstance(value, bool)
        elif isinstance(default, int):
            ok = type(value) is int and 0 < value <= 2**20
        else:
            ok = type(value) in (int, float) and abs(value) < 1e6
        if not ok:
            raise CheckpointError(f"{path}: {field.name} is {_cut(value)}; expected something like {default!r}")
        taken[field.name] = value
    try:
        return config(**taken)
    except ValueError as error:  # each size may be, and all of them together not
        raise CheckpointError(f"{path}: {error}; download the model again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 8 MB and half a million values: more would take 300 MB. Raises CheckpointError."""
    if not path.is_file():  # a named pipe too: it would wait for its writer
        raise CheckpointError(f"{path} is missing; download the model again")
    raw = read_small(path, "a small JSON file")
    try:
        if sum(raw.count(mark) for mark in (b",", b":", b"[", b"{")) > _MAX_VALUES:
            raise ValueError("it has over half a million values")
        values = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({str(error).splitlines()[0]}); download the model again"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def _word(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""A model put together from parts in different places: single files, folders, and a model folder for the rest."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..backend import mx, nn
from ..errors import CheckpointError, RequestError
from ..quantize import Chosen, Scheme, choose, from_shapes, packed_sizes
from ..sampling import ScheduleConfig
from .formats import PARTS, Format, Piece, Tensors
from .gguf_parts import t5_tokenizer_json
from .header import TensorInfo
from .layouts import Source, format_name, sources_in, told_apart
from .load import MODELS, Checkpoint, from_json, read_json
from .sizes import sizes_of
from .stored import Stored, decode, is_packed, outline, read_contents

OPTIONS = {"transformer": "transformer", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "t5"}
"""Part -> its option on the command line."""
_FILES = {  # what the part is called where it is published
    "transformer": "flux1-kontext-dev.safetensors",
    "vae": "ae.safetensors",
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "t5xxl_fp16.safetensors",
}
# Of one block, in all spellings; layers of different blocks are never joined, nor is modulation joined to other layers.
_BLOCK = re.compile(r"(?:\w*blocks?|blk)\.\d+\.")
_MODULATION = re.compile(r"_mod\.lin\.|modulation\.lin\.|norm1(_context)?\.linear\.|(?<!\w)norm\.linear\.")


@dataclass(frozen=True)
class Assembled(Checkpoint):
    """A checkpoint some parts of which lie elsewhere than in its folder.

    sources: those parts; base: the model folder that has the others; tokenizers, configs: folders laid out as diffusers'.
    """

    sources: Mapping[str, Source] = field(default_factory=dict)
    base: Checkpoint | None = None
    tokenizers: Path | None = None
    configs: Path | None = None

    def files(self, part: str) -> list[Path]:
        if part not in self.sources:
            return self._base(part).files(part)
        return sorted({stored.path for stored in self.sources[part].tensors.values()})

    def headers(self, part: str) -> dict[str, TensorInfo]:
        if part not in self.sources:
            return self._base(part).headers(part)
        return {name: stored.info for name, stored in self.sources[part].tensors.items()}

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        if part not in self.sources:
            return self._base(part).shapes(part)
        return {name: tuple(value.shape) for name, value in self._outline(part, repacked=True).items()}

    def _quantization(self, part: str) -> Chosen:
        """Of files, which do not note it, from the shapes of what is packed and the sizes of the model."""
        if part not in self.sources:
            return self._base(part)._quantization(part)
        source, shapes = self.sources[part], self.shapes(part)
        if self.scheme is not None:
            if is_packed(source.tensors):
                raise RequestError(
                    f"{self.where(part)} is quantized already; open it without quantize, or take its bf16 or fp8 version"
                )
            return choose(self.scheme, part, self.config(part), shapes)
        if not any(name.endswith(".scales") for name in shapes):
            return Chosen()
        model = MODELS[part][1](self.config(part))
        widths = {
            path: layer.weight.shape[1]
            for path, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Embedding))
        }
        return Chosen(from_shapes(shapes, widths, str(self.where(part))))

    def loaded_bytes(self, part: str, size: int) -> int:
        if part not in self.sources:
            return super().loaded_bytes(part, size)
        layers = self.quantization[part].layers
        if self.scheme:
            return sum(n for _, n in packed_sizes(self.shapes(part), layers, size, max(2, size)))
        total = 0
        for name, value in self._outline(part, repacked=True).items():
            path, _, suffix = name.rpartition(".")
            if path in layers and suffix != "bias":  # packed words as they are, scales never in fewer bytes than stored
                total += value.size * max(value.itemsize, size if value.dtype != mx.uint32 else 4)
            else:
                total += value.size * size
        return total

    def config(self, part: str) -> Any:
        """From `configs` if it has the file, else from the folder the part would come from, else from the tensors."""
        if file := self._config_file(f"{part}/config.json"):
            return from_json(MODELS[part][0], file)
        if part not in self.sources:
            return self._base(part).config(part)
        return sizes_of(part, self._outline(part, repacked=False), str(self.where(part)))

    def config_json(self, part: str) -> dict[str, Any]:
        file = self._config_file(f"{part}/config.json")
        if file is None:
            return dataclasses.asdict(self.config(part))
        words = (
            ("quantization", "quantization_config") if part in self.sources else ()
        )  # of weights not taken from there
        return {key: value for key, value in read_json(file).items() if key not in words}

    def schedule_config(self) -> ScheduleConfig:
        file = self._config_file("scheduler/scheduler_config.json")
        return from_json(ScheduleConfig, file) if file else ScheduleConfig()

    def schedule_json(self) -> dict[str, Any]:
        file = self._config_file("scheduler/scheduler_config.json")
        words = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
        return read_json(file) if file else words | ScheduleConfig.REQUIRED | dataclasses.asdict(ScheduleConfig())

    def _config_file(self, name: str) -> Path | None:
        folders = (self.configs, self.base.folder if self.base else None)
        return next((folder / name for folder in folders if folder and (folder / name).is_file()), None)

    def tensors(self, part: str, dtype: mx.Dtype | None = None) -> Tensors:
        if part not in self.sources:
            return self._base(part).tensors(part)
        return self._decoded(part, self.sources[part].tensors, dtype or mx.float32)

    def pieces(self, part: str, dtype: mx.Dtype) -> list[Piece]:
        """Block by block: what MLX cannot read lazily, GGUF and e5m2, is decoded when a piece is loaded."""
        if part not in self.sources:
            return self._base(part).pieces(part, dtype)
        groups: dict[tuple[bool, str], dict[str, Stored]] = {}
        for name, stored in self.sources[part].tensors.items():
            block = _BLOCK.search(name) if part in ("transformer", "text_encoder_2") else None
            key = (bool(_MODULATION.search(name)), block[0]) if block else (False, "")
            groups.setdefault(key, {})[name] = stored
        found = []
        for key in sorted(groups, key=lambda key: key[0]):  # modulation last, as it is written
            stand_ins = outline(self.where(part), groups[key], repacked=True, dtype=dtype)
            load = partial(self._decoded, part, groups[key], mx.float32)
            found.append(Piece(self._canonical(part, stand_ins), load))
        return found

    def ends(self, part: str, names: tuple[str, ...]) -> Tensors:
        """A few canonical tensors without decoding the rest; layouts rename, join and never mix these."""
        if part not in self.sources:
            return self._base(part).ends(part, names)
        theirs = {"img_in": "x_embedder", "final_layer.linear": "proj_out"}  # BFL -> diffusers
        stems = [name.rpartition(".")[0] for name in names]
        wanted = tuple(f"{word}." for stem in stems for word in (stem, theirs.get(stem, stem)))
        some = {name: stored for name, stored in self.sources[part].tensors.items() if name.startswith(wanted)}
        return self._decoded(part, some, mx.float32)

    def _decoded(self, part: str, stored: Mapping[str, Stored], dtype: mx.Dtype) -> Tensors:
        return self._canonical(part, decode(self.where(part), stored, dtype, zero_nan=part == "text_encoder_2"))

    def _outline(self, part: str, *, repacked: bool) -> Tensors:
        """Canonical stand-ins, as `stored.outline` makes them."""
        return self._canonical(part, outline(self.where(part), self.sources[part].tensors, repacked=repacked))

    def _canonical(self, part: str, tensors: Tensors) -> Tensors:
        try:
            return self.sources[part].layout.to_canonical(tensors)
        except (ValueError, IndexError, ZeroDivisionError) as error:  # MLX's word for shapes that do not join
            told = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.where(part)}: tensors of the {PARTS[part]} do not fit together ({told}); download it again"
            ) from None

    def where(self, part: str) -> Path:
        return self.sources[part].where.where if part in self.sources else self._base(part).where(part)

    def tokenizer(self, name: str) -> Path:
        for folder in (self.tokenizers, self.configs, self.base.folder if self.base else None):
            if folder and (folder / name).is_dir():
                return folder / name
        raise CheckpointError(
            f"{self.folder.name}: no {name}/; give a folder that has tokenizer/ (CLIP) and tokenizer_2/ (T5), as in "
            "FLUX.1 Kontext [dev]: tokenizers=DIR or --tokenizers DIR"
        )

    def t5_vocabulary(self) -> dict[str, Any] | None:
        """T5's tokenizer.json out of a GGUF file, if no folder has one and the file does."""
        source = self.sources.get("text_encoder_2")
        folders = (self.tokenizers, self.configs, self.base.folder if self.base else None)
        if any(folder and (folder / "tokenizer_2").is_dir() for folder in folders):
            return None
        gguf = source.where.gguf if source else None
        return t5_tokenizer_json(gguf) if gguf and "tokenizer.ggml.model" in gguf.metadata else None

    def _base(self, part: str) -> Checkpoint:
        if self.base is None:
            raise CheckpointError(_missing([part]))
        return self.base


def assemble(
    model: Path | None,
    parts: Mapping[str, Path],
    tokenizers: Path | None = None,
    configs: Path | None = None,
    scheme: Scheme | None = None,
) -> Checkpoint:
    """A checkpoint from a model (a folder, a single file, or none) with parts given by themselves over it.

    Headers alone are read. Raises CheckpointError for files we refuse, and names all parts that are missing.
    """
    if model is not None and model.is_dir() and not _is_mflux(model) and not (parts or tokenizers or configs):
        return Checkpoint.open(model, scheme)
    sources: dict[str, Source] = {}
    base: Checkpoint | None = None
    if model is not None and model.is_file():
        sources |= sources_in(read_contents(model))
        beside = model.parent / "ae.safetensors"
        if "vae" not in {*sources, *parts} and beside.is_file():
            sources["vae"] = _only(beside, "vae")
    elif model is not None and _is_mflux(model):
        sources |= {part: _only(model / part, part) for part in PARTS if part not in parts and (model / part).is_dir()}
        tokenizers = tokenizers or model
    elif model is not None:
        base = Checkpoint.open(model, scheme)
    for part, path in parts.items():
        sources[part] = _only(path, part)
    missing = [part for part in PARTS if part not in sources]
    if missing and base is None:
        raise CheckpointError((f"{model}: " if model else "") + _missing(missing))
    index = base.index if base else {}
    if configs and (configs / "model_index.json").is_file():
        index = read_json(configs / "model_index.json")
    names = dict.fromkeys(format_name(sources[part]) for part in PARTS if part in sources)
    told = [base.format.name] if base else []
    form = Format("; ".join([*told, *names]), lambda _: False, {})
    notice = told_apart(sources["transformer"]) if "transformer" in sources else None
    folder = model or next(iter(parts.values()))
    return Assembled(
        folder,
        form,
        {key: value for key, value in index.items() if key != "quantization"},  # the word is for that folder as a whole
        scheme,
        (notice,) if notice else (),
        sources=sources,
        base=base,
        tokenizers=tokenizers,
        configs=configs,
    )


def _only(path: Path, part: str) -> Source:
    """The part that `path` was given for. Raises CheckpointError if it holds others only."""
    found = sources_in(read_contents(path))
    if part not in found:
        held = " and ".join(PARTS[other] for other in found)
        right = ", ".join(f"--{OPTIONS[other]}" for other in found)
        raise CheckpointError(f"{path} holds a {held} and was given as the {PARTS[part]}; give it with {right}")
    return found[part]


def _is_mflux(folder: Path) -> bool:
    """mflux numbers its shards, and writes no model_index.json."""
    return not (folder / "model_index.json").is_file() and (folder / "transformer" / "0.safetensors").is_file()


def _missing(parts: list[str]) -> str:
    told = ", ".join(f"--{OPTIONS[part]} {_FILES[part]}" for part in parts)
    return (
        f"{' and '.join(PARTS[part] for part in parts)} missing; give {told} (in Python {', '.join(parts)}=), "
        "or a whole model with --model"
    )

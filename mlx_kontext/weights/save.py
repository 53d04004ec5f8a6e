"""Write our model folder: diffusers' folders with mlx-lm's file habits, from any checkpoint, one tensor in memory at a time.

A folder grows in a fixed order: shards of a part, its index and config.json, the next part, tokenizers and texts, and
model_index.json last: a folder without it is not a model, so an interrupted save is never taken for one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .. import __version__
from ..backend import mx
from ..card import card_fields, is_flux_dev, model_card, notice
from ..disk import explain, write_atomic
from ..errors import AdapterError, CheckpointError, RequestError
from ..lora import Adapters, delta
from ..models.quantized import Packing
from ..quantize import to_block
from .formats import PARTS, Piece, Tensors
from .load import Checkpoint
from .pack import Taker
from .shards import Shard, into_shards, write_shard

_KEPT = ("resolutions", "defaults", "quantization")  # of model_index.json
_COPIED = ("*.json", "*.txt", "*.model")  # of tokenizer folders
_CARD = """---
library_name: mlx
---
# {name}

Weights for mlx_kontext {version}, rewritten from a {format}, {change}.
The weights keep the licence of the model they come from.
"""
Progress = Callable[[int], object]
"""Gets bytes of the source that are done, as they are done."""


@dataclass(frozen=True)
class Output:
    """What one part becomes. layers: those that are packed on the way; source: bytes of each matrix before that."""

    part: str
    layers: Mapping[str, Packing]
    shards: list[Shard]
    source: dict[str, int]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def outputs(checkpoint: Checkpoint, dtype: mx.Dtype | None = None) -> list[Output]:
    """What each part of a checkpoint becomes, from headers alone.

    dtype: of numbers that are not packed; None keeps them as stored, and decodes fp8 and GGUF to bf16.
    """
    found = []
    for part in PARTS:
        layers = checkpoint.quantization[part].layers if checkpoint.scheme else {}
        stored: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {}
        for piece in checkpoint.pieces(part, dtype or mx.bfloat16):
            stored |= {name: (value.dtype, tuple(value.shape)) for name, value in piece.outline.items()}
        planned: dict[str, tuple[mx.Dtype, tuple[int, ...]]] = {}
        source = {}
        for name, (kind, shape) in stored.items():
            path, _, suffix = name.rpartition(".")
            source[name] = kind.size * prod(shape)
            if path in layers and suffix == "weight":
                for key, (packed, code) in layers[path].tensors(*shape).items():
                    planned[f"{path}.{key}"] = (code, packed)
            else:
                grouped = f"{path}.scales" in stored and suffix != "bias"  # packed already: codes, scales as they are
                planned[name] = (dtype if dtype and not grouped else kind, shape)
        found.append(Output(part, layers, into_shards(planned), source))
    return found


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `checkpoint` to `folder` in canonical names, as it is stored or by its scheme.

    Raises RequestError if the folder exists and is not empty, ResourceError on a full disk.
    """
    check_new(folder)
    write_folder(checkpoint, outputs(checkpoint), folder)


def check_new(folder: Path) -> None:
    """Raises RequestError unless `folder` is a folder that is empty, or is not there and can be."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise explain(error, folder) from None
    if taken:
        raise RequestError(f"{folder} exists and is not empty; choose a new folder")


def write_folder(
    checkpoint: Checkpoint,
    planned: list[Output],
    folder: Path,
    adapters: Adapters = (),
    progress: Progress = lambda _: None,
    words: Mapping[str, Any] | None = None,
) -> None:
    """Write what is planned and is not there yet.

    adapters: added to the weights in fp32, before they are packed; words: more keys for model_index.json.
    """
    try:
        for output in planned:
            (folder / output.part).mkdir(parents=True, exist_ok=True)
            write_part(checkpoint, output, folder / output.part, adapters, progress)
        write_words(checkpoint, folder, words or {}, fused=bool(adapters))
    except OSError as error:
        raise explain(error, folder) from None


def write_part(
    checkpoint: Checkpoint, output: Output, folder: Path, adapters: Adapters = (), progress: Progress = lambda _: None
) -> None:
    """Write the shards of one part that are not there yet, then their index and config.json."""
    take = Taker(Stream(checkpoint.pieces(output.part, mx.float32), adapters).pop, output.layers)

    def told(name: str) -> None:
        progress(output.source.get(name, 0))

    for shard in output.shards:
        if (folder / shard.file).exists():
            for name in shard.tensors:
                told(name)
            continue

        def written(name: str, shard: Shard = shard) -> mx.array:
            return stored_as(take(name), shard.tensors[name][0], name)

        write_shard(folder, shard, written, told)
    _write_index(output.shards, folder)
    layers = output.layers or checkpoint.quantization[output.part].layers
    config = checkpoint.config_json(output.part)
    write_json(folder / "config.json", config | ({"quantization": to_block(layers)} if layers else {}))


class Stream:
    """The canonical tensors of a part, asked for in the order of its pieces, each of which is read when its turn comes."""

    def __init__(self, pieces: list[Piece], adapters: Adapters = ()):
        self._load = {name: piece.load for piece in pieces for name in piece.outline}
        self._adapters = adapters
        self._open: Tensors = {}

    def pop(self, name: str) -> mx.array:
        """One tensor, once, with what the adapters add to it. Raises AdapterError if it is packed and they would."""
        if name not in self._open:
            self._open = {}  # first, so that two pieces are never in memory
            self._open = self._load[name]()
        value = self._open.pop(name)
        change = delta(self._adapters, name)
        if change is None:
            return value
        if not mx.issubdtype(value.dtype, mx.floating):
            raise AdapterError(f"{name} is quantized; add a LoRA to the model before it is quantized")
        return value.astype(mx.float32) + change


def stored_as(value: mx.array, dtype: mx.Dtype, name: str) -> mx.array:
    """A tensor in the dtype planned; codes and the scales of packed layers stay as they are.

    Raises CheckpointError for numbers that are not finite.
    """
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    cast = value if name.endswith((".scales", ".biases")) else value.astype(dtype)
    if not mx.isfinite(cast).all().item():
        word = str(dtype).removeprefix("mlx.core.")
        raise CheckpointError(f"{name} holds numbers that are not finite in {word}; download the model again")
    return cast


def write_words(checkpoint: Checkpoint, folder: Path, words: Mapping[str, Any], *, fused: bool) -> None:
    """Tokenizers, schedule, card, licence and notice; model_index.json comes last."""
    vocabulary = checkpoint.t5_vocabulary()
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(exist_ok=True)
        if name == "tokenizer_2" and vocabulary:
            write_json(folder / name / "tokenizer.json", vocabulary)
            continue
        for path in (path for pattern in _COPIED for path in sorted(checkpoint.tokenizer(name).glob(pattern))):
            shutil.copyfile(path, folder / name / path.name)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.schedule_json())
    change = _change(checkpoint, fused)
    _write_papers(checkpoint, folder, change)
    index: dict[str, Any] = {"_class_name": "KontextPipeline", "library": "mlx_kontext", "version": __version__}
    index |= {key: checkpoint.index[key] for key in _KEPT if key in checkpoint.index}
    if checkpoint.scheme:
        index["quantization"] = checkpoint.scheme.name  # for people; what counts is each part's config.json
    write_json(folder / "model_index.json", index | dict(words))


def _change(checkpoint: Checkpoint, fused: bool) -> str:
    words = ["with LoRA weights added"] if fused else []
    if scheme := checkpoint.scheme:
        words.append(f"quantized to {scheme.bits} bits (group {scheme.group_size}{', mixed' if scheme.mixed else ''})")
    return " and ".join(words) or "without a change of precision"


def _write_papers(checkpoint: Checkpoint, folder: Path, change: str) -> None:
    """Licence texts go along; the card is ours unless the source has one that is about these weights for MLX."""
    source = checkpoint.folder  # of single files it is one of them, and what lies beside may be about anything
    for path in (*source.glob("LICENSE*"), source / "NOTICE.txt"):
        if path.is_file() and not (path.name == "NOTICE.txt" and checkpoint.scheme):
            shutil.copyfile(path, folder / path.name)
    try:
        fields = card_fields(source / "README.md")
    except CheckpointError:  # a stranger's card that cannot be read is no reason to stop at the end of an hour's work
        fields = {}
    if fields.get("library_name") == "mlx":
        shutil.copyfile(source / "README.md", folder / "README.md")
        return
    card = _CARD.format(name=folder.name, version=__version__, format=checkpoint.format.name, change=change)
    if is_flux_dev(folder, fields):
        card = model_card(folder.resolve().name, change=change, quantized=bool(checkpoint.scheme))
        with suppress(OSError, CheckpointError):  # no licence here, or another: `upload` asks for the right one
            text = notice((folder / "LICENSE.md").read_text("utf-8", "replace"), change=change)
            write_atomic(folder / "NOTICE.txt", text.encode(), overwrite=True)
    write_atomic(folder / "README.md", card.encode(), overwrite=True)


def save_tensors(tensors: Tensors, folder: Path) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index."""
    shards = into_shards({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    for shard in shards:
        write_shard(folder, shard, tensors.__getitem__)
    _write_index(shards, folder)


def _write_index(shards: list[Shard], folder: Path) -> None:
    if len(shards) > 1:
        where = {name: shard.file for shard in shards for name in shard.tensors}
        total = sum(shard.nbytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode(), overwrite=True)

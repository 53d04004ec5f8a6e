"""Write our model folder: diffusers' folders with mlx-lm's file habits."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..backend import mx
from ..disk import explain, replace_atomic, write_atomic
from ..errors import RequestError, ResourceError
from ..models.quantized import Packing
from ..quantize import packed_sizes, to_block
from .formats import PARTS, Tensors
from .load import Checkpoint, read_json
from .pack import Taker

_SHARD_BYTES = 10**9
_KEPT = ("resolutions", "defaults", "quantization")  # of model_index.json
_CARD = """---
library_name: mlx
---
# {name}

Weights for mlx_kontext {version}, rewritten from a {format} {how}.
The weights keep the licence of the model they come from; for FLUX.1 Kontext [dev] that is the FLUX.1 [dev]
Non-Commercial License, which asks for content filters or a manual review of what the model makes.
"""


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write `checkpoint` to `folder` in canonical names, as it is stored or by its scheme, one shard in memory at a time.

    `model_index.json` comes last: a folder without it is not a model, so an interrupted save is never taken for one.
    Raises RequestError if the folder exists and is not empty, ResourceError on a full disk.
    """
    try:
        _save_checkpoint(checkpoint, folder)
    except OSError as error:
        raise explain(error, folder) from None


def _save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    if type(checkpoint) is not Checkpoint:  # its parts have no config.json to copy, and may be quantized
        raise RequestError(
            "save_pretrained writes models that came as one folder; this one was put together from files"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} exists and is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        (folder / part).mkdir()
        layers = checkpoint.quantization[part].layers if checkpoint.scheme else {}
        config = read_json(checkpoint.folder / part / "config.json")
        write_json(folder / part / "config.json", config | ({"quantization": to_block(layers)} if layers else {}))
        save_tensors(checkpoint.tensors(part), folder / part, layers)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(checkpoint.folder / name, folder / name)
    texts = [path for path in (*checkpoint.folder.glob("*.md"), checkpoint.folder / "NOTICE.txt") if path.is_file()]
    for path in texts:
        shutil.copyfile(path, folder / path.name)
    if not (folder / "README.md").exists():
        how = f"quantized as {checkpoint.scheme.name}" if checkpoint.scheme else "without a change of precision"
        card = _CARD.format(name=folder.name, version=__version__, format=checkpoint.format.name, how=how)
        write_atomic(folder / "README.md", card.encode(), overwrite=False)
    index: dict[str, Any] = {"_class_name": "KontextPipeline", "library": "mlx_kontext", "version": __version__}
    index |= {key: checkpoint.index[key] for key in _KEPT if key in checkpoint.index}
    if checkpoint.scheme:
        index["quantization"] = checkpoint.scheme.name  # for people; what counts is each part's config.json
    write_json(folder / "model_index.json", index)


def save_tensors(tensors: Tensors, folder: Path, layers: Mapping[str, Packing] | None = None) -> None:
    """Write `model.safetensors`, or shards of at most 1 GB with an index; modulation lies in shards of its own.

    The runtime reads modulation once per prompt and schedule, so it must be possible to leave it on disk. Takes the
    tensors out of the dictionary as it writes them, so that one shard is in memory at a time; `layers` are packed then.
    """
    layers = layers or {}
    sizes = {
        name: size
        for key, value in tensors.items()
        for name, size in packed_sizes({key: value.shape}, layers, value.itemsize)
    }
    shards, total = list(_shards(sizes)), sum(sizes.values())
    take = Taker(tensors, layers)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: take(name) for name in names}

        def write(temporary: Path, shard: Tensors = shard) -> None:
            try:
                mx.save_safetensors(str(temporary), shard, {"format": "mlx"})
            except RuntimeError as error:  # MLX's word for an OSError
                raise ResourceError(f"{folder}: a shard could not be written ({error}); is the disk full?") from None

        replace_atomic(folder / file, write, overwrite=False)
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        shard_index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", shard_index)


def is_modulation(name: str) -> bool:
    """Whether a transformer tensor is needed only to make the modulation tables."""
    return "_mod.lin." in name or ".modulation.lin." in name


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names grouped into shards, in order, modulation after the rest."""
    for group in (False, True):
        shard: list[str] = []
        room = _SHARD_BYTES
        for name, size in sizes.items():
            if is_modulation(name) != group:
                continue
            if shard and size > room:
                yield shard
                shard, room = [], _SHARD_BYTES
            shard.append(name)
            room -= size
        if shard:
            yield shard


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode(), overwrite=True)

"""What hostile files are made with: a small sound model to damage, and writers that check nothing.

A file is damaged in a copy of the carrier, so that it is refused for its damage and for nothing else.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kontext.backend import tree_flatten
from mlx_kontext.hub import demo_folder
from mlx_kontext.weights.load import MODELS

Tensors = dict[str, np.ndarray]
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
SIZES: dict[str, dict[str, Any]] = {
    "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32}
    | {"axes_dims_rope": [8, 12, 12], "joint_attention_dim": 64, "pooled_projection_dim": 64},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "norm_num_groups": 32},
    "text_encoder": {"vocab_size": 715, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    | {"num_hidden_layers": 1},
    "text_encoder_2": {"vocab_size": 297, "d_model": 64, "d_kv": 64, "d_ff": 64, "num_heads": 1, "num_layers": 1},
}
_WORDS = {"f4": "F32", "f2": "F16", "u4": "U32", "u1": "U8", "i1": "I8", "i4": "I32", "i8": "I64", "f8": "F64"}

HEADER, NUMBERS, HARMLESS = "by every door", "when its numbers are read", "perhaps not at all"
EVERY = ("model", *PARTS, "lora", "transformer/model.safetensors")
"""All that a file of weights may be opened as."""


@dataclass(frozen=True)
class Case:
    """make: writes the file or folder into an empty folder and returns its path; told: a regular expression of the message.

    slots: what it is opened as: a model, a part of the carrier, a LoRA, or a file in place of one of the carrier's.
    refused: at what point.
    """

    make: Callable[[Path, "Carrier"], Path]
    told: str
    slots: tuple[str, ...] = EVERY
    refused: str = HEADER


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """header: what becomes JSON, or bytes; length: what the file says of it, if not the truth."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def whole(tensors: Tensors, words: dict[str, str] | None = None, metadata: Any = None) -> bytes:
    """A sound safetensors file. words: dtypes that numpy does not have, by name of the tensor."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, value in tensors.items():
        dtype = (words or {}).get(name) or _WORDS[value.dtype.str[1:]]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    return safetensors(header, b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values()))


def hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A sound safetensors file of zeros in F16 that takes no room on disk, however large it is."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = safetensors(header)
    os.truncate(write(path, raw), len(raw) + at)
    return path


def write(path: Path, content: Any) -> Path:
    """A file of these bytes, or of this as JSON, in place of any that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def rejson(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    write(path, json.loads(path.read_text("utf-8")) | values)


class Carrier:
    """The sound model: its folder in our own layout, and its tensors by part, float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Tensors] = {}
        draw = np.random.default_rng(0)
        index = {"_class_name": "KontextPipeline", "resolutions": [[32, 32]], "defaults": {"max_sequence_length": 16}}
        write(folder / "model_index.json", index)
        write(folder / "scheduler" / "scheduler_config.json", {"use_dynamic_shifting": True})
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(demo_folder() / name, folder / name)
        for part, (config, model) in MODELS.items():
            sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in SIZES[part].items()}
            shapes = {
                name: value.shape for name, value in dict(tree_flatten(model(config(**sizes)).parameters())).items()
            }
            self.tensors[part] = {
                name: draw.normal(len(shape) == 1, np.prod(shape[1:]) ** -0.5, shape).astype("f4")
                for name, shape in shapes.items()
            }
            write(folder / part / "config.json", SIZES[part])
            write(folder / part / "model.safetensors", whole(self.tensors[part]))

    def copy(self, folder: Path) -> Path:
        """A model folder whose files are the carrier's own until `write` puts others in their place."""
        return Path(shutil.copytree(self.folder, folder, copy_function=os.link))

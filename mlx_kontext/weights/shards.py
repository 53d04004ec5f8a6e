"""One safetensors file written tensor by tensor, so that a shard of a gigabyte never lies in memory as a whole."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..backend import mx
from ..disk import replace_atomic

SHARD_BYTES = 10**9
_WORDS = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


@dataclass(frozen=True)
class Shard:
    """A file to be written. tensors: name -> dtype and shape, in order; an fp16 entry may turn out to be bf16."""

    file: str
    tensors: dict[str, tuple[mx.Dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(dtype.size * prod(shape) for dtype, shape in self.tensors.values())


def into_shards(tensors: dict[str, tuple[mx.Dtype, tuple[int, ...]]]) -> list[Shard]:
    """Tensors grouped into files of at most 1 GB, in order, modulation after the rest and in files of its own.

    The runtime reads modulation once per prompt and schedule, so it must be possible to leave it on disk.
    """
    groups: list[dict[str, tuple[mx.Dtype, tuple[int, ...]]]] = []
    for modulation in (False, True):
        room = 0
        for name, (dtype, shape) in tensors.items():
            if is_modulation(name) != modulation:
                continue
            size = dtype.size * prod(shape)
            if size > room:
                groups.append({})
                room = max(SHARD_BYTES, size)
            groups[-1][name] = (dtype, shape)
            room -= size
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def is_modulation(name: str) -> bool:
    """Whether a transformer tensor is needed only to make the modulation tables."""
    return "_mod.lin." in name or ".modulation.lin." in name


def write_shard(
    folder: Path, shard: Shard, take: Callable[[str], mx.array], progress: Callable[[str], object] = lambda _: None
) -> None:
    """Write a shard under a temporary name, sync it, and give it its name. take: gives each tensor when its turn comes.

    The header stands first in a file and dtypes are known last, so room for it is kept and filled at the end.
    Raises ValueError if a tensor is not what the shard says, RequestError or ResourceError if it cannot be written.
    """

    def write(temporary: Path) -> None:
        found: dict[str, mx.Dtype] = {}
        room = -(-len(_header(shard, dict.fromkeys(shard.tensors, mx.bfloat16))) // 8) * 8
        with temporary.open("r+b") as file:
            file.seek(8 + room)
            written = writer.submit(int)  # what is being written while the next tensor is made
            for name, (dtype, shape) in shard.tensors.items():
                value = take(name)
                if tuple(value.shape) != shape or value.dtype.size != dtype.size:
                    raise ValueError(f"{name} is {value.dtype} {value.shape}, planned was {dtype} {shape}")
                found[name] = value.dtype
                raw = mx.contiguous(value).reshape(-1).view(mx.uint8)
                mx.eval(raw)
                written.result()
                if raw.size:
                    written = writer.submit(file.write, memoryview(raw))  # type: ignore[arg-type]  # arrays are buffers
                del value, raw
                mx.clear_cache()
                progress(name)
            written.result()
            file.seek(0)
            file.write(room.to_bytes(8, "little") + _header(shard, found).ljust(room))

    with ThreadPoolExecutor(1) as writer:
        replace_atomic(folder / shard.file, write, overwrite=True)


def _header(shard: Shard, dtypes: dict[str, mx.Dtype]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    begin = 0
    for name, (dtype, shape) in shard.tensors.items():
        end = begin + dtype.size * prod(shape)
        entries[name] = {"dtype": _WORDS[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return json.dumps(entries, separators=(",", ":")).encode()

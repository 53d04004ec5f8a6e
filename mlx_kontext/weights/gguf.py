"""The gate that every GGUF file passes: its header, read and checked. Standard library only; no weights are read.

MLX's own loader dies of crafted GGUF files and drops tensors of types it does not know, so it never sees one. This gate
takes a subset of what ggml takes: known types, bounded lists without nesting, and tensors one behind the other in the
order of their entries. `ggml.py` reads the weights, `gguf_parts.py` knows what they are for. Format: ggml's docs/gguf.md.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .header import _cut, _expect_name, _line, _opened, _other_kind

_MAX_HEADER = 32 * 2**20  # bytes; that of a T5 with its tokenizer is 1 MB
_MAX_ENTRIES = 2**16  # tensors, and metadata keys; FLUX has 780 tensors
_MAX_STRINGS = 2**20  # in all lists together; they cost 60 bytes each in memory
_MAX_NUMBERS = 2**21
_MAX_STRING = 2**20  # bytes
_MAX_ALIGNMENT = 2**16
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", _UINT32: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}

# id -> name, numbers in a block, bytes of a block
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
BLOCKS = {name: (numbers, nbytes) for name, numbers, nbytes in _TYPES.values()}
_UNREAD = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
_UNREAD |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_UNREAD |= {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor. shape: as in torch (outermost first); offset: of its first byte in the file at `path`."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class GGUF:
    """What a GGUF file says about itself, checked. Lists in `metadata` are tuples."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUF:
    """Read and check the header of a GGUF file. Raises CheckpointError, in one line, for all but a sound file."""
    with _opened(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
        if not head.startswith(b"GGUF"):
            raise CheckpointError(_line(f"{path} {_other_kind(head, 'GGUF')}"))
        file.seek(4)
        fields = _Fields(file, size - 4)
        _expect_version(path, fields.take(4))
        tensors, keys = fields.count("tensors", _MAX_ENTRIES), fields.count("metadata keys", _MAX_ENTRIES)
        metadata, alignment = _metadata(fields, keys)
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(_line(f"{path} is one part of a split GGUF; join them: llama-gguf-split --merge"))
        entries = [_entry(path, fields) for _ in range(tensors)]
        return GGUF(path, metadata, _placed(path, entries, -(-file.tell() // alignment) * alignment, alignment, size))


def _short(value: Any) -> str:
    return _cut(value[:4] if isinstance(value, tuple) else value)  # the text of a million numbers takes a second


class _Fields:
    """Reads a header from front to back, and never more of it than the file or our bounds allow."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.left = min(size, _MAX_HEADER)
        self.allowed = {"strings": _MAX_STRINGS, "numbers": _MAX_NUMBERS}

    def take(self, length: int) -> bytes:
        if length > self.left:
            if self.size < _MAX_HEADER:
                raise ValueError("the file is cut short within its header, or a length in it is wrong")
            raise ValueError("its header is over 32 MB, or a length in it is wrong; expected about 1 MB")
        self.left -= length
        raw = self.file.read(length)
        if len(raw) < length:
            raise ValueError("the file became shorter while it was read")
        return raw

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize(letter)))
        return value

    def count(self, what: str, most: int) -> int:
        value = int.from_bytes(self.take(8), "little")
        if value > most:
            raise ValueError(f"it says it has {value:,} {what}; expected at most {most:,}")
        return value

    def string(self) -> str:
        return self.take(self.count("bytes in a text", _MAX_STRING)).decode()

    def value(self, kind: int) -> Any:
        """A number, a text, or a tuple of either."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"))
        if kind not in _SCALARS:
            raise ValueError(f"it has a value of type {kind}; expected one of 0 to 12")
        value = self.number(_SCALARS[kind])
        return _flags([value])[0] if kind == _BOOL else value

    def array(self, kind: int) -> tuple[Any, ...]:
        if kind != _STRING and kind not in _SCALARS:
            raise ValueError(f"it has a list of values of type {kind}; expected texts or numbers, no lists in lists")
        what = "strings" if kind == _STRING else "numbers"
        count = self.count(f"{what} in lists", self.allowed[what])
        self.allowed[what] -= count
        if kind == _STRING:
            return tuple(self.string() for _ in range(count))
        form = f"<{count}{_SCALARS[kind]}"
        values = struct.unpack(form, self.take(struct.calcsize(form)))
        return tuple(_flags(values)) if kind == _BOOL else values


def _flags(values: Any) -> list[bool]:
    if any(value > 1 for value in values):
        raise ValueError("it has a flag that is neither 0 nor 1")
    return [value == 1 for value in values]


def _expect_version(path: Path, raw: bytes) -> None:
    version, swapped = int.from_bytes(raw, "little"), int.from_bytes(raw, "big")
    if swapped in (1, 2, 3):
        raise CheckpointError(_line(f"{path} is a big-endian GGUF; take the usual, little-endian file of that model"))
    if version not in (2, 3):
        raise CheckpointError(
            _line(f"{path} is GGUF of version {version}; expected 2 or 3, take a newer file of that model")
        )


def _metadata(fields: _Fields, keys: int) -> tuple[dict[str, Any], int]:
    """The metadata, and the alignment of the tensors in bytes."""
    metadata: dict[str, Any] = {}
    alignment = 32
    for _ in range(keys):
        key = fields.string()
        if key in metadata or not key.isprintable() or not 0 < len(key) <= 256:
            raise ValueError(
                f"it has the metadata key {_cut(key)}; expected up to 256 printable characters, and each once"
            )
        kind = fields.number("I")
        metadata[key] = fields.value(kind)
        if key == "general.alignment":
            alignment = metadata[key] if kind == _UINT32 else 0
            if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
                raise ValueError(
                    f"its alignment is {_short(metadata[key])}; expected a power of two such as 32, as uint32"
                )
    return metadata, alignment


def _entry(path: Path, fields: _Fields) -> GGUFTensor:
    """Check one tensor's entry as far as it can be by itself; the offset is still that within the data."""
    name = fields.string()
    _expect_name(name)
    dims = fields.number("I")
    if dims > 4:
        raise ValueError(f"{_cut(name)} has {dims:,} dimensions; expected at most 4")
    sizes = [fields.number("Q") for _ in range(dims)]
    if not all(0 < size < 2**31 for size in sizes):
        raise ValueError(f"{_cut(name)} has sizes {sizes}; expected 1 to 2^31 - 1")
    kind, offset = fields.number("I"), fields.number("Q")
    if kind not in _TYPES:
        raise CheckpointError(
            _line(
                f"{path}: {_cut(name)} is of type {_UNREAD.get(kind, f'number {kind}')}; this version reads "
                f"{', '.join(BLOCKS)}: take the Q4_K_S or Q8_0 file of that model"
            )
        )
    word, numbers, nbytes = _TYPES[kind]
    row = sizes[0] if sizes else 1
    if row % numbers:
        raise ValueError(f"{_cut(name)} is {word} with rows of {row:,}; expected a multiple of {numbers}")
    return GGUFTensor(name, word, tuple(reversed(sizes)), offset, math.prod(sizes) // numbers * nbytes, path)


def _placed(path: Path, entries: list[GGUFTensor], start: int, alignment: int, size: int) -> dict[str, GGUFTensor]:
    """Check that each tensor begins where the one before ends, padded, and lies within the file."""
    tensors: dict[str, GGUFTensor] = {}
    at = 0
    for entry in entries:
        if entry.name in tensors:
            raise ValueError(f"it has two tensors called {_cut(entry.name)}; expected each once")
        if entry.offset != at:
            raise ValueError(
                f"{_cut(entry.name)} overlaps another tensor, leaves a hole or is not aligned: "
                f"at byte {entry.offset:,}, expected {at:,}"
            )
        end = start + at + entry.nbytes
        if end > size:
            raise ValueError(f"the file is cut short: {size:,} bytes, {_cut(entry.name)} ends at {end:,}")
        tensors[entry.name] = GGUFTensor(entry.name, entry.type, entry.shape, start + at, entry.nbytes, path)
        at += -(-entry.nbytes // alignment) * alignment
    return tensors

"""The gate that every safetensors file passes before MLX sees it. Standard library only; no weights are read.

MLX believes a header: overlaps, holes and sizes that wrap around pass its checks, and some crafted files crash the
process. This gate takes a subset of what the format's own (Rust) reader takes: known dtypes, plain numbers, and tensors
whose exact bytes cover the file from end to end.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

_MAX_JSON = 8 * 2**20  # bytes; headers and indexes of FLUX stay under 1 MB
_MAX_DEPTH = 6
_MAX_TOKENS = 2**18  # strings, brackets, commas: 15,000 tensors, while 8 MB of "{}" would take 300 MB to parse
_MAX_NAMES = 2**15  # of an index; all it says is looked at several times
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)  # possessive: linear on any input
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor; `dtype` is safetensors' word for it: F32, BF16, U32, F8_E4M3, ...; begin: its first byte."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself, checked."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file. Raises CheckpointError, in one line, for all but a sound file."""
    with _opened(path) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(512)
        length = int.from_bytes(head[:8], "little")
        # Other kinds are looked for only now: the length of a sound header may begin with the bytes of a pickle.
        if len(head) < 8 or not 2 <= length <= _MAX_JSON:
            raise CheckpointError(_line(f"{path} {_other_kind(head)}"))
        if 8 + length > size:
            raise ValueError(f"the file is cut short within its header, {size:,} of at least {8 + length:,} bytes")
        file.seek(8)
        return _header(file.read(length), size - 8 - length)


def read_index(path: Path) -> dict[str, Path]:
    """Read a `*.safetensors.index.json`: tensor name -> the shard it is in, which lies beside the index.

    Raises CheckpointError, in one line, for a damaged index, a name that leads elsewhere, or a shard that is missing.
    """
    with _opened(path) as file:
        names = _parse(_small(file, "a small index of names")).get("weight_map")
        if not isinstance(names, dict) or not 0 < len(names) <= _MAX_NAMES:
            raise ValueError("it has no weight_map; expected some thousand tensor names and the files they are in")
        for name, shard in names.items():
            _expect_name(name)
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                raise ValueError(f"{_cut(name)} is said to be in {_cut(shard)}; expected a safetensors file beside it")
        shards = {shard: _shard(path.parent, shard) for shard in sorted(set(names.values()))}
        return {name: shards[shard] for name, shard in names.items()}


def read_small(path: Path, expected: str) -> bytes:
    """All bytes of a file that has no reason to be large. Raises CheckpointError for over 8 MB, and for what is no file."""
    with _opened(path) as file:
        return _small(file, expected)


def _small(file: BinaryIO, expected: str) -> bytes:
    raw = file.read(_MAX_JSON + 1)
    if len(raw) > _MAX_JSON:
        raise ValueError(f"the file is over 8 MB; expected {expected}")
    return raw


def _header(raw: bytes, data: int) -> Header:
    """Check every entry, then that together they cover the `data` bytes behind the header."""
    if not (raw.startswith(b"{") and raw.rstrip(b" ").endswith(b"}")):
        raise ValueError("its header is no JSON object; expected {...}, padded with spaces if at all")
    entries = _parse(raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # MLX writes null
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its __metadata__ is {_cut(metadata)}; expected texts only")
    "".join(key + value for key, value in metadata.items()).encode()  # raises for half a surrogate pair, as Rust does

    found = {name: _tensor(name, entry) for name, entry in entries.items()}
    end = 0
    for name, (begin, info) in sorted(found.items(), key=lambda item: (item[1][0], item[1][1].nbytes)):
        if begin != end:
            raise ValueError(f"{_cut(name)} overlaps another tensor or leaves a hole: at byte {begin}, expected {end}")
        end += info.nbytes
    if end > data:
        raise ValueError(f"the file is cut short: {data:,} bytes of tensors, expected {end:,}")
    if end < data:
        raise ValueError(f"the file has {data - end:,} bytes too many; expected {end:,} bytes of tensors")
    start = 8 + len(raw)
    return Header({name: replace(info, begin=start + begin) for name, (begin, info) in found.items()}, metadata)


def _tensor(name: str, entry: Any) -> tuple[int, TensorInfo]:
    """Check one entry; returns the byte at which its data begin, and what it is."""
    _expect_name(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_cut(name)} is {_cut(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{_cut(name)} has dtype {_cut(dtype)}; expected F32, F16, BF16 or another of the format's")
    if not _integers(shape) or len(shape) > 8 or any(size >= 2**31 for size in shape):
        raise ValueError(f"{_cut(name)} has shape {_cut(shape)}; expected at most 8 sizes below 2^31")
    if not _integers(offsets) or len(offsets) != 2:
        raise ValueError(f"{_cut(name)} has data_offsets {_cut(offsets)}; expected where it begins and ends")
    bits = math.prod(shape) * _BITS[dtype]
    # The second test is for empty tensors: a 0 among huge sizes hides that their product overflows in other readers.
    if bits != 8 * (offsets[1] - offsets[0]) or math.prod(size or 1 for size in shape) >= 2**48:
        raise ValueError(f"{_cut(name)} is said to be {dtype} {shape}; expected what fits its data_offsets {offsets}")
    return offsets[0], TensorInfo(dtype, tuple(shape), bits // 8)


def _parse(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object in bounded time, memory and depth; keys are unique, integers are sizes or offsets."""
    depth = 0
    for count, match in enumerate(_TOKEN.finditer(raw)):
        depth += (match[0] in b"[{") - (match[0] in b"]}")
        if depth > _MAX_DEPTH or count > _MAX_TOKENS:
            raise ValueError("its JSON is too deep or too long; expected a flat list of some thousand tensors")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_integer)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its JSON is damaged ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"its JSON is {_cut(value)}; expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers disagree about which of the two counts
        raise ValueError("a name appears twice in its JSON; expected each tensor once")
    return found


def _integer(digits: str) -> int:
    if not digits.isdecimal() or len(digits) > 18:  # no sign, even of -0; and long numbers take long to read
        raise ValueError(f"its JSON has the number {digits[:24]}; expected sizes and offsets")
    return int(digits)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # True and 1.0 are none


def _expect_name(name: str) -> None:
    if not name.isprintable() or not 0 < len(name) <= 256:
        raise ValueError(f"it has a tensor called {_cut(name)}; expected up to 256 printable characters")


def _shard(folder: Path, name: str) -> Path:
    """The path of a shard. In the hub's cache it is a link, which may lead into that cache's blobs and nowhere else."""
    home = folder.resolve()
    allowed = [home]
    for snapshots in home.parents:
        if snapshots.name == "snapshots" and "--" in snapshots.parent.name:  # models--owner--name
            # the repository's own blobs, and (huggingface_hub 2) a store that all repositories share
            allowed += [snapshots.parent / "blobs", snapshots.parent.parent / "blobs"]
    try:
        real = Path(os.path.realpath(folder / name, strict=True))
    except FileNotFoundError:
        raise ValueError(f"the shard {name} is missing") from None
    if not real.is_file() or not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"the shard {name} leads elsewhere; expected a file in this folder")
    return folder / name  # not `real`: blobs have no suffix, and mx.load goes by it


def _other_kind(head: bytes, expected: str = "safetensors") -> str:
    """What a file is instead of what was `expected`, from its first bytes, and what to do."""
    if not head.strip(b"\0"):
        return "is empty, or its download was never finished; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the weights; run git lfs pull, or download it again"
    if head.startswith(b"GGUF"):
        return f"is a GGUF file; expected {expected}, take that version of the model"
    if expected != "safetensors" and head[8:9] == b"{":
        return f"is a safetensors file; expected {expected}"
    if head.startswith(b"PK\3\4"):
        return f"is a zip archive (a PyTorch .pt or .ckpt?); expected {expected}, take that version of the model"
    if head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        return f"is a Python pickle, which may run code; expected {expected}, take that version of the model"
    if head.lstrip().startswith(b"<"):
        return f"is a web page (HTML), perhaps one to log in; expected {expected}, download it again"
    if not re.search(rb"[\0-\x08\x0e-\x1f\x7f]", head):
        return f"is a text file; expected {expected}, download it again"
    if expected == "safetensors":
        return "is no safetensors file: it does not begin with the length of a header; download it again"
    return f"is no {expected} file; download it again"


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; whatever goes wrong with it, also later, becomes one line that names it."""
    try:
        if not path.is_file():  # asked before opening: a named pipe would wait for its writer
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(_line(f"{path} cannot be read ({error.strerror}); check the disk and rights")) from None
    except (RecursionError, MemoryError):
        raise CheckpointError(_line(f"{path}: its header is too large for this machine; download it again")) from None
    except ValueError as error:
        raise CheckpointError(_line(f"{path}: {error}; download it again")) from None


def _cut(value: Any) -> str:
    return f"{value!r:.80}"


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)

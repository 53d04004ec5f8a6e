"""The header gate: sound files pass, hostile ones get one line, and nothing passes that the Rust reader refuses."""

import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from mlx_kontext.errors import CheckpointError
from mlx_kontext.weights.header import Header, TensorInfo, read_header, read_index

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
DATA = bytes(8)


def pack(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A safetensors file; `header` is raw bytes or what becomes JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def refusal(path: Path, reader: Any = read_header) -> str:
    """The message of the refusal, which is one line and names the file."""
    with pytest.raises(CheckpointError) as caught:
        reader(path)
    told = str(caught.value)
    assert path.name[:150] in told and told.isprintable() and len(told) < 400 + len(str(path))
    return told


# file, what the message says
HOSTILE: dict[str, tuple[bytes, str]] = {
    # something else, or not all of it
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "never finished"),
    "one byte": (b"\1", "no safetensors file"),
    "text": (b"ab", "is a text file"),
    "longer text": ("Ein Satz über Käse.\n".encode() * 9, "is a text file"),
    "JSON": (json.dumps({"a": A}).encode(), "is a text file"),
    "HTML": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "run git lfs pull"),
    "zip": (b"PK\3\4" + bytes(99), "zip archive"),
    "pickle": (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(99), "is a GGUF file"),
    "noise": (random.Random(0).randbytes(999), "no safetensors file"),
    "cut in the header": (pack({"a": A})[:30], "cut short within its header"),
    "cut in the data": (pack({"a": A})[:-1], "cut short: 7 bytes of tensors, expected 8"),
    "cut behind the header": (pack({"a": A}, b""), "cut short"),
    # lengths
    "header of 0 bytes": (pack(b"", b"abc\0"), "no safetensors file"),
    "header of 2^63 bytes": (pack({"a": A}, length=2**63), "no safetensors file"),
    "header over 8 MB": (pack({"a": A}, length=8 * 2**20 + 1), "no safetensors file"),
    "header longer than the file": (pack({"a": A}, length=8 * 2**20), "cut short within its header"),
    "header one too short": (pack({"a": A}, length=len(json.dumps({"a": A})) - 1), "damaged"),
    # JSON
    "array": (pack([A]), "no JSON object"),
    "leading space": (pack(b" {}", b""), "no JSON object"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}", b""), "no JSON object"),
    "padding of NUL": (pack(b"{}\0\0", b""), "no JSON object"),
    "padding of newlines": (pack(b"{}\n", b""), "no JSON object"),
    "two objects": (pack(b"{}{}", b""), "damaged"),
    "comma at the end": (pack(b'{"a":{},}', b""), "damaged"),
    "not UTF-8": (pack(b'{"\xff":0}', b""), "damaged"),
    "UTF-16": (pack("{}".encode("utf-16-le"), b""), "no JSON object"),
    "control character": (pack(b'{"a\1":0}', b""), "damaged"),
    "NaN": (pack(b'{"a":NaN}', b""), "'a' is nan"),
    "deep": (pack(b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}", b""), "too deep"),
    "just too deep": (pack(b'{"a":[[[[[[]]]]]]}', b""), "too deep"),
    "brackets in a text hide no depth": (pack(b'{"\\"]]]]]]":[[[[[[]]]]]]}', b""), "too deep"),
    "duplicate": (pack(b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2)), "appears twice"),
    "duplicate key": (pack(b'{"a":{"shape":[2],"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "appears twice"),
    "duplicate in metadata": (pack(b'{"__metadata__":{"a":"1","a":"2"}}', b""), "appears twice"),
    "number of a million digits": (pack(b'{"a":' + b"9" * 10**6 + b"}", b""), "the number 9999"),
    "minus zero": (pack(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "the number -0"),
    # entries
    "metadata of numbers": (pack({"__metadata__": {"a": 1}, "a": A}), "expected texts only"),
    "metadata 0": (pack({"__metadata__": 0, "a": A}), "expected texts only"),
    "metadata []": (pack({"__metadata__": [], "a": A}), "expected texts only"),
    "half a surrogate pair": (pack({"__metadata__": {"a": "\ud800"}}, b""), "surrogates not allowed"),
    "no name": (pack({"": A}), "expected up to 256 printable characters"),
    "long name": (pack({"a" * 257: A}), "expected up to 256 printable characters"),
    "escape sequence": (pack({"\x1b[2Ja": A}), "printable"),
    "newline": (pack({"a\nb": A}), "printable"),
    "right-to-left": (pack({"\u202ea": A}), "printable"),
    "surrogate": (pack({"\ud800": A}), "printable"),
    "entry is null": (pack({"a": None}), "'a' is None; expected dtype, shape and data_offsets"),
    "entry is a list": (pack({"a": ["F32", [2], [0, 8]]}), "expected dtype, shape and data_offsets"),
    "no shape": (pack({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "expected dtype, shape and data_offsets"),
    "extra key": (pack({"a": A | {"strides": [1]}}), "expected dtype, shape and data_offsets"),
    "unknown dtype": (pack({"a": A | {"dtype": "F128"}}), "has dtype 'F128'"),
    "dtype in lower case": (pack({"a": A | {"dtype": "f32"}}), "has dtype 'f32'"),
    "dtype is a list": (pack({"a": A | {"dtype": ["F32"]}}), "has dtype"),
    "shape is a number": (pack({"a": A | {"shape": 2}}), "has shape 2"),
    "shape is a text": (pack({"a": A | {"shape": "2"}}), "has shape '2'"),
    "shape of floats": (pack({"a": A | {"shape": [2.0]}}), "has shape [2.0]"),
    "shape of bools": (pack({"a": A | {"shape": [True, 2]}}), "has shape [True, 2]"),
    "shape of lists": (pack({"a": A | {"shape": [[2]]}}), "has shape [[2]]"),
    "negative shape": (pack({"a": A | {"shape": [-2]}}), "the number -2"),
    "two negatives": (pack({"a": A | {"shape": [-2, -1]}}), "the number -2"),
    "nine dimensions": (pack({"a": A | {"shape": [2] + [1] * 8}}), "at most 8 sizes"),
    "100,000 dimensions": (pack({"a": A | {"shape": [1] * 100_000}}), "at most 8 sizes"),
    "dimension of 2^31": (pack({"a": EMPTY | {"shape": [0, 2**31]}}, b""), "at most 8 sizes below 2^31"),
    # 2^62 + 2^20 floats, which in 64 bits are the 4 MB the file has: MLX takes it, and the next operation is a SIGSEGV
    "product wraps around": (
        pack({"a": {"dtype": "F32", "shape": [1048576, 304384145, 14449], "data_offsets": [0, 2**22]}}, bytes(2**22)),
        "expected what fits its data_offsets [0, 4194304]",
    ),
    "zero hides an overflow": (pack({"a": EMPTY | {"shape": [2**31 - 1] * 3 + [0]}}, b""), "expected what fits"),
    "too large": (pack({"a": A | {"shape": [3]}}), "expected what fits"),
    "too small": (pack({"a": A | {"shape": [1]}}), "expected what fits"),
    "half a byte": (
        pack({"a": {"dtype": "F4", "shape": [15], "data_offsets": [0, 7]}}, bytes(7)),
        "expected what fits",
    ),
    # offsets
    "one offset": (pack({"a": A | {"data_offsets": [8]}}), "has data_offsets [8]"),
    "three offsets": (pack({"a": A | {"data_offsets": [0, 8, 8]}}), "has data_offsets [0, 8, 8]"),
    "offsets of floats": (pack({"a": A | {"data_offsets": [0.0, 8.0]}}), "has data_offsets [0.0, 8.0]"),
    "negative offsets": (pack({"a": A | {"data_offsets": [-8, 0]}}), "the number -8"),
    "offsets swapped": (pack({"a": A | {"data_offsets": [8, 0]}}), "expected what fits"),
    "offsets wrap into the header": (pack({"a": A | {"data_offsets": [2**64 - 60, 2**64 - 52]}}), "the number 18446"),
    "begins late": (pack({"a": A | {"data_offsets": [4, 12]}}, bytes(12)), "at byte 4, expected 0"),
    "same bytes twice": (pack({"a": A, "b": A}), "overlaps another tensor"),
    "overlap": (pack({"a": A, "b": A | {"data_offsets": [4, 12]}}, bytes(12)), "at byte 4, expected 8"),
    "hole": (pack({"a": A, "b": A | {"data_offsets": [12, 20]}}, bytes(20)), "at byte 12, expected 8"),
    "empty tensor inside another": (pack({"a": A, "b": EMPTY | {"data_offsets": [4, 4]}}), "overlaps another"),
    "bytes behind": (pack({"a": A}, bytes(9)), "1 bytes too many"),
    "bytes without tensors": (pack({}, b"x"), "1 bytes too many"),
    "far beyond the file": (
        pack({"a": {"dtype": "U8", "shape": [2**31 - 1, 2**16], "data_offsets": [0, (2**31 - 1) * 2**16]}}),
        "cut short",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, told = HOSTILE[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    assert told in refusal(tmp_path / "model.safetensors")


# up to 8 MB of what a JSON parser finds expensive
COSTLY = {
    "lists": b'{"a":[' + b"[]," * (2**23 // 3 - 9) + b"0]}",
    "objects": b'{"a":[' + b'{"":0},' * (2**23 // 7 - 9) + b"0]}",
    "numbers": b'{"a":[' + b"0," * (2**22 - 9) + b"0]}",
    "depth": b'{"a":' + b"[" * (2**23 - 9) + b"}",
    "escapes": b'{"' + b'\\"' * (2**22 - 9) + b"}",
    "one number": b'{"a":' + b"9" * (2**23 - 9) + b"}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files_are_refused_cheaply(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(COSTLY[name], b""))
    seconds, memory = time.process_time(), peak()
    refusal(path)
    assert time.process_time() - seconds < 2 and peak() - memory < 300


def peak() -> float:
    """The most memory this process ever had, in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def test_what_is_no_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("missing", "pipe", "folder", "loop"):
        assert "there is no such file" in refusal(tmp_path / f"{name}.safetensors")
        assert "there is no such file" in refusal(tmp_path / f"{name}.safetensors", read_index)
    assert "name too long" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "a.safetensors").write_bytes(pack({"a": A}))
    for error in (PermissionError(13, "Permission denied"), MemoryError(), RecursionError()):
        monkeypatch.setattr(Path, "open", lambda *_, error=error: (_ for _ in ()).throw(error))
        refusal(tmp_path / "a.safetensors")


def test_a_hostile_file_name_stays_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "a\n\x1b[2Jb.safetensors")
    assert "a??[2Jb.safetensors: there is no such file" in str(caught.value)


# Sound files


def test_small_sound_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wide = {"dtype": "U8", "shape": [], "data_offsets": [8, 9]}
    for header, data in (
        ({}, b""),
        (b"{}   ", b""),
        ({"__metadata__": None, "a": A}, DATA),
        ({"late": wide, "a": A, "none": EMPTY | {"data_offsets": [8, 8]}, "zero": EMPTY}, bytes(9)),
        ({"f4": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}, bytes(3)),
        ({"__metadata__": {"json": '{"[[[[[[[["'}, "ä ü.weight": A}, DATA),
    ):
        path.write_bytes(pack(header, data))
        assert sum(info.nbytes for info in read_header(path).tensors.values()) == len(data)
        safetensors.deserialize(path.read_bytes())
    # 0x0280 = 640 bytes of header: begins like a pickle and is none
    path.write_bytes(pack(json.dumps({"a": A}).encode().ljust(640)))
    assert read_header(path) == Header({"a": TensorInfo("F32", (2,), 8)}, {})


def test_reads_what_the_rust_writer_writes(tmp_path: Path) -> None:
    dtypes = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]
    words = ["BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64", "C64"]
    arrays = {f"{n}.{len(shape)}": np.zeros(shape, n) for n in dtypes for shape in [(), (3,), (2, 0, 5), (1, 2, 3, 4)]}
    save_file(arrays, tmp_path / "a.safetensors", {"format": "pt", "note": "ü\n"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt", "note": "ü\n"}
    assert header.tensors == {
        name: TensorInfo(words[dtypes.index(name[:-2])], array.shape, array.nbytes) for name, array in arrays.items()
    }
    save_file({}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors") == Header({}, {})


def test_reads_what_mlx_writes(tmp_path: Path) -> None:
    dtypes = [mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16, mx.uint32, mx.int32, mx.uint64, mx.int64]
    dtypes += [mx.float16, mx.bfloat16, mx.float32, mx.complex64]
    words = ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "C64"]
    shapes = [(), (3,), (2, 0, 5), (1, 2, 3, 4)]
    arrays = {f"{w}.{len(s)}": mx.zeros(s, d) for w, d in zip(words, dtypes, strict=True) for s in shapes}
    path = tmp_path / "a.safetensors"
    for metadata in ({}, {"format": "mlx"}):
        mx.save_safetensors(str(path), arrays, metadata or None)
        header = read_header(path)
        assert header.metadata == metadata
        assert header.tensors == {n: TensorInfo(n[:-2], tuple(x.shape), x.nbytes) for n, x in arrays.items()}
    mx.save_safetensors(str(path), {})
    assert read_header(path) == Header({}, {})


# Mutants


def mutant(rng: random.Random, raw: bytes, data: bytes) -> bytes:
    """A copy with one to three small changes, mostly in the header, whose length is mostly set right again."""
    tokens = [b"0", b"8", b"-1", b"1.0", b"true", b"null", b'"', b",", b"[", b"]", b"{}", b" ", b"\\u0000", b"\xff"]
    tokens += [b"U8", b"F16", b"18446744073709551616", b'"a"', b"\\ud800", b"2147483648", b"-0", b"\\", b"\0"]
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, other = rng.randrange(len(changed)), rng.randrange(len(changed))
        width = rng.choice((1, 1, 1, 2, 8))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + width] = rng.choice(tokens)
            case 2:
                changed[at:at] = rng.choice(tokens)
            case 3:
                changed[at : at + width] = changed[other : other + width]
            case 4:
                del changed[at : at + width]
            case 5:  # a digit for a digit: the JSON stays whole, so the checks behind it get to work
                digits = [i for i, byte in enumerate(changed) if chr(byte) in "0123456789"]
                changed[rng.choice(digits)] = rng.choice(b"0123456789")
    length = None if rng.random() < 0.9 else len(changed) + rng.choice((-1, 1, 8, 256, 2**20, 2**40))
    data = rng.choice((*[data] * 9, data[:-1], data + b"\0"))
    return pack(bytes(changed), data, length)


def test_no_mutant_passes_that_rust_refuses(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "mutant.safetensors"
    arrays = {"a": np.ones((3, 2), "f4"), "b.weight": np.zeros((2, 0)), "c": np.ones((), "i8"), "d": np.ones(4, "f2")}
    save_file(arrays, path, {"format": "pt", "x": "{}"})
    whole = path.read_bytes()
    split = 8 + int.from_bytes(whole[:8], "little")
    passed = 0
    for _ in range(3000):
        with path.open("r+b") as file:  # in place: a file system may sync what is emptied and written anew
            file.write(mutant(rng, whole[8:split], whole[split:]))
            file.truncate()
        try:
            ours = read_header(path).tensors
        except CheckpointError as error:
            assert str(error).isprintable() and path.name in str(error)
            continue
        theirs = {name: (x["dtype"], tuple(x["shape"]), len(x["data"])) for name, x in rust(path)}
        assert {name: (x.dtype, x.shape, x.nbytes) for name, x in ours.items()} == theirs
        passed += 1
    assert 100 < passed < 1500  # neither is a test of the other


def rust(path: Path) -> Any:
    try:
        return safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        pytest.fail(f"the gate let through what Rust refuses ({error}): {path.read_bytes()!r}")


# The index of a model in shards


def index(folder: Path, weight_map: Any, **more: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 16.0}, "weight_map": weight_map} | more))
    return path


def test_index_leads_to_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (tmp_path / name).write_bytes(pack({"a": A}))
    path = index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"})
    one, two = tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors"
    assert read_index(path) == {"a": one, "b": two, "c": one}
    monkeypatch.chdir(tmp_path)
    assert read_index(Path(path.name)) == {"a": Path(one.name), "b": Path(two.name), "c": Path(one.name)}
    two.unlink()
    assert "the shard m-2.safetensors is missing; download it again" in refusal(path, read_index)
    two.mkdir()
    assert "m-2.safetensors leads elsewhere; expected a file" in refusal(path, read_index)


PATHS = [
    "../a.safetensors",
    "..",
    "",
    ".safetensors",
    "/etc/passwd",
    "/tmp/a.safetensors",
    "sub/a.safetensors",
    "..\\a.safetensors",
    "C:a.safetensors",
    "~/a.safetensors",
    ".hidden.safetensors",
    "-a.safetensors",
    "a.safetensors\n",
    "a.safetensors\0",
    "a\x1b.safetensors",
    "ä.safetensors",
    "a .safetensors",
    "a.safetensors.bin",
    "a.gguf",
    "A.SAFETENSORS",
    "a" * 129 + ".safetensors",
    None,
    1,
    ["a.safetensors"],
    {"a": "b"},
]


@pytest.mark.parametrize("name", PATHS, ids=repr)
def test_index_takes_plain_names_only(tmp_path: Path, name: Any) -> None:
    assert "expected a safetensors file beside it" in refusal(index(tmp_path, {"a": name}), read_index)


INDEXES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged"),
    "not JSON": (b"<html>", "damaged"),
    "array": (b"[]", "expected an object"),
    "no map": (b"{}", "no weight_map"),
    "map is a list": (b'{"weight_map":["a"]}', "no weight_map"),
    "map is empty": (b'{"weight_map":{}}', "no weight_map"),
    "name twice": (b'{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}', "appears twice"),
    "map twice": (b'{"weight_map":{"a":"a.safetensors"},"weight_map":{}}', "appears twice"),
    "unprintable": (b'{"weight_map":{"\\u001b[2J":"a.safetensors"}}', "printable"),
    "over 8 MB": (b"{}".ljust(8 * 2**20 + 1), "over 8 MB"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_damaged_index(tmp_path: Path, name: str) -> None:
    content, told = INDEXES[name]
    (tmp_path / "a.index.json").write_bytes(content)
    assert told in refusal(tmp_path / "a.index.json", read_index)


@pytest.mark.parametrize("store", ["models--owner--name/blobs/0f", "blobs/0f/0f00"], ids=["own", "shared"])
def test_index_in_the_cache_of_the_hub(tmp_path: Path, store: str) -> None:
    """In its cache the hub links a snapshot's files to blobs; since version 2 those may be links to a shared store."""
    repository, shard = tmp_path / "models--owner--name", "m-1.safetensors"
    folder = repository / "snapshots" / "12ab" / "transformer"
    for place in (folder, repository / "blobs", (tmp_path / store).parent):
        place.mkdir(parents=True, exist_ok=True)
    (tmp_path / store).write_bytes(pack({"a": A}))
    if store.startswith("blobs"):
        (repository / "blobs" / "0f").symlink_to(f"../../{store}")
    (folder / shard).symlink_to("../../../blobs/0f")
    path = index(folder, {"a": shard})
    path.rename(repository / "blobs" / "1e")
    path.symlink_to("../../../blobs/1e")
    assert read_index(path) == {"a": folder / shard}
    assert read_header(folder / shard).tensors == {"a": TensorInfo("F32", (2,), 8)}
    (tmp_path / store).unlink()
    assert "the shard m-1.safetensors is missing" in refusal(path, read_index)


def test_a_link_may_not_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f").write_bytes(pack({"a": A}))
    folder = tmp_path / "snapshots" / "model"  # looks like the hub's cache, but belongs to no repository of it
    folder.mkdir(parents=True)
    path = index(folder, {"a": "a.safetensors"})
    shard = folder / "a.safetensors"
    for target in (tmp_path / "blobs" / "0f", "/dev/zero", "/etc/passwd"):
        shard.symlink_to(target)
        assert "leads elsewhere" in refusal(path, read_index)
        shard.unlink()
    shard.symlink_to(shard.name)
    assert "cannot be read" in refusal(path, read_index)

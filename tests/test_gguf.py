"""The GGUF gate: sound files pass, hostile ones get one line, and nothing passes that the gguf package reads otherwise."""

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from test_header import refusal

from mlx_kontext.errors import CheckpointError
from mlx_kontext.weights.gguf import read_gguf


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return u32(kind) + u64(count) + values


def entry(
    name: str | bytes = "a", dims: Any = (32, 2), kind: int = 8, offset: int = 0, ndim: int | None = None
) -> bytes:
    """A tensor; dims innermost first. As it is: Q8_0, 2 rows of one block, 68 bytes."""
    sizes = b"".join(map(u64, dims))
    return text(name) + u32(len(dims) if ndim is None else ndim) + sizes + u32(kind) + u64(offset)


def pack(
    keys: Any = (), tensors: Any = None, data: int = 68, version: int = 3, counts: Any = None, align: int = 32
) -> bytes:
    """A GGUF file with `data` bytes of weights."""
    tensors = [entry()] if tensors is None else tensors
    number, count = counts or (len(tensors), len(keys))
    head = b"GGUF" + u32(version) + u64(number) + u64(count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % align + data)


ARCHITECTURE = key("general.architecture", 8, text("flux"))
ALIGNMENT = "general.alignment"
BIG = struct.pack(">IQQ", 3, 1, 0)
WHOLE = pack([ARCHITECTURE])
UNREAD = [9, 10, 11, *range(15, 30), 34, 35, 39, 40, 41]

# file, what the message says
HOSTILE: dict[str, tuple[bytes, str]] = {
    # something else, or not all of it
    "empty": (b"", "is empty"),
    "zeros": (bytes(999), "never finished"),
    "text": (b"GGU", "is a text file; expected GGUF"),
    "HTML": (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "run git lfs pull"),
    "zip": (b"PK\3\4" + bytes(99), "zip archive"),
    "pickle": (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    "safetensors": (u64(2) + b"{}", "is a safetensors file; expected GGUF"),
    "older GGML": (b"lmgg" + bytes(99), "is no GGUF file"),
    "magic in lower case": (b"gguf" + WHOLE[4:], "is no GGUF file"),
    "magic only": (b"GGUF", "cut short within its header"),
    "cut in the counts": (WHOLE[:20], "cut short within its header"),
    "cut in a key": (WHOLE[:40], "cut short within its header"),
    "cut in a tensor's name": (pack([], [text("abc")[:-1]], 0, counts=(1, 0), align=1), "cut short within its header"),
    "cut in a tensor's entry": (WHOLE[:100], "cut short within its header"),
    "cut before the weights": (pack(data=0), "the file is cut short"),
    "cut in the weights": (WHOLE[:-1], "the file is cut short"),
    # versions
    "version 0": (pack(version=0), "is GGUF of version 0"),
    "version 1": (pack(version=1), "is GGUF of version 1; expected 2 or 3"),
    "version 4": (pack(version=4), "is GGUF of version 4"),
    "big-endian": (b"GGUF" + BIG + bytes(99), "is a big-endian GGUF; take the usual, little-endian file"),
    "part of a split": (pack([key("split.count", 2, b"\2\0")]), "one part of a split GGUF; join them"),
    # counts
    "2^64 - 1 tensors": (pack(counts=(2**64 - 1, 0)), "18,446,744,073,709,551,615 tensors"),
    "65,537 tensors": (pack(counts=(2**16 + 1, 0)), "65,537 tensors; expected at most 65,536"),
    "one tensor too many": (pack(counts=(2, 0), data=0, align=1), "cut short within its header"),
    "2^63 keys": (pack(counts=(1, 2**63)), "metadata keys; expected at most 65,536"),
    "more keys than there are": (pack([ARCHITECTURE], counts=(1, 2)), "bytes in a text; expected at most"),
    # metadata
    "empty key": (pack([key("", 8, text("a"))]), "the metadata key ''"),
    "key of 257": (pack([key("a" * 257, 8, text("a"))]), "the metadata key 'aaa"),
    "key of 2^63": (pack([u64(2**63) + b"abc"]), "9,223,372,036,854,775,808 bytes in a text"),
    "key longer than the file": (pack([u64(2**20) + b"abc"]), "cut short within its header"),
    "key that is no UTF-8": (pack([key(b"\xff", 8, text("a"))]), "can't decode byte 0xff"),
    "key with an escape sequence": (pack([key("\x1b[2J", 8, text("a"))]), "printable"),
    "key twice": (pack([ARCHITECTURE, ARCHITECTURE]), "'general.architecture'; expected up to 256 printable"),
    "type 13": (pack([key("a", 13, b"")]), "a value of type 13; expected one of 0 to 12"),
    "type 2^32 - 1": (pack([key("a", 2**32 - 1, b"")]), "a value of type 4294967295"),
    "text of 2^64 - 1": (pack([key("a", 8, u64(2**64 - 1))]), "bytes in a text; expected at most 1,048,576"),
    "text longer than the file": (pack([key("a", 8, u64(2**20))]), "cut short within its header"),
    "text that is no UTF-8": (pack([key("a", 8, text(b"\xed\xa0\x80"))]), "can't decode"),
    "flag of 2": (pack([key("a", 7, b"\2")]), "a flag that is neither 0 nor 1"),
    "list of flags of 2": (pack([key("a", 9, array(7, 3, b"\0\1\2"))]), "a flag that is neither 0 nor 1"),
    "list of lists": (pack([key("a", 9, array(9, 1, array(0, 1, b"a")))]), "type 9; expected texts or numbers, no lists"),
    "deep lists": (pack([key("a", 9, array(9, 1, b"") * 9000)]), "no lists in lists"),
    "list of type 13": (pack([key("a", 9, array(13, 1, b"a"))]), "a list of values of type 13"),
    "list of 2^64 - 1 numbers": (pack([key("a", 9, array(12, 2**64 - 1, b""))]), "numbers in lists; expected at most"),
    "list of 2^61 numbers": (pack([key("a", 9, array(10, 2**61, b""))]), "numbers in lists; expected at most 2,097,152"),
    "list longer than the file": (pack([key("a", 9, array(0, 2**21, b""))]), "cut short within its header"),
    "list of 2^64 - 1 texts": (pack([key("a", 9, array(8, 2**64 - 1, b""))]), "strings in lists; expected at most"),
    "one text too many": (
        pack([key("a", 9, array(8, 2**20 + 1, b""))]),
        "1,048,577 strings in lists; expected at most 1,048,576",
    ),
    "one number too many": (pack([key("a", 9, array(1, 2**21 + 1, b""))]), "2,097,153 numbers in lists"),
    "list of texts longer than the file": (pack([key("a", 9, array(8, 2**20, b""))]), "it says it has"),
    "lists that are too long together": (
        pack([key(f"{i}", 9, array(0, 2**20, bytes(2**20))) for i in range(3)]),
        "1,048,576 numbers in lists; expected at most 0",
    ),
    # alignment
    "alignment 0": (pack([key(ALIGNMENT, 4, u32(0))]), "its alignment is 0; expected a power of two"),
    "alignment 24": (pack([key(ALIGNMENT, 4, u32(24))]), "its alignment is 24"),
    "alignment 2^31": (pack([key(ALIGNMENT, 4, u32(2**31))]), "its alignment is 2147483648"),
    "alignment -32": (pack([key(ALIGNMENT, 5, struct.pack("<i", -32))]), "its alignment is -32"),
    "alignment as uint64": (pack([key(ALIGNMENT, 10, u64(32))]), "its alignment is 32; expected a power of two such as 32"),
    "alignment as text": (pack([key(ALIGNMENT, 8, text("32"))]), "its alignment is '32'"),
    "alignment as list": (pack([key(ALIGNMENT, 9, array(4, 1, u32(32)))]), "its alignment is (32,)"),
    # entries
    "no name": (pack([], [entry("")]), "expected up to 256 printable characters"),
    "name of 257": (pack([], [entry("a" * 257)]), "expected up to 256 printable characters"),
    "name of 2^63": (pack([], [u64(2**63) + b"abc"]), "bytes in a text"),
    "name with a newline": (pack([], [entry("a\nb")]), "printable"),
    "name from right to left": (pack([], [entry("\u202ea")]), "printable"),
    "name that is no UTF-8": (pack([], [entry(b"\xc3")]), "can't decode"),
    "name twice": (pack([], [entry(), entry(offset=96)], 164), "two tensors called 'a'"),
    "five dimensions": (pack([], [entry(dims=(32, 2, 1, 1, 1))]), "'a' has 5 dimensions; expected at most 4"),
    "2^32 - 1 dimensions": (pack([], [entry(ndim=2**32 - 1)]), "4,294,967,295 dimensions"),
    "size 0": (pack([], [entry(dims=(32, 0))]), "'a' has sizes [32, 0]; expected 1 to 2^31 - 1"),
    "size 2^31": (pack([], [entry(dims=(2**31,))]), "expected 1 to 2^31 - 1"),
    "size 2^64 - 1": (pack([], [entry(dims=(2**64 - 1, 2**64 - 1))]), "expected 1 to 2^31 - 1"),
    # 2^66 + 2^24 numbers, which in 64 bits are few
    "product wraps around": (pack([], [entry(dims=(2**30, 2**30, 64), kind=0)]), "the file is cut short"),
    "far beyond the file": (pack([], [entry(dims=(2**30, 2**30, 2**30, 2**30))]), "the file is cut short"),
    "rows of 33 in Q8_0": (pack([], [entry(dims=(33, 32))]), "'a' is Q8_0 with rows of 33; expected a multiple of 32"),
    "rows of 128 in Q4_K": (pack([], [entry(dims=(128, 2), kind=12)]), "Q4_K with rows of 128; expected a multiple of 256"),
    "a single Q8_0": (pack([], [entry(dims=())]), "Q8_0 with rows of 1;"),
    "type 4, long gone": (pack([], [entry(kind=4)]), "'a' is of type number 4; this version reads F32"),
    "type 2^32 - 1 of a tensor": (pack([], [entry(kind=2**32 - 1)]), "is of type number 4294967295"),
    **{
        f"type {Kind(i).name}": (pack([], [entry(kind=i)]), f"is of type {Kind(i).name}; this version reads F32, F16")
        for i in UNREAD
    },
    # offsets
    "begins late": (pack([], [entry(offset=32)], 100), "'a' overlaps another tensor, leaves a hole"),
    "not aligned": (pack([], [entry(offset=1)], 99), "at byte 1, expected 0"),
    "offset 2^64 - 32": (pack([], [entry(offset=2**64 - 32)]), "at byte 18,446,744,073,709,551,584, expected 0"),
    "same bytes twice": (pack([], [entry(), entry("b")]), "'b' overlaps another tensor"),
    "overlap": (pack([], [entry(), entry("b", offset=64)], 132), "at byte 64, expected 96"),
    "hole": (pack([], [entry(), entry("b", offset=128)], 196), "at byte 128, expected 96"),
    "without padding": (pack([], [entry(), entry("b", offset=68)], 136), "at byte 68, expected 96"),
    "padded for another alignment": (
        pack([key(ALIGNMENT, 4, u32(64))], [entry(), entry("b", offset=96)], 164, align=64),
        "at byte 96, expected 128",
    ),
    "out of order": (pack([], [entry("b", offset=96), entry()], 164), "'b' overlaps another tensor"),
    "second cut off": (pack([], [entry(), entry("b", offset=96)], 163), "'b' ends at"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, told = HOSTILE[name]
    (tmp_path / "model.gguf").write_bytes(content)
    started = time.process_time()
    assert told in refusal(tmp_path / "model.gguf", read_gguf)
    assert time.process_time() - started < 1


LONG = 2**20 - 9
GONE = [entry(kind=4)]
# what a header of up to 32 MB can hold that is expensive, with a fault at its end; what the message says
COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "texts": (lambda: pack([key("a", 9, array(8, LONG, u64(0) * LONG))], GONE), "type number 4"),
    "different texts": (
        lambda: pack([key("a", 9, array(8, LONG, b"".join(text(f"{i}") for i in range(LONG))))], GONE),
        "type number 4",
    ),
    "wide texts": (lambda: pack([key(f"{i}", 8, text("a" * LONG + "🙂")) for i in range(30)], GONE), "type number 4"),
    "numbers": (
        lambda: pack([key("a", 9, array(12, 2 * LONG, struct.pack("<d", 0.1) * 2 * LONG))], GONE),
        "type number 4",
    ),
    "keys": (lambda: pack([key(f"{i}", 9, array(0, 0, b"")) for i in range(2**16)], GONE), "type number 4"),
    "tensors": (lambda: pack([], [entry(f"{i}", offset=96 * i) for i in range(2**16)], 0), "the file is cut short"),
    "a long alignment": (
        lambda: pack([key(ALIGNMENT, 9, array(12, 2 * LONG, struct.pack("<d", 0.1) * 2 * LONG))]),
        "its alignment is (0.1, 0.1, 0.1, 0.1)",
    ),
    "too long": (lambda: pack([key(f"{i}", 8, text("a" * 2**20)) for i in range(33)]), "its header is over 32 MB"),
}


COUNT = """
import re, resource, sys, time
from pathlib import Path
from mlx_kontext.errors import CheckpointError
from mlx_kontext.weights.gguf import read_gguf
started = time.process_time()
try:
    read_gguf(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
    print(time.process_time() - started)
    if sys.platform == "darwin":
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    else:  # where the figure above may be that of the process this one came from
        print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10)
"""


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files_are_refused_cheaply(tmp_path: Path, name: str) -> None:
    """In a process of its own, so that its peak of memory is that of the gate."""
    make, told = COSTLY[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    command, root = [sys.executable, "-c", COUNT, str(path)], Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    message, seconds, megabytes = done.stdout.splitlines()
    assert told in message and float(seconds) < 2 and float(megabytes) < 300


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("missing.gguf", "pipe.gguf", "folder.gguf"):
        assert "there is no such file" in refusal(tmp_path / name, read_gguf)


# Sound files


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    numbers = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -(2**15), "uint32": 2**32 - 1, "int32": -(2**31)}
    numbers |= {"uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "ü\n"}
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    lists: dict[str, Any] = {
        "texts": ["", "ü", "▁a"],
        "ints": [1, -2],
        "floats": [0.5],
        "flags": [True, False],
        "raw": b"\0\xff",
    }
    for name, value in lists.items():
        writer.add_array(name, value)
    expected = {}
    for i, kind in enumerate(("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")):
        raw = gguf.quants.quantize(np.zeros((3, i + 1, 96), "f4"), Kind[kind])
        writer.add_tensor(f"{kind}.weight", raw, raw_dtype=Kind[kind])
        expected[f"{kind}.weight"] = (kind, (3, i + 1, 96), raw.nbytes)
    writer.add_tensor("scalar", np.array(1.0, "f4"))
    writer.add_custom_alignment(128)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = read_gguf(path)
    assert {n: (t.type, t.shape, t.nbytes) for n, t in found.tensors.items()} == expected | {"scalar": ("F32", (), 4)}
    assert all(t.path == path and t.offset % 128 == 0 and t.name == n for n, t in found.tensors.items())
    assert {name.removeprefix("a."): value for name, value in found.metadata.items()} == {
        "general.architecture": "flux",
        ALIGNMENT: 128,
        **numbers,
        **{name: tuple(value) for name, value in lists.items()},
    }


def test_small_sound_files(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content, tensors in (
        (pack([], [], 0), {}),
        (pack([], [], 0, align=1), {}),  # nothing to align
        (pack(version=2), {"a": (2, 32)}),
        (pack([key(ALIGNMENT, 4, u32(1))], align=1), {"a": (2, 32)}),
        (pack(data=96), {"a": (2, 32)}),  # padded at the end, as the writers do
        (pack([key("a", 9, array(8, 0, b"")), key("split.count", 2, b"\1\0")]), {"a": (2, 32)}),
        (pack([], [entry("b", (2, 3, 4, 5), 1)], 240), {"b": (5, 4, 3, 2)}),
    ):
        path.write_bytes(content)
        assert {name: tensor.shape for name, tensor in read_gguf(path).tensors.items()} == tensors


def test_headers_are_read_and_weights_are_not(tmp_path: Path) -> None:
    """64 GB of holes, which would take a minute to read."""
    path = tmp_path / "a.gguf"
    path.write_bytes(pack([], [entry("a", (2**20, 2**14), 0)], 0))
    os.truncate(path, path.stat().st_size + 2**36)
    started = time.process_time()
    assert read_gguf(path).tensors["a"].nbytes == 2**36
    assert time.process_time() - started < 0.5


def mutant(rng: random.Random, whole: bytes, head: int) -> bytes:
    """A copy with one to three small changes in its first `head` bytes."""
    changed = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, width = rng.randrange(head), rng.choice((1, 1, 2, 4, 8))
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + width] = rng.choice((0, 1, 2, 31, 32, 33, 255, 2**31)).to_bytes(8, "little")[:width]
            case 2:
                changed[at : at + width] = whole[(other := rng.randrange(head)) : other + width]
            case 3:
                changed[at:at] = bytes(width)
            case 4:
                del changed[at : at + width]
    return bytes(changed)


def test_no_mutant_passes_that_the_gguf_package_reads_otherwise(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "mutant.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_token_list(["a", "b"])
    for name, shape in (("a.weight", (2, 64)), ("b", (3, 32))):
        writer.add_tensor(name, gguf.quants.quantize(np.ones(shape, "f4"), Kind.Q8_0), raw_dtype=Kind.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    whole = path.read_bytes()
    head = gguf.GGUFReader(path).data_offset
    passed = 0
    for _ in range(3000):
        path.unlink()  # the gguf package may still have the last one mapped
        path.write_bytes(mutant(rng, whole, head))
        try:
            ours = read_gguf(path)
        except CheckpointError as error:
            assert str(error).isprintable() and path.name in str(error)
            continue
        theirs = gguf.GGUFReader(path)
        assert {t.name: (t.type, t.shape, t.offset, t.nbytes) for t in ours.tensors.values()} == {
            t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1])), t.data_offset, t.n_bytes)
            for t in theirs.tensors
        }
        assert ours.metadata.keys() == {name for name in theirs.fields if not name.startswith("GGUF.")}
        passed += 1
    assert 100 < passed < 1500  # neither is a test of the other

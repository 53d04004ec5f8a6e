"""Files that are no weights at all, or whose header lies: every door refuses them before a number is read."""

import io
import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.carrier import EVERY, HEADER, NUMBERS, Case, safetensors, write

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GOOD = safetensors({"a": A}, bytes(8))
MAX = 2**64 - 1
COSTLY = ("transformer", "lora")  # doors enough for what takes a second to read
NAME = "kontext.safetensors"


def content(raw: bytes, told: str, name: str = NAME, slots: tuple[str, ...] = EVERY, refused: str = HEADER) -> Case:
    return Case(lambda folder, _: write(folder / name, raw), told, slots, refused)


# --- no weights at all ---


class Bomb:
    """Unpickled it makes a folder, so that a test sees that somebody unpickled it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def zipped(name: str, inner: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, inner)
    return file.getvalue()


def no_file(make: Callable[[Path], object], told: str) -> Case:
    """Something that is no regular file."""

    def place(folder: Path, _: Any) -> Path:
        make(folder / NAME)
        return folder / NAME

    return Case(place, told, EVERY[:-1])


def listen(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 100 letters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


PICKLE, ZIP = pickle.dumps(Bomb(), 2), zipped("archive/data.pkl", pickle.dumps(Bomb(), 2))
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in \x1b[2J</title></head><body>" + b"x" * 5000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 23802932552\n"
ARRAY = b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + pickle.dumps([Bomb()])
ABSENT = "no such file|no model|name too long"
OTHER: dict[str, Case] = {
    "empty": content(b"", "is empty"),
    "one byte": content(b"\1", "no safetensors file"),
    "zeros": content(bytes(10**6), "never finished"),
    "noise": content(np.random.default_rng(0).bytes(10**5), "no safetensors file"),
    "web page": content(PAGE, "is a web page"),
    "web page called GGUF": content(PAGE, "is a web page", "kontext.gguf"),
    "git-LFS pointer": content(POINTER, "run git lfs pull"),
    "git-LFS pointer called GGUF": content(POINTER, "run git lfs pull", "kontext.gguf"),
    "zip": content(ZIP, "zip archive"),
    "zip called .ckpt": content(ZIP, "zip archive", "kontext.ckpt"),
    "zip called GGUF": content(ZIP, "zip archive", "kontext.gguf"),
    "zip bomb": content(zipped("a", bytes(10**8)), "zip archive"),
    **{f"pickle of protocol {i}": content(pickle.dumps(Bomb(), i).ljust(99, b"."), "pickle|no safetensors|text") for i in range(6)},
    "pickle called .bin": content(PICKLE, "pickle", "pytorch_model.bin"),
    "pickle called GGUF": content(PICKLE, "pickle", "kontext.gguf"),
    "objects of numpy": content(ARRAY, "no safetensors file"),
    "objects of numpy, zipped": content(zipped("a.npy", ARRAY), "zip archive", "weights.npz"),
    "JSON": content(json.dumps({"a": A}).encode(), "is a text file"),
    "XML": content(b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "web page"),
    "picture": content(b"\x89PNG\r\n\x1a\n" + bytes(999), "no safetensors file"),
    "gzip": content(b"\x1f\x8b\x08\0" + bytes(range(256)) * 9, "no safetensors file"),
    "HDF5": content(b"\x89HDF\r\n\x1a\n" + bytes(999), "no safetensors file"),
    "program": content(b"\x7fELF\2\1\1" + bytes(999), "no safetensors file"),
    "older GGML": content(b"lmgg" + b"\1\2\3\4" * 99, "no safetensors file"),
    "name with escapes": content(GOOD[:-1], "cut short", "kontext\x1b[2J\n\u202e.safetensors"),
    "device": no_file(lambda path: path.symlink_to("/dev/zero"), ABSENT),
    "pipe": no_file(os.mkfifo, ABSENT),
    "socket": no_file(listen, ABSENT),
    "link to itself": no_file(lambda path: path.symlink_to(NAME), ABSENT),
    "link to nothing": no_file(lambda path: path.symlink_to("gone"), ABSENT),
    "folder": no_file(Path.mkdir, "no safetensors files|no such file|no model"),
    "nothing": no_file(lambda path: None, ABSENT),
    "name of 300": Case(lambda folder, _: folder / ("k" * 300), ABSENT, EVERY[:-1]),
}  # fmt: skip

# --- safetensors whose header lies ---


def one(told: str, data: bytes = bytes(8), **changes: Any) -> Case:
    """A file with one tensor, whose entry is changed."""
    return content(safetensors({"a": A | changes}, data), told)


def raw(header: bytes, told: str, slots: tuple[str, ...] = EVERY) -> Case:
    return content(safetensors(header), told, slots=slots)


def two(told: str, *offsets: int) -> Case:
    return content(safetensors({"a": A, "b": A | {"data_offsets": offsets}}, bytes(max(offsets))), told)


def many(tensors: int) -> Case:
    header = {f"{i}": A | {"data_offsets": [8 * i, 8 * i + 8]} for i in range(tensors)}
    return content(safetensors(header, bytes(8 * tensors)), "too long|no part|no LoRA", slots=COSTLY)


NO_HEADER, FITS, HOLE = (
    "no safetensors file|never finished",
    "expected what fits",
    "overlaps another tensor or leaves a hole",
)
WRAP = [1048576, 304384145, 14449]  # 2^62 + 2^20 floats, which in 64 bits are 4 MB
STRUCTURE: dict[str, Case] = {
    **{f"header of {n}": content(safetensors({"a": A}, bytes(8), n), NO_HEADER) for n in (0, 1, 2**23 + 1, 2**40, 2**63, MAX)},
    "header longer than the file": content(safetensors({"a": A}, bytes(8), 2**20), "cut short within its header"),
    "header one too long": content(safetensors({"a": A}, bytes(8), len(GOOD) - 15), "no JSON object|damaged"),
    "header one too short": content(safetensors({"a": A}, bytes(8), len(GOOD) - 17), "no JSON object|damaged"),
    **{f"cut at {n}": content(GOOD[:n], "cut short|no safetensors|text") for n in (4, 8, 9, 40, len(GOOD) - 8)},
    "last byte missing": content(GOOD[:-1], "cut short: 7 bytes"),
    "one byte more": content(GOOD + b"\0", "1 bytes too many"),
    "a megabyte more": content(GOOD + bytes(2**20), "bytes too many"),
    "same bytes twice": two(HOLE, 0, 8),
    "overlap": two(HOLE, 4, 12),
    "hole": two(HOLE, 12, 20),
    "begins late": one(HOLE, bytes(16), data_offsets=[8, 16]),
    "ends beyond the file": one("cut short", data_offsets=[0, 2**40], shape=[2**19, 2**19]),
    "begins beyond the file": one(HOLE, data_offsets=[2**40, 2**40 + 8]),
    "offsets of 2^64": one("the number 18446744", data_offsets=[MAX - 60, MAX - 52]),
    "offset of 4,000 digits": raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"9" * 4000 + b"]}}", "number 9999"),
    "negative offsets": one("the number -8", data_offsets=[-8, 0]),
    "offsets swapped": one(FITS, data_offsets=[8, 0]),
    **{f"offsets {x}": one("has data_offsets", data_offsets=x) for x in ([0.0, 8.0], ["0", "8"], [False, True], [0, 4, 8], [8], 8)},
    "no offsets": raw(b'{"a":{"dtype":"F32","shape":[2]}}', "expected dtype, shape and data_offsets"),
    "more than an entry": one("expected dtype, shape and data_offsets", x=1),
    "entry is a list": raw(b'{"a":[]}', "expected dtype, shape and data_offsets"),
    "product wraps around": one(FITS, bytes(2**22), shape=WRAP, data_offsets=[0, 2**22]),
    "zero hides an overflow": one(FITS, b"", shape=[2**31 - 1] * 3 + [0], data_offsets=[0, 0]),
    "size of 2^31": one("below 2\\^31", b"", shape=[2**31, 0], data_offsets=[0, 0]),
    "negative size": one("the number -2", shape=[-2, -1]),
    **{f"shape {x}": one("has shape", shape=x) for x in ([2.0], [float("nan")], [[2]], ["2"], "2", None, 2, {"2": 2}, [True, 2])},
    "100,000 dimensions": content(safetensors({"a": A | {"shape": [1] * 100_000}}), "at most 8 sizes", slots=COSTLY),
    "too few numbers": one(FITS, shape=[1]),
    "too many numbers": one(FITS, shape=[3]),
    **{
        f"dtype {x!r:.12}": one("has dtype", dtype=x)
        for x in ("F33", "f32", "", None, 7, ["F32"], "x" * 10**5, "\x1b]0;title\7")
    },
    "wider dtype": one(FITS, dtype="F64"),
    "half a byte": one(FITS, bytes(7), dtype="F4", shape=[15], data_offsets=[0, 7]),
    "one name twice": raw(b'{"a":{},"a":{}}', "appears twice"),
    **{
        f"name {x!r:.12}": content(safetensors({x: A}, bytes(8)), "printable characters")
        for x in ("", "\n", "\x1b[31m", "\0", "\u202e", "n" * 257, "m" * 10**5, "\ud800")
    },
    "metadata is a list": raw(b'{"__metadata__":["x"]}', "__metadata__"),
    "metadata with numbers": raw(b'{"__metadata__":{"x":1}}', "__metadata__"),
    "metadata with half a pair": raw(b'{"__metadata__":{"x":"\\ud800"}}', "surrogates"),
    "JSON that stops": raw(b'{"a":', "no JSON object"),
    "JSON and more": raw(b"{}{}", "damaged"),
    "JSON of a list": raw(b"[{}]", "no JSON object"),
    "JSON null": raw(b"null", "no JSON object"),
    "JSON in UTF-16": raw('{"a":1}'.encode("utf-16"), "no JSON object"),
    "JSON that is no UTF-8": raw(b'{"\xff":0}', "damaged"),
    "deep JSON": raw(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "too deep"),
    "a million lists": raw(b'{"a":[' + b"[]," * 2_700_000 + b"0]}", "too deep or too long", COSTLY),
    "a million objects": raw(b'{"a":[' + b'{"":0},' * 1_190_000 + b"0]}", "too deep or too long", COSTLY),
    "a number of 8 MB": raw(b'{"a":' + b"9" * 8_000_000 + b"}", "the number 9999", COSTLY),
    "15,000 tensors": many(15_000),
    "80,000 tensors": many(80_000),
    "no tensors": content(safetensors({}), "holds nothing|no tensors|missing", refused=NUMBERS),
    "tensors of nothing we know": content(GOOD, "holds a, which is no part|no LoRA we know|missing", refused=NUMBERS),
}  # fmt: skip

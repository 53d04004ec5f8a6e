"""GGUF files of absurd counts, sizes and types, and sound ones with numbers that are none."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.carrier import EVERY, HARMLESS, NUMBERS, Carrier, Case, Tensors, write
from tests.hostile.files import COSTLY, MAX

Kinds = dict[str, tuple[int, bytes]]
"""Tensors of other types than F32: the type's number, and the bytes."""


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return u64(len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def listed(kind: int, count: int, values: bytes = b"") -> bytes:
    return key("a", 9, u32(kind) + u64(count) + values)


def entry(
    name: str = "a", dims: tuple[int, ...] = (32, 2), kind: int = 8, offset: int = 0, ndim: int | None = None
) -> bytes:
    """A tensor, its sizes innermost first: 2 rows of one block of Q8_0, which is 68 bytes."""
    return text(name) + u32(len(dims) if ndim is None else ndim) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


ARCHITECTURE = "general.architecture"
FLUX = key(ARCHITECTURE, 8, text("flux"))


def gguf(
    keys: tuple[bytes, ...] = (FLUX,),
    tensors: tuple[bytes, ...] = (entry(),),
    data: bytes = bytes(68),
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    number, count = counts or (len(tensors), len(keys))
    head = b"GGUF" + u32(version) + u64(number) + u64(count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def made(told: str, slots: tuple[str, ...] = EVERY[:-1], **parts: Any) -> Case:
    """As a LoRA it is told to be a GGUF file."""
    return Case(lambda folder, _: write(folder / "kontext.gguf", gguf(**parts)), f"{told}|is a GGUF file", slots)


def keyed(told: str, value: bytes, slots: tuple[str, ...] = EVERY[:-1]) -> Case:
    return made(told, slots, keys=(FLUX, value))


def entered(told: str, *tensors: bytes, data: int = 68) -> Case:
    return made(told, COSTLY if len(tensors) > 9 else EVERY[:-1], tensors=tensors, data=bytes(data))


def cut(size: int) -> Case:
    return Case(lambda folder, _: write(folder / "kontext.gguf", gguf()[:size]), "cut short|is a GGUF file", EVERY[:-1])


CUT, HOLE, NAME, NO_MODEL = (
    "cut short",
    "overlaps another tensor, leaves a hole",
    "printable",
    "missing|holds a, which|no part",
)
STRUCTURE: dict[str, Case] = {
    "no tensors": made("holds nothing", tensors=(), data=b""),
    "one tensor": made(NO_MODEL),
    **{f"cut at {n}": cut(n) for n in (4, 8, 20, 40, 70, 127)},
    **{f"version {n}": made("GGUF of version|is a big-endian", version=n) for n in (0, 1, 4, 2**24 * 3, 2**32 - 1)},
    **{f"{n} tensors": made("tensors; expected at most", counts=(n, 0)) for n in (MAX, 2**63, 2**32, 2**16 + 1)},
    **{f"{n} keys": made("metadata keys; expected at most", counts=(1, n)) for n in (MAX, 2**63, 2**16 + 1)},
    "one tensor too few": made(NAME, counts=(2, 1)),
    "key of 2^63": keyed("bytes in a text", u64(2**63) + b"abc"),
    "key longer than the file": keyed(CUT, u64(2**20) + b"abc"),
    "key with escapes": keyed(NAME, key("\x1b]52;c;\7", 8, text("x"))),
    "key twice": keyed("each once", FLUX),
    "text of 2^64 - 1": keyed("bytes in a text", key("a", 8, u64(MAX))),
    "text that is no UTF-8": keyed("decode", key("a", 8, u64(2) + b"\xff\xfe")),
    **{f"value of type {n}": keyed("a value of type", key("a", n, b"")) for n in (13, 2**31, 2**32 - 1)},
    "list of 2^64 - 1 numbers": keyed("numbers in lists", listed(12, MAX)),
    "list of 2^61 numbers": keyed("numbers in lists", listed(10, 2**61)),
    "list of 2^62 texts": keyed("strings in lists", listed(8, 2**62)),
    "list longer than the file": keyed(CUT, listed(0, 2**21)),
    "list of lists": keyed("no lists in lists", listed(9, 1, u32(0) + u64(1) + b"a")),
    "a thousand lists in lists": keyed("no lists in lists", listed(9, 1, (u32(9) + u64(1)) * 1000)),
    "a million texts": keyed(NO_MODEL, listed(8, 2**20, u64(0) * 2**20), COSTLY),
    "two million numbers": keyed(NO_MODEL, listed(12, 2**21, bytes(2**24)), COSTLY),
    "part of a split": keyed("split GGUF", key("split.count", 2, b"\2\0")),
    **{f"alignment {n}": keyed("its alignment is", key("general.alignment", 4, u32(n))) for n in (0, 33, 2**31, 2**32 - 1)},
    "alignment as a text": keyed("its alignment is", key("general.alignment", 8, text("32"))),
    **{
        f"architecture {name!r:.20}": made("architecture", keys=(key(ARCHITECTURE, 8, text(name)),))
        for name in ("llama", "", "\x1b[2J\n", "a" * 2**20)
    },
    "architecture is a number": made("architecture", keys=(key(ARCHITECTURE, 4, u32(7)),)),
    **{f"tensor called {name!r:.12}": entered(NAME, entry(name)) for name in ("", "a\nb", "\x1b[2J", "n" * 300)},
    "tensor twice": entered("two tensors called", entry(), entry(offset=96), data=164),
    **{f"{n} dimensions": entered("dimensions; expected", entry(ndim=n)) for n in (5, 9, 2**32 - 1)},
    "size 0": entered("has sizes", entry(dims=(32, 0))),
    "size 2^63": entered("has sizes", entry(dims=(2**63, 2))),
    "sizes that wrap around": entered(CUT, entry(dims=(2**30, 2**30, 64), kind=0)),
    "4 EB": entered(CUT, entry(dims=(2**30, 2**30, 4))),
    "rows that are no blocks": entered("rows of 33", entry(dims=(33, 2))),
    **{f"type {n}": entered("is of type", entry(kind=n)) for n in (4, 5, 10, 16, 24, 31, 39, 255, 2**32 - 1)},
    "begins late": entered(HOLE, entry(offset=32), data=100),
    "not aligned": entered(HOLE, entry(offset=1), data=99),
    "offset 2^64 - 32": entered(HOLE, entry(offset=2**64 - 32)),
    "two in one place": entered(HOLE, entry(), entry("b")),
    "overlap": entered(HOLE, entry(), entry("b", offset=32), data=132),
    "out of order": entered(HOLE, entry("b", offset=96), entry(), data=164),
    "weights cut short": entered(CUT, entry(), data=67),
    "65,536 tensors": entered(CUT, *(entry(f"{i}", offset=96 * i) for i in range(2**16)), data=0),
}  # fmt: skip

# --- sound files ---

QKV, MLP, NORM = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mlp.2",
    "double_blocks.0.img_attn.norm.key_norm.scale",
)


def transformer(told: str, alter: Callable[[Tensors], Kinds], refused: str = NUMBERS) -> Case:
    """The carrier's transformer. `alter` may take tensors out, and returns those that are not to be F32."""

    def make(folder: Path, carrier: Carrier) -> Path:
        tensors = dict(carrier.tensors["transformer"])
        kinds = alter(tensors)
        rows, parts, at = [], [], 0
        for name, value in tensors.items():
            kind, raw = kinds[name] if name in kinds else (0, value.tobytes())
            rows.append(entry(name, value.shape[::-1], kind, at))
            parts.append(raw + bytes(-len(raw) % 32))
            at += len(parts[-1])
        return write(folder / "kontext.gguf", gguf((FLUX,), tuple(rows), b"".join(parts)))

    return Case(make, told, ("transformer",), refused)


def q8(name: str, scale: float) -> Callable[[Tensors], Kinds]:
    block = np.float16(scale).tobytes() + bytes(range(32))
    return lambda tensors: {name: (8, block * (tensors[name].size // 32))}


def q4_k(name: str, scale: float) -> Callable[[Tensors], Kinds]:
    block = np.array([scale, 0.1], "f2").tobytes() + bytes(140)
    return lambda tensors: {name: (12, block * (tensors[name].size // 256))}


def f32(name: str, number: float) -> Callable[[Tensors], Kinds]:
    return lambda tensors: {name: (0, np.full_like(tensors[name], number).tobytes())}


def without(name: str) -> Callable[[Tensors], Kinds]:
    def alter(tensors: Tensors) -> Kinds:
        del tensors[name]
        return {}

    return alter


NO_NUMBER = "infinite or undefined"
NUMBERS_IN: dict[str, Case] = {
    "Q8_0 with NaN scales": transformer(NO_NUMBER, q8(f"{QKV}.weight", np.nan)),
    "Q8_0 with infinite scales": transformer(NO_NUMBER, q8(f"{QKV}.weight", np.inf)),
    "Q4_K with NaN scales": transformer(NO_NUMBER, q4_k(f"{MLP}.weight", np.nan)),
    "Q4_K with infinite scales": transformer(NO_NUMBER, q4_k(f"{MLP}.weight", np.inf)),
    "F32 with NaN": transformer(NO_NUMBER, f32("img_in.weight", np.nan)),
    "F32 with infinity": transformer(NO_NUMBER, f32("img_in.bias", np.inf)),
    "F32 of 3e38": transformer("not finite", f32("img_in.weight", 3e38), HARMLESS),
    "a weight less": transformer("1 missing", without("img_in.weight")),
    "a norm less": transformer("1 missing", without("double_blocks.0.txt_attn.norm.key_norm.scale")),
    "a norm in Q8_0": transformer("", q8(NORM, 1), HARMLESS),
    "a bias in Q8_0": transformer("", q8("img_in.bias", 1), HARMLESS),
}
CASES = STRUCTURE | NUMBERS_IN

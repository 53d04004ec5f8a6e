"""GGUF's blocks against the gguf package, and against MLX, which has to make the same numbers of what is repacked."""

import os
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from mlx_kontext.errors import CheckpointError
from mlx_kontext.weights import ggml
from mlx_kontext.weights.ggml import can_repack, dequantize, load, repack
from mlx_kontext.weights.gguf import GGUFTensor, read_gguf

FLOATS = ["F32", "F16", "BF16"]
SIMPLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]  # the gguf package writes these
NESTED = ["Q4_K", "Q5_K"]
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block keeps its float16
SHAPE = (6, 512)


def blocks(kind: str, shape: tuple[int, ...] = SHAPE) -> np.ndarray[Any, Any]:
    """Weights as the gguf package quantizes them; for the K types random bytes, which are weights too."""
    rng = np.random.default_rng(len(kind) + ord(kind[1]))
    if kind in FLOATS + SIMPLE:
        values = rng.standard_normal(shape).astype("f4") * 0.05 + 0.01
        return gguf.quants.quantize(values, Kind[kind])
    _, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, nbytes), np.uint8)
    for at in HALVES[kind]:
        raw[..., at : at + 2] = rng.standard_normal((*raw.shape[:-1], 1)).astype("f2").view("u1")
    return raw.reshape(*shape[:-1], -1)


def stored(path: Path, kind: str, raw: np.ndarray[Any, Any]) -> GGUFTensor:
    """A file of two tensors, the second of which is the one asked for."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("first", np.arange(3, dtype="f4"))
    writer.add_tensor("a.weight", raw, raw_dtype=Kind[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return read_gguf(path).tensors["a.weight"]


@pytest.mark.parametrize("chunk", [2**20, 1024, 256])
@pytest.mark.parametrize("kind", [*FLOATS, *SIMPLE, *NESTED, "Q6_K"])
def test_numbers_are_those_of_the_gguf_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    """To the last bit, and whether read at once or in many pieces."""
    monkeypatch.setattr(ggml, "_CHUNK", chunk)
    raw = blocks(kind)
    tensor = stored(tmp_path / "a.gguf", kind, raw)
    expected = gguf.quants.dequantize(raw, Kind[kind])
    assert tensor.shape == SHAPE == expected.shape
    found = dequantize(tensor)
    assert found.dtype == np.float32 and np.unique(found).size > 50
    np.testing.assert_array_equal(found, expected)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        array = load(tensor, dtype)
        assert array.dtype == dtype and mx.array_equal(array, mx.array(expected).astype(dtype))


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("kind", FLOATS)
def test_floats_of_any_shape(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    raw = blocks(kind, shape)
    tensor = stored(tmp_path / "a.gguf", kind, raw)
    assert tensor.shape == shape == load(tensor, mx.float16).shape
    np.testing.assert_array_equal(dequantize(tensor), gguf.quants.dequantize(raw, Kind[kind]))


def codes_of(weight: mx.array, bits: int) -> np.ndarray[Any, Any]:
    """What MLX packs, unpacked bit by bit: [N, K]."""
    raw = np.unpackbits(np.array(weight).view("u1"), axis=-1, bitorder="little").reshape(weight.shape[0], -1, bits)
    return (raw * (1 << np.arange(bits))).sum(-1)


@pytest.mark.parametrize("bits", sorted(set(BITS.values())))
def test_what_mlx_packs_is_a_row_of_bits(bits: int) -> None:
    """The layout that repacking counts on."""
    weight, scales, biases = mx.quantize(mx.random.normal((3, 64)), 32, bits)
    codes = codes_of(weight, bits)
    values = codes.reshape(3, 2, 32) * np.array(scales)[..., None] + np.array(biases)[..., None]
    assert np.unique(codes).size > 2 ** (bits - 2)
    np.testing.assert_allclose(
        values.reshape(3, 64), np.array(mx.dequantize(weight, scales, biases, 32, bits)), atol=1e-6
    )


@pytest.mark.parametrize("chunk", [2**20, 256])
@pytest.mark.parametrize("kind", BITS)
def test_mlx_reads_what_is_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int) -> None:
    """With float32 scales within 1e-6 of the largest number in a row, which is the order of the additions."""
    monkeypatch.setattr(ggml, "_CHUNK", chunk)
    raw = blocks(kind)
    tensor = stored(tmp_path / "a.gguf", kind, raw)
    expected = gguf.quants.dequantize(raw, Kind[kind])
    assert can_repack(tensor)
    weight, scales, biases, group, bits = repack(tensor, mx.float32)
    assert (
        (group, bits) == (32, BITS[kind]) and weight.dtype == mx.uint32 and scales.dtype == biases.dtype == mx.float32
    )
    assert weight.shape == (6, 512 * bits // 32) and scales.shape == biases.shape == (6, 16)
    made = np.array(mx.dequantize(weight, scales, biases, group, bits))
    largest = np.abs(expected).max(1, keepdims=True)
    assert (np.abs(made - expected) <= 1e-6 * largest).all()
    x = mx.random.normal((4, 512))
    product = mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group, bits=bits)
    np.testing.assert_allclose(np.array(product), np.array(x) @ expected.T, atol=1e-4 * float(np.abs(product).max()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", BITS)
def test_only_scales_and_biases_are_rounded(tmp_path: Path, kind: str, dtype: mx.Dtype) -> None:
    """As far as the docstring of repack says, and the codes not at all."""
    tensor = stored(tmp_path / "a.gguf", kind, blocks(kind))
    exact, rounded = repack(tensor, mx.float32), repack(tensor, dtype)
    assert mx.array_equal(exact[0], rounded[0]) and rounded[1].dtype == rounded[2].dtype == dtype
    is_exact = dtype == mx.float32 or (dtype == mx.float16 and kind in SIMPLE)
    unit = 0.0 if is_exact else 2**-11 if dtype == mx.float16 else 2**-8
    for one, other in zip(exact[1:3], rounded[1:3], strict=True):
        error, size = (np.abs(np.array(x.astype(mx.float32))) for x in (one - other.astype(mx.float32), one))
        assert (error <= unit * size + 2**-25 * (unit > 0)).all()  # or half of float16's smallest number
        assert unit == 0 or error.any()
    if kind in ("Q4_0", "Q5_0", "Q8_0"):
        codes = codes_of(rounded[0], BITS[kind]).reshape(6, 16, 32)
        scales, biases = (np.array(x.astype(mx.float32))[..., None] for x in rounded[1:3])
        expected = dequantize(tensor).reshape(codes.shape)
        assert (np.abs(codes * scales + biases - expected) <= (unit + 1e-6) * np.abs(expected)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_mlx_repacks_the_same(tmp_path: Path, kind: str) -> None:
    """MLX's own loader knows these three; ours must give the same arrays, bit by bit."""
    tensor = stored(tmp_path / "a.gguf", kind, blocks(kind))
    theirs = mx.load(str(tmp_path / "a.gguf"))
    assert isinstance(theirs, dict)
    for ours, name in zip(repack(tensor, mx.float16), ("weight", "scales", "biases"), strict=False):
        assert isinstance(ours, mx.array) and mx.array_equal(ours, theirs[f"a.{name}"])


def test_what_cannot_be_repacked(tmp_path: Path) -> None:
    for kind, shape in (("Q6_K", SHAPE), ("F16", SHAPE), ("Q8_0", (512,)), ("Q4_K", (2, 2, 256))):
        tensor = stored(tmp_path / "a.gguf", kind, blocks(kind, shape))
        assert not can_repack(tensor) and load(tensor, mx.float32).shape == shape
        with pytest.raises(
            CheckpointError, match=rf"a\.gguf: 'a\.weight' is {kind} .* cannot hold as it is; dequantize"
        ):
            repack(tensor, mx.float32)


@pytest.mark.parametrize("kind", [*FLOATS, *SIMPLE, *NESTED, "Q6_K"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinite_and_undefined_numbers_are_refused(tmp_path: Path, kind: str, value: float) -> None:
    raw = np.ascontiguousarray(blocks(kind)).view("u1").copy()
    if kind in FLOATS:
        wide = np.array([value], "f4").view("u1")
        raw[3, :4] = np.array([value, value], "f2").view("u1") if kind == "F16" else np.concatenate([wide[2:]] * 2)
    else:
        _, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
        at = nbytes + HALVES.get(kind, (0,))[-1]  # in the second block of a row
        raw[3, at : at + 2] = np.array([value], "f2").view("u1")
    raw = raw if kind not in ("F32", "F16") else raw.view("f4" if kind == "F32" else "f2")
    tensor = stored(tmp_path / "a.gguf", kind, raw)
    readers: list[Any] = [dequantize, lambda t: load(t, mx.float32)]
    readers += [lambda t: repack(t, mx.float32)] if can_repack(tensor) else []
    for reader in readers:
        with pytest.raises(
            CheckpointError, match=r"a\.gguf: 'a\.weight' holds infinite or undefined numbers; download"
        ):
            reader(tensor)


def test_numbers_too_large_for_float16(tmp_path: Path) -> None:
    raw = gguf.quants.quantize(np.linspace(-1e5, 1e5, 64, dtype="f4").reshape(2, 32), Kind.Q8_0)
    tensor = stored(tmp_path / "a.gguf", "Q8_0", raw)
    for reader in (load, repack):
        with pytest.raises(CheckpointError, match=r"'a\.weight' holds numbers too large for float16; take bfloat16"):
            reader(tensor, mx.float16)
        reader(tensor, mx.bfloat16)


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "a.gguf", "Q8_0", blocks("Q8_0"))
    os.truncate(tmp_path / "a.gguf", tensor.offset + tensor.nbytes - 1)
    for reader in (dequantize, lambda t: load(t, mx.float32), lambda t: repack(t, mx.float32)):
        with pytest.raises(CheckpointError, match=r"has become shorter, 'a\.weight' is cut off"):
            reader(tensor)
    os.remove(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="there is no such file"):
        dequantize(tensor)

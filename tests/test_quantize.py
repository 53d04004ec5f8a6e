"""Quantization: which layers, how well, how large, how it is stored, how much memory it takes, and what it does to a picture."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_kontext import CheckpointError, KontextPipeline, RequestError, cli
from mlx_kontext import quantize as quantization
from mlx_kontext.backend import nn, tree_flatten
from mlx_kontext.hub import demo_folder
from mlx_kontext.inspection import inspect_model
from mlx_kontext.models.flux import Flux, FluxConfig
from mlx_kontext.models.quantized import Packing, QuantizedLinear, quantize_layers
from mlx_kontext.models.t5 import T5Config, T5Encoder
from mlx_kontext.models.vae import AutoEncoder, VAEConfig
from mlx_kontext.quantize import Scheme, choose, packed_sizes
from mlx_kontext.weights.load import Checkpoint, fill
from mlx_kontext.weights.pack import pack_codes, pack_matrix, quantize_tensors, unpack_matrix

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"
PROMPT = "make the circle green"
FP16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}


# --- which layers, and how many bytes ---


@pytest.fixture(scope="module")
def full_size() -> dict[str, tuple[Any, dict[str, tuple[int, ...]]]]:
    """Part -> config and shapes of FLUX.1 Kontext [dev]; nothing is allocated."""
    return {
        "transformer": (FluxConfig(), shapes_of(Flux(FluxConfig()))),
        "text_encoder_2": (T5Config(), shapes_of(T5Encoder(T5Config()))),
    }


@pytest.mark.parametrize(
    ("name", "blocks", "transformer"),
    [
        ("q8", {8: 1.0}, 12_708_227_200),
        ("q6", {6: 1.0}, 10_556_549_248),
        ("q5", {5: 1.0}, 9_480_710_272),
        ("q4m", {4: 0.620, 5: 0.262, 8: 0.118}, 9_196_415_104),
        ("q4", {4: 1.0}, 8_404_871_296),
        ("q3", {3: 1.0}, 7_329_032_320),
    ],
)
def test_full_size(name: str, blocks: dict[int, float], transformer: int, full_size: dict[str, Any]) -> None:
    """Share of the block weights at each number of bits, exact bytes, and what is left alone; unpacked it is 23.8 GB."""
    scheme = Scheme.of(name)
    assert scheme is not None and scheme.name == name
    config, shapes = full_size["transformer"]
    layers = choose(scheme, "transformer", config, shapes).layers
    found: Counter[int] = Counter()
    for path, packing in layers.items():
        if "_mod." in path or ".modulation." in path:
            assert packing == (64, 8, "affine")
        else:
            found[packing.bits] += prod(shapes[f"{path}.weight"])
    assert {bits: round(count / 8_606_711_808, 3) for bits, count in found.items()} == blocks
    assert sum(size for _, size in packed_sizes(shapes, layers, 2)) == transformer
    assert len(layers) == 19 * 10 + 38 * 3 == 304
    left = {name for name, shape in shapes.items() if len(shape) == 2 and name.removesuffix(".weight") not in layers}
    assert {name.split(".")[0] for name in left} == {
        "img_in",
        "txt_in",
        "time_in",
        "vector_in",
        "guidance_in",
        "final_layer",
    }

    config, shapes = full_size["text_encoder_2"]
    layers = choose(scheme, "text_encoder_2", config, shapes).layers
    assert set(layers.values()) == {(64, 8, "affine")} and len(layers) == 24 * 7 + 1 and "shared" in layers
    assert sum(size for _, size in packed_sizes(shapes, layers, 2)) == 5_060_145_152
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert bias not in layers and f"{bias}.weight" in shapes

    assert not choose(scheme, "vae", VAEConfig(), shapes_of(AutoEncoder(VAEConfig()))).layers


def test_mixed_bits_follow_the_depth() -> None:
    scheme = Scheme.of("q4m")
    assert scheme is not None
    bits = {
        path: scheme.for_module("transformer", path, FluxConfig())[1]
        for path in (
            *(
                f"double_blocks.{i}.{layer}"
                for i in (0, 2, 3, 18)
                for layer in ("img_attn.qkv", "img_mlp.2", "txt_mlp.2")
            ),
            *(f"single_blocks.{i}.{layer}" for i in (0, 34, 35, 37) for layer in ("linear1", "linear2")),
        )
    }
    assert list(bits.values()) == [8] * 6 + [4, 5, 4] * 2 + [4, 5] * 2 + [8] * 4


@pytest.mark.parametrize("value", [8, "8", "q8", "Q8", np.int64(8), Scheme(8)])
def test_names_of_schemes(value: Any) -> None:
    assert Scheme.of(value) == Scheme(8, 64, "affine")
    assert Scheme.of(None) is Scheme.of("none") is None
    assert [Scheme(4, 32).name, Scheme(4, 16, "nvfp4").name, Scheme(4, mixed=True).name] == ["q4-g32", "nvfp4", "q4m"]


@pytest.mark.parametrize("value", ["q7", 7, "", "4m", True, 8.5, "q8 "[::-1] + "x"])
def test_other_words_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="choose none, q3, q4"):
        Scheme.of(value)


@pytest.mark.parametrize("wrong", [(7,), (4, 16), (4, 64, "mxfp4"), (8, 64, "int8"), (0,), (4, 16, "nvfp4", True)])
def test_what_mlx_has_not_is_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError, match="no quantization has mode"):
        Scheme(*wrong)


def test_rows_that_do_not_divide_are_told() -> None:
    names = ("single_blocks.0.linear1", "single_blocks.0.linear2", "double_blocks.0.img_mlp.0")
    shapes = {f"{name}.weight": (8, columns) for name, columns in zip(names, (96, 40, 128), strict=True)}
    chosen = choose(Scheme(4), "transformer", FluxConfig(), shapes)
    assert chosen.layers == {names[0]: (32, 4, "affine"), names[2]: (64, 4, "affine")}
    assert len(chosen.notes) == 2
    assert "1 layers are in groups of 32" in chosen.notes[0] and "1 layers stay unquantized" in chosen.notes[1]
    assert "single_blocks.0.linear2, 40 wide" in chosen.notes[1]


# --- one matrix ---


def matrices() -> dict[str, mx.array]:
    mx.random.seed(5)
    normal = mx.random.normal((64, 256))
    steps = mx.arange(64 * 256).reshape(64, 256) % 4
    return {
        "normal": normal * 0.02,
        "outliers": mx.where(mx.random.uniform(shape=(64, 256)) < 0.01, normal * 30, normal),
        "heavy tails": normal / (0.05 + mx.abs(mx.random.normal((64, 256)))),
        "all positive": mx.abs(normal) + 5,
        "tiny": normal * 1e-5,
        "constant": mx.full((64, 256), 0.3),
        "zero": mx.zeros((64, 256)),
        "few values": steps.astype(F32) / 8,
    }


@pytest.mark.parametrize("kind", matrices())
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 32), (3, 64), (2, 128)])
def test_the_search_is_never_worse(kind: str, bits: int, group: int) -> None:
    weight, packing = matrices()[kind], Packing(group, bits)
    packed = pack_matrix(weight, packing)
    plain = mx.quantize(weight.astype(packed["scales"].dtype), group, bits)
    errors = [
        float(
            mx.linalg.norm(unpack_matrix(dict(zip(("weight", "scales", "biases"), p, strict=True)), packing) - weight)
        )
        for p in (packed.values(), plain)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-12
    if kind == "normal" and group == 64:
        assert errors[0] < {4: 0.93, 3: 0.9}[bits] * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_does(bits: int) -> None:
    codes = mx.random.randint(0, 2**bits, (4, 128)).astype(mx.uint32)
    ones, zeros = mx.ones((4, 2)), mx.zeros((4, 2))
    assert mx.array_equal(mx.dequantize(pack_codes(codes, bits), ones, zeros, 64, bits), codes.astype(F32))


def test_scales_are_fp16_where_that_fits() -> None:
    """At 8 bits that takes a third off the error; weights beyond fp16's range get bf16."""
    weight = mx.random.normal((256, 256), key=mx.random.key(1)) * 0.02
    packing = Packing(64, 8)
    packed = pack_matrix(weight, packing)
    assert packed["scales"].dtype == packed["biases"].dtype == FP16
    coarse = dict(zip(packed, mx.quantize(weight.astype(BF16), 64, 8), strict=True))
    fine, rough = (float(mx.linalg.norm(unpack_matrix(p, packing) - weight)) for p in (packed, coarse))
    assert fine < 0.85 * rough
    for factor in (1e7, 1e-4):
        assert pack_matrix(weight * factor, packing)["scales"].dtype == BF16
    with pytest.raises(CheckpointError, match="w holds numbers that are not finite"):
        pack_matrix(mx.where(weight > 0.05, mx.nan, weight), packing, "w")


def test_large_matrices_are_packed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mx.random.normal((300, 256), key=mx.random.key(2))
    whole = pack_matrix(weight, Packing(64, 4))
    monkeypatch.setattr("mlx_kontext.weights.pack._CHUNK", 7 * 256)
    chunked = pack_matrix(weight, Packing(64, 4))
    assert all(mx.array_equal(whole[name], chunked[name]) for name in whole)


@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
def test_layers_keep_the_dtype_of_their_input(dtype: mx.Dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Embedding(10, 64))
    tensors = dict(tree_flatten(model.parameters()))
    exact = tensors["layers.0.weight"]
    layers = {"layers.0": Packing(64, 8), "layers.1": Packing(32, 8)}
    quantize_tensors(tensors, layers)
    fill(model, tensors, dtype, "here", layers)
    linear, table = model.layers
    assert isinstance(linear, QuantizedLinear) and linear.scales.dtype == (F32 if dtype == F32 else FP16)
    x = mx.random.normal((5, 64), key=mx.random.key(3)).astype(dtype)
    y = linear(x)
    assert y.dtype == dtype and linear.bias.dtype == dtype
    expected = x.astype(F32) @ exact.T + tensors["layers.0.bias"]
    assert float(mx.abs(y.astype(F32) - expected).max()) < 0.06
    assert table(mx.array([[1, 2]])).shape == (1, 2, 64)


# --- a model on disk and in memory ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as q4m in our own folder."""
    folder = tmp_path_factory.mktemp("saved") / "demo-q4m"
    KontextPipeline.from_pretrained("demo", quantize="q4m").save_pretrained(folder)
    return folder


def loaded(pipe: KontextPipeline, part: str) -> dict[str, mx.array]:
    return dict(tree_flatten(pipe.checkpoint.model(part, F32).parameters()))


def test_saving_and_quantizing_while_loading_give_the_same_bits(saved: Path) -> None:
    fresh, stored = KontextPipeline.from_pretrained("demo", quantize="q4m"), KontextPipeline.from_pretrained(saved)
    assert fresh.quantization == stored.quantization == "q4m"
    assert fresh.checkpoint.identity == stored.checkpoint.identity
    assert fresh.plan(64, 64, None, None).weights == stored.plan(64, 64, None, None).weights
    for part in ("transformer", "text_encoder_2", "text_encoder", "vae"):
        a, b = loaded(fresh, part), loaded(stored, part)
        assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]) for n in a)
        assert fresh.plan(64, 64, None, None).weights[part] == sum(value.nbytes for value in a.values())
    config = json.loads((saved / "transformer/config.json").read_text())["quantization"]
    assert config["group_size"] == 64 and config["mode"] == "affine"
    assert any(isinstance(value, dict) for value in config.values())  # mlx-lm's overrides by layer
    with pytest.raises(RequestError, match="quantized already"):
        KontextPipeline.from_pretrained(saved, quantize="q8")


def test_a_quantized_model_is_saved_again_as_it_is(saved: Path, tmp_path: Path) -> None:
    KontextPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    before, after = Checkpoint.open(saved), Checkpoint.open(tmp_path / "again")
    assert before.quantization == after.quantization and after.index["quantization"] == "q4m"
    a, b = before.tensors("transformer"), after.tensors("transformer")
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def test_fp_modes_survive_a_folder(tmp_path: Path) -> None:
    pipe = KontextPipeline.from_pretrained("demo", quantize=Scheme(4, 16, "nvfp4"))
    pipe.save_pretrained(tmp_path / "fp")
    stored = KontextPipeline.from_pretrained(tmp_path / "fp")
    assert stored.quantization == "nvfp4"
    a, b = loaded(pipe, "transformer"), loaded(stored, "transformer")
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)
    assert not any(name.endswith("linear1.biases") for name in b)
    assert b["single_blocks.0.linear1.scales"].dtype == mx.uint8  # codes, not numbers to cast
    y = stored.flux.single_blocks[0].linear1(mx.ones((1, stored.checkpoint.config("transformer").hidden)))
    assert y.dtype == F32 and mx.isfinite(y).all().item()


def test_packing_holds_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers of 4 MB: the peak above the result is about one of them, not 32 MB."""
    monkeypatch.setattr("mlx_kontext.weights.pack._CHUNK", 2**16)
    config = FluxConfig(num_layers=0, num_single_layers=8, num_attention_heads=2)
    names = {f"single_blocks.{i}.linear2.weight": (1638, 1280) for i in range(8)}
    mx.save_safetensors(
        str(tmp_path / "m.safetensors"), {n: mx.random.normal(s).astype(BF16) for n, s in names.items()}
    )
    mx.clear_cache()
    layer, before = 1638 * 1280 * 2, mx.get_active_memory()
    tensors = mx.load(str(tmp_path / "m.safetensors"))
    layers = choose(Scheme(4), "transformer", config, names).layers
    assert len(layers) == 8
    mx.reset_peak_memory()
    quantize_tensors(tensors, layers)
    result = sum(value.nbytes for value in tensors.values())
    above = mx.get_peak_memory() - before - result
    print(f"{above / layer:.2f} layers above the result")
    assert above < 1.6 * layer, f"{above / layer:.2f} layers"


def rejson(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def retensor(folder: Path, suffix: str, change: Callable[[mx.array], mx.array]) -> None:
    path = folder / "text_encoder_2/model.safetensors"
    tensors = mx.load(str(path))
    mx.eval(tensors)
    tensors[f"shared.{suffix}"] = change(tensors[f"shared.{suffix}"])
    mx.save_safetensors(str(path), tensors)


CONFIG = "text_encoder_2/config.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no block": (lambda f: rejson(f / CONFIG, lambda c: c.pop("quantization")), "no quantization block"),
    "block is a list": (lambda f: rejson(f / CONFIG, lambda c: c.update(quantization=[4])), "no quantization block"),
    "bits of another kind": (lambda f: rejson(f / CONFIG, lambda c: c["quantization"].update(bits="8")), "the quantization of"),
    "bits there are not": (lambda f: rejson(f / CONFIG, lambda c: c["quantization"].update(bits=7)), "the quantization of"),
    "bits of another model": (lambda f: rejson(f / CONFIG, lambda c: c["quantization"].update(bits=4)), "misshaped"),
    "no group size": (lambda f: rejson(f / CONFIG, lambda c: c["quantization"].pop("group_size")), "the quantization of"),
    "unknown mode": (lambda f: rejson(f / CONFIG, lambda c: c["quantization"].update(mode="int8")), "the quantization of"),
    "override astray": (
        lambda f: rejson(f / CONFIG, lambda c: c["quantization"].update(lm_head={"bits": 8, "group_size": 64})),
        "lm_head is said to be quantized and has no scales",
    ),
    "scales misshaped": (lambda f: retensor(f, "scales", lambda x: x[:, :-1] if x.shape[1] > 1 else x[:-1]), r"misshaped"),
    "scales NaN": (lambda f: retensor(f, "scales", lambda x: x * float("nan")), r"shared\.scales holds numbers that are not"),
    "biases infinite": (lambda f: retensor(f, "biases", lambda x: x + float("inf")), r"shared\.biases holds numbers"),
    "scales of one byte": (lambda f: retensor(f, "scales", lambda x: x.astype(mx.uint8)), r"shared\.scales is uint8"),
    "weight of another dtype": (lambda f: retensor(f, "weight", lambda x: x.astype(mx.int32)), r"shared\.weight is I32"),
    "weight not packed": (lambda f: retensor(f, "weight", lambda x: x.astype(F32)), r"shared\.weight is float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_in_one_line(saved: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    damage, told = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=told) as caught:
        KontextPipeline.from_pretrained(folder).checkpoint.model("text_encoder_2", F32)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_layers_that_are_not_there_are_told() -> None:
    model = T5Encoder(T5Config(vocab_size=8, d_model=32, d_ff=32, num_heads=2, d_kv=16, num_layers=1))
    for path in ("shred", "encoder.block.7.layer.0.SelfAttention.q", "encoder.final_layer_norm", "encoder.block"):
        with pytest.raises(CheckpointError, match="no such layer"):
            quantize_layers(model, {path: Packing(32, 8)})
    with pytest.raises(CheckpointError, match="groups of 64"):
        quantize_layers(model, {"shared": (64, 8, "affine")})


# --- what it does to a picture ---


@pytest.fixture(scope="module")
def original() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2), 1e-9)))


def test_pictures_stay_close(original: KontextPipeline, saved: Path) -> None:
    """Measured: q8 56 dB, q4m 38, q4 36 after 8 steps."""
    exact = original(image=SAMPLE, prompt=PROMPT, seed=1, num_inference_steps=4)
    assert "quantization" not in exact.model
    for name, pipe, least in (
        ("q8", KontextPipeline.from_pretrained("demo", quantize=8), 40),
        ("q4m", KontextPipeline.from_pretrained(saved), 24),
        ("q4", KontextPipeline.from_pretrained("demo", quantize="q4"), 20),
    ):
        result = pipe(exact.request)
        assert result.model["quantization"] == name and result.to_json()["model"]["quantization"] == name
        found = psnr(exact.image, result.image)
        print(f"{name}: {found:.1f} dB")
        assert found > least, f"{name}: {found:.1f} dB"


def test_report(original: KontextPipeline, saved: Path) -> None:
    errors = {}
    for name, pipe in (
        ("q8", KontextPipeline.from_pretrained("demo", quantize="q8")),
        ("q4m", KontextPipeline.from_pretrained(saved)),
    ):
        report = quantization.report(original, pipe)
        assert len(report.rows) == sum(len(c.layers) for c in pipe.checkpoint.quantization.values())
        assert all(0 < row.error < {8: 0.02, 5: 0.06, 4: 0.11}[row.bits] for row in report.rows)
        assert all(row.bytes < row.bytes_before for row in report.rows)
        json.dumps(report.to_json())
        assert len(report.table().splitlines()) == len(report.rows) + 2
        errors[name] = quantization.velocity_errors(original, pipe, SAMPLE, PROMPT, sigmas=(1.0, 0.5))
    print(errors)
    assert all(0 < error < 0.05 for error in errors["q8"].values())
    assert all(2 * errors["q8"][sigma] < errors["q4m"][sigma] < 0.5 for sigma in (1.0, 0.5))
    with pytest.raises(RequestError, match="compare with the original"):
        quantization.report(KontextPipeline.from_pretrained(saved), original)


def test_inspect_counts_what_is_and_what_would_be(saved: Path) -> None:
    would, stored, plain = inspect_model("demo", quantize="q4m"), inspect_model(str(saved)), inspect_model("demo")
    assert would.quantization == stored.quantization == "q4m" and plain.quantization is None
    assert "quantization  q4m" in stored.page() and "at 4 bits" in stored.page() and "at 4 bits" not in plain.page()
    for part in ("transformer", "text_encoder_2"):
        a, b, c = (found.parts[part] for found in (would, stored, plain))
        assert a.loaded == b.loaded < c.loaded and a.bits == b.bits and not c.bits
        assert a.parameters == b.parameters == c.parameters and b.bytes < a.bytes
    assert json.loads(json.dumps(stored.to_json()))["quantization"] == "q4m"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (
        (["inspect", "demo", "-q", "q8"], 0),
        (["edit", str(SAMPLE), PROMPT, "-m", "demo", "--steps", "1", "-q", "8", "-o", str(tmp_path / "a.png")], 0),
        (["show", str(tmp_path / "a.png")], 0),
        (["generate", PROMPT, "-m", "demo", "-q", "q9", "-o", str(tmp_path / "b.png")], 2),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == code
    told = capsys.readouterr()
    assert "quantization  q8" in told.out and "float32 q8" in told.out
    assert "quantize is 'q9'; choose none" in told.err


def test_the_demo_folder_is_not_quantized() -> None:
    assert not any(chosen.layers for chosen in Checkpoint.open(demo_folder()).quantization.values())

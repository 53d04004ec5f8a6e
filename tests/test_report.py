"""What quantization costs, in figures: they grow as bits shrink, are nothing for equal models, and fit what is stored."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mlx_kontext import EditRequest, ImageError, KontextPipeline, RequestError, cli
from mlx_kontext import plan as planning
from mlx_kontext.backend import nn
from mlx_kontext.hub import demo_folder
from mlx_kontext.models.quantized import Packing, QuantizedLinear
from mlx_kontext.quantize import Scheme
from mlx_kontext.report import SIGMAS, Comparison, LayerError, compare, recorded
from mlx_kontext.weights.load import Checkpoint
from mlx_kontext.weights.pack import pack_matrix, relative_error, unpack_matrix

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"


def demo(quantize: Any = None, **options: Any) -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo", quantize=quantize, **options)


@pytest.fixture(scope="module")
def original() -> KontextPipeline:
    return demo()


@pytest.fixture(scope="module")
def q4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "demo-q4"
    demo("q4").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def q8(original: KontextPipeline) -> Comparison:
    return compare(original, demo("q8"), SAMPLE, steps=2)


@pytest.fixture(scope="module")
def q4(original: KontextPipeline, q4_folder: Path) -> Comparison:
    return compare(original, KontextPipeline.from_pretrained(q4_folder), SAMPLE, steps=2)


# --- figures ---


def test_eight_bits_are_better_than_four_by_every_measure(q8: Comparison, q4: Comparison) -> None:
    assert [(row.part, row.path) for row in q8.layers] == [(row.part, row.path) for row in q4.layers]
    for eight, four in zip(q8.layers, q4.layers, strict=True):
        assert 0 < eight.weight_error < 0.01 and 0 < eight.output_error < 0.02, eight
        assert eight.bytes_before == four.bytes_before > eight.bytes >= four.bytes
        if four.bits == 4:
            assert 8 * eight.weight_error < four.weight_error < 0.12, four
            assert 4 * eight.output_error < four.output_error < 0.15, four
        else:  # T5 and modulation
            assert four == eight
    assert q8.velocities.keys() == q4.velocities.keys() == set(SIGMAS)
    assert all(0 < 4 * q8.velocities[sigma] < q4.velocities[sigma] < 0.5 for sigma in SIGMAS)
    assert q8.psnr is not None and q4.psnr is not None and q8.psnr > q4.psnr + 6 > 20
    assert 1 > q8.ssim > q4.ssim > 0.5
    assert sum(q4.bytes.values()) < sum(q8.bytes.values()) < sum(q8.bytes_before.values())


def test_sizes_are_those_on_disk(q4: Comparison, q8: Comparison, q4_folder: Path) -> None:
    for part in q4.bytes:
        for folder, size in ((q4_folder, q4.bytes[part]), (demo_folder(), q4.bytes_before[part])):
            assert size == sum(info.nbytes for info in Checkpoint.open(folder).headers(part).values())
    assert q8.bytes_before == q4.bytes_before and q8.bytes["vae"] == q8.bytes_before["vae"]
    stored = Checkpoint.open(q4_folder).headers("transformer")
    (row,) = (row for row in q4.layers if row.path == "single_blocks.2.linear1")
    assert row.bytes == sum(stored[f"{row.path}.{suffix}"].nbytes for suffix in ("weight", "scales", "biases"))


def test_equal_models_have_no_errors(original: KontextPipeline) -> None:
    found = compare(original, demo(), SAMPLE, steps=1)
    assert found.layers == [] and set(found.velocities.values()) == {0} and found.ssim == pytest.approx(1)
    assert found.psnr is None and json.loads(json.dumps(found.to_json(), allow_nan=False))["psnr"] is None
    assert "demo (not quantized) beside demo" in found.page() and found.page().endswith("seed 0: equal")


@pytest.mark.parametrize("step", [1, 4])
def test_output_errors_are_of_what_the_layers_were_given(step: int) -> None:
    """By hand for one layer: record, multiply, compare."""
    mx.random.seed(step)
    model = nn.Sequential(nn.Linear(64, 32), nn.Embedding(5, 64), nn.Linear(64, 64))
    x = mx.random.normal((2, 40 * step, 64))
    with recorded(model, ["layers.0", "layers.1"]) as inputs:
        y = model.layers[0](x)
        model.layers[1](mx.array([[1, 2, 0]]))
        model.layers[2](x)
    assert type(model.layers[0]) is nn.Linear and type(model.layers[1]) is nn.Embedding
    assert mx.array_equal(y, model.layers[0](x))
    assert inputs.keys() == {"layers.0", "layers.1"} and inputs["layers.1"][0].tolist() == [1, 2, 0]
    (kept,) = inputs["layers.0"]
    every = {1: 2, 4: 5}[step]  # 80 and 320 rows: at most 64 of them
    assert mx.array_equal(kept, x.reshape(-1, 64)[::every]) and len(kept) <= 64


def test_layers_are_themselves_again_after_an_error() -> None:
    layer = QuantizedLinear(8, 64, Packing(64, 8), bias=False)
    model = nn.Sequential(layer)
    with pytest.raises(ZeroDivisionError), recorded(model, ["layers.0"]) as inputs:
        model(mx.ones((3, 64)))
        _ = 1 / 0
    assert type(layer) is QuantizedLinear and inputs["layers.0"][0].shape == (3, 64)


def test_output_error_by_hand(original: KontextPipeline, q4: Comparison) -> None:
    """Of T5's first projection, whose input is plain: the normed table rows of the prompt."""
    path = "encoder.block.0.layer.0.SelfAttention.q"
    t5, length = original.t5, q4.request.max_sequence_length or 0
    ids = mx.array(original.text.t5_ids(q4.request.prompt, length)[0])
    x = t5.encoder.block[0].layer[0].layer_norm(t5.shared(ids))
    weight = t5.encoder.block[0].layer[0].SelfAttention.q.weight
    packed = unpack_matrix(pack_matrix(weight, Packing(64, 8)), Packing(64, 8))
    expected = mx.linalg.norm(x @ (packed - weight).T) / mx.linalg.norm(x @ weight.T)
    (row,) = (row for row in q4.layers if row.path == path)
    assert row.output_error == pytest.approx(float(expected), rel=1e-3)


def test_models_take_turns_in_memory(
    original: KontextPipeline, q8: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a part of one is read, the other holds nothing; at the end neither does. The figures are the same each time."""
    quantized, read, load = demo("q8"), [], Checkpoint.model
    others = {id(original.checkpoint): quantized, id(quantized.checkpoint): original}

    def model(self: Checkpoint, part: str, dtype: mx.Dtype) -> nn.Module:
        assert not others[id(self)]._parts
        read.append(part)
        return load(self, part, dtype)

    original.release()
    monkeypatch.setattr(Checkpoint, "model", model)
    again = compare(original, quantized, SAMPLE, steps=2)  # whose prompt the original remembers
    assert read.count("transformer") == 2 and not original._parts and not quantized._parts
    assert again.layers == q8.layers and again.velocities == q8.velocities and again.psnr == q8.psnr


def lora(path: Path) -> Path:
    """A LoRA on one layer of the demo model."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = Checkpoint.open(demo_folder()).shapes("transformer")["single_blocks.1.linear2.weight"]
    name = "diffusion_model.single_blocks.1.linear2"
    a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((2, columns), (rows, 2)))
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, path)
    return path


def test_original_in_fp8(tmp_path: Path) -> None:
    """Compared with what its file says, counted as 16 bits."""
    tensors = {
        name: torch.from_numpy(np.array(value.astype(mx.float32)))
        for name, value in Checkpoint.open(demo_folder()).tensors("transformer").items()
    }
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items() if value.ndim == 2}
    save_file(tensors | eight, tmp_path / "kontext-fp8.safetensors")
    options = {"transformer": tmp_path / "kontext-fp8.safetensors", "config": demo_folder()}
    found = compare(demo(**options), demo(Scheme(4, 16, "nvfp4"), **options), SAMPLE, steps=1)
    (row,) = (row for row in found.layers if row.path == "single_blocks.1.linear2")
    assert (row.bits, row.group_size) == (4, 16) and 0.02 < row.weight_error < 0.15
    assert row.bytes_before == 2 * tensors[f"{row.path}.weight"].numel()
    assert all(row.weight_error < 0.006 for row in found.layers if row.bits == 8)


# --- as text and as JSON ---


def test_page_and_json(q4: Comparison) -> None:
    page, values = q4.page(), json.loads(json.dumps(q4.to_json(), allow_nan=False))
    assert len(page.splitlines()) <= 40 and max(map(len, page.splitlines())) <= 120
    (line,) = (line for line in page.splitlines() if line.startswith("double_blocks.*.img_mlp.2 "))
    rows = [row for row in q4.layers if row.kind == "double_blocks.*.img_mlp.2"]
    errors = [row.output_error for row in rows]
    assert line.split()[1:3] == ["3", "4"] and f"{sum(errors) / 3:.4f} {max(errors):.4f}" in line
    assert "T5 block.*.layer.0.SelfAttention.q" in page and "T5 shared" in page
    assert f"PSNR {q4.psnr:.1f} dB, SSIM {q4.ssim:.4f}" in page and f"{q4.velocities[0.5]:.4f} at 0.5" in page
    assert len(values["layers"]) == len(q4.layers) == 63
    assert values["layers"][0] == dataclasses.asdict(q4.layers[0])
    assert values["velocity_errors"] == {f"{sigma:g}": error for sigma, error in q4.velocities.items()}
    assert values["bytes"] == sum(part["bytes"] for part in values["parts"].values())
    assert values["edit"]["prompt"] == "make the circle green" and values["edit"]["num_inference_steps"] == 2


def test_layers_are_in_order_of_their_blocks(q4: Comparison) -> None:
    row = q4.layers[0]
    many = [dataclasses.replace(row, path=f"single_blocks.{i}.linear2", weight_error=0.01 * i) for i in (9, 10)]
    (line,) = (line for line in dataclasses.replace(q4, layers=many).page().splitlines() if "linear2" in line)
    assert "0.0950 0.1000" in line
    paths = [row.path for row in q4.layers if row.path.endswith("linear1")]
    assert paths == [f"single_blocks.{i}.linear1" for i in range(6)]
    assert LayerError("text_encoder_2", "encoder.block.11.layer.1.DenseReluDense.wi_0", 8, 64, 0, 0, 0, 0).kind == (
        "encoder.block.*.layer.1.DenseReluDense.wi_0"
    )


# --- what cannot be compared ---


def test_refused(original: KontextPipeline, q4_folder: Path, tmp_path: Path) -> None:
    q4 = KontextPipeline.from_pretrained(q4_folder)
    with pytest.raises(RequestError, match=r"demo-q4 is quantized \(q4\); compare with the original"):
        compare(q4, original)
    with pytest.raises(RequestError, match="quantized"):
        compare(q4, q4)
    with pytest.raises(ImageError):
        compare(original, q4, tmp_path / "none.png")
    with pytest.raises(RequestError, match="prompt is empty"):
        compare(original, q4, SAMPLE, " ")


def test_another_model_is_refused(original: KontextPipeline, q4_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q4, edited = KontextPipeline.from_pretrained(q4_folder), []
    monkeypatch.setattr(KontextPipeline, "__call__", lambda *_: edited.append(1))
    plain = Checkpoint.plain_shapes

    def shapes(self: Checkpoint, part: str) -> dict[str, tuple[int, ...]]:
        return plain(self, part) | ({"single_blocks.0.linear1.weight": (8, 64)} if self is q4.checkpoint else {})

    monkeypatch.setattr(Checkpoint, "plain_shapes", shapes)
    with pytest.raises(RequestError, match="demo and demo-q4 are not the same model: single_blocks"):
        compare(original, q4)
    monkeypatch.setattr(Checkpoint, "plain_shapes", plain)
    config = Checkpoint.config

    def other(self: Checkpoint, part: str) -> Any:
        found = config(self, part)
        return dataclasses.replace(found, scaling_factor=0.5) if self is q4.checkpoint and part == "vae" else found

    monkeypatch.setattr(Checkpoint, "config", other)
    with pytest.raises(RequestError, match="not the same model: config"):
        compare(original, q4)
    assert not edited


# --- at the command line ---

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `mlx-kontext ARGUMENTS` in an empty folder without settings; edits take two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_kontext.config.user_file", lambda: tmp_path / "config.toml")
    edit = KontextPipeline.__call__

    def quick(self: KontextPipeline, request: EditRequest) -> Any:
        return edit(self, dataclasses.replace(request, num_inference_steps=2))

    monkeypatch.setattr(KontextPipeline, "__call__", quick)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, told.out, told.err

    return call


def test_convert(run: Run) -> None:
    code, out, err = run("convert", "demo", "q8", "-q", "q8")
    assert (code, out) == (0, "q8\n") and "PSNR" not in err
    code, out, err = run("convert", "demo", "q8", "-q", "q8", "--report", "--json")  # it is there: only the report
    values = json.loads(out)
    assert code == 0 and values["folder"] == "q8" and len(values["report"]["layers"]) == 63
    assert "q8 (q8) beside demo" in err and f"PSNR {values['report']['psnr']:.1f} dB" in err
    assert values["report"]["edit"]["prompt"] == "make the circle green"


def test_convert_with_a_lora(run: Run, tmp_path: Path) -> None:
    """The original gets the LoRA too, so that what it changes is no error."""
    lora(tmp_path / "style.safetensors")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    picture.save(tmp_path / "in.png")
    more = ("--report", "--report-image", "in.png", "--report-prompt", "make it blue", "--json")
    code, out, err = run("convert", "demo", "q8", "-q", "8", "--lora", "style.safetensors:0.8", *more)
    assert code == 0, err
    report = json.loads(out)["report"]
    assert max(layer["weight_error"] for layer in report["layers"]) < 0.01
    assert max(report["velocity_errors"].values()) < 0.03
    assert report["edit"]["image"] == "in.png" and report["edit"]["prompt"] == "make it blue"
    name = "single_blocks.1.linear2"
    packed = Checkpoint.open(tmp_path / "q8").tensors("transformer")
    found = unpack_matrix(
        {suffix: packed[f"{name}.{suffix}"] for suffix in ("weight", "scales", "biases")}, Packing(64, 8)
    )
    assert relative_error(found, Checkpoint.open(demo_folder()).tensors("transformer")[f"{name}.weight"]) > 0.05


def test_inspect(run: Run, q4_folder: Path, q8: Comparison) -> None:
    code, out, _ = run("inspect", q4_folder, "--against", "demo")
    assert code == 0 and out.startswith("demo-q4 (q4) beside demo\n") and "single_blocks.*.linear1" in out
    code, out, _ = run("inspect", "demo", "-q", "q8", "--against", "demo", "--report-image", SAMPLE, "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(q8.to_json()))  # and nothing was written
    assert not list(Path().iterdir())


def test_a_machine_too_small_is_told_before_the_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory_budget", "physical_memory"):
        monkeypatch.setattr(planning, name, lambda: 10**6)
    code, _, err = run("convert", "demo", "new", "-q", "q8", "--report")
    assert code == 4 and "and the machine has" in err and not (tmp_path / "new").exists()


def test_mistakes_at_the_command_line(run: Run, q4_folder: Path, tmp_path: Path) -> None:
    lora(tmp_path / "style.safetensors")
    for arguments, code, words in (
        (["convert", "demo", "new", "--report-prompt", "x"], 2, "belong to --report"),
        (["convert", "demo", "new", "--report", "--dry-run"], 2, "inspect SRC -q q8 --against SRC"),
        (["convert", "demo", "new", "--report", "--report-image", "none.png"], 5, "none.png"),
        (["convert", "demo", "new", "--report", "--report-prompt", ""], 2, "prompt is empty"),
        (["convert", q4_folder, "new", "--report"], 2, "compare with the original weights"),
        (["inspect", "demo", "--report-image", "x.png"], 2, "belong to --against"),
        (["inspect", "style.safetensors", "--against", "demo"], 2, "this is a LoRA"),
        (["inspect", "demo", "--against", q4_folder], 2, "demo-q4 is quantized (q4)"),
        (["inspect", "demo", "--against", "nowhere"], 3, "nowhere"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and words in err.replace("\n", " "), (arguments, found, err)
        assert not (tmp_path / "new").exists()  # told before any work

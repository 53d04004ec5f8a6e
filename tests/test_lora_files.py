"""LoRA files that are refused, each in one clear line, and LoRAs as words: in a request, a record, the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mlx_kontext import AdapterError, EditRequest, RequestError, cli
from mlx_kontext.backend import mx
from mlx_kontext.edit import Lora
from mlx_kontext.hub import demo_folder
from mlx_kontext.lora import Adapter, read_adapter
from mlx_kontext.models.flux import FluxConfig
from mlx_kontext.weights.lora_names import places

SAMPLE = str(Path(__file__).parent.parent / "assets" / "sample.png")
Tensors = dict[str, torch.Tensor]


def read(path: Path) -> Adapter:
    """For a transformer of 4 heads of 32, two double and three single blocks."""
    sizes = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32}
    return read_adapter(
        path, FluxConfig(**sizes, axes_dims_rope=(8, 12, 12), joint_attention_dim=64, pooled_projection_dim=64)
    )


# --- what is refused ---

DOWN, UP = torch.zeros(4, 128), torch.zeros(128, 4)
STEM = "lora_unet_double_blocks_0_img_attn_proj"
DOTTED = "transformer.transformer_blocks.0.attn.to_k"
PAIR = {f"{DOTTED}.lora_A.weight": DOWN, f"{DOTTED}.lora_B.weight": UP}
REFUSED: dict[str, tuple[Tensors, str]] = {
    "LoKr": ({f"{STEM}.lokr_w1": DOWN, f"{STEM}.lokr_w2": UP, f"{STEM}.alpha": torch.tensor(1.0)}, "is a LoKr; take"),
    "LoHa": ({f"{STEM}.hada_w1_a": UP, f"{STEM}.hada_w1_b": DOWN}, "is a LoHa; take a plain LoRA"),
    "GLoRA": ({f"{STEM}.a1.weight": DOWN, f"{STEM}.b1.weight": UP}, "is a GLoRA"),
    "OFT": ({f"{STEM}.oft_blocks": DOWN}, "is an OFT"),
    "PEFT's OFT": ({f"{DOTTED}.oft_R.weight": DOWN}, "is an OFT"),
    "full difference": (
        {f"{STEM}.diff": torch.zeros(128, 128), f"{STEM}.diff_b": torch.zeros(128)},
        "whole differences",
    ),
    "difference beside a LoRA": (PAIR | {"diffusion_model.img_in.diff": UP}, "whole differences"),
    "DoRA of kohya": ({f"{STEM}.lora_down.weight": DOWN, f"{STEM}.dora_scale": UP}, "is a DoRA"),
    "DoRA of PEFT": (PAIR | {f"{DOTTED}.lora_magnitude_vector": torch.zeros(128)}, "is a DoRA"),
    "OneTrainer": (
        {
            "lora_transformer_transformer_blocks_0_attn_to_k.lora_down.weight": DOWN,
            "lora_transformer_transformer_blocks_0_attn_to_k.lora_up.weight": UP,
        },
        "OneTrainer's own names; convert it",
    ),
    "nunchaku": (
        {"transformer_blocks.0.mlp_fc1.lora_down": DOWN, "transformer_blocks.0.mlp_fc1.lora_up": UP},
        "packed for nunchaku; take the original",
    ),
    "BFL control": (
        {
            "img_in.lora_A.weight": torch.zeros(4, 128),
            "img_in.lora_B.weight": UP,
            "img_in.lora_B.bias": torch.zeros(128),
            "double_blocks.0.img_attn.norm.query_norm.scale": torch.zeros(32),
        },
        r"control LoRA of Black Forest Labs \(Canny, Depth\)",
    ),
    "control in diffusers' names": (
        {"transformer.x_embedder.lora_A.weight": DOWN, "transformer.x_embedder.lora_B.weight": UP},
        "128 input channels.; Kontext has 64",
    ),
    "biases": (PAIR | {f"{DOTTED}.lora_B.bias": torch.zeros(128)}, "changes biases too"),
    "Tucker": ({f"{STEM}.lora_mid.weight": DOWN}, "LoCon with a middle part"),
    "a checkpoint": (
        {"double_blocks.0.img_attn.norm.query_norm.scale": DOWN, "img_in.weight": UP},
        "is no LoRA we know",
    ),
    "another model's": (
        {
            "lora_unet_down_blocks_0_attn_to_k.lora_down.weight": DOWN,
            "lora_unet_down_blocks_0_attn_to_k.lora_up.weight": UP,
        },
        r"1 unknown \(down_blocks_0_attn_to_k\); is it a LoRA for FLUX.1",
    ),
    "a block too many": (
        {n.replace(".0.", ".7."): t for n, t in PAIR.items()},
        r"1 unknown \(transformer_blocks.7.attn",
    ),
    "misshaped": (
        {f"{DOTTED}.lora_A.weight": torch.zeros(4, 96), f"{DOTTED}.lora_B.weight": UP},
        r"1 misshaped \(transformer_blocks.0.attn.to_k \(128, 4\) \(4, 96\) instead of \(128, r\) \(r, 128\)\)",
    ),
    "ranks differ": ({f"{DOTTED}.lora_A.weight": DOWN, f"{DOTTED}.lora_B.weight": torch.zeros(128, 5)}, "1 misshaped"),
    "rank 0": (
        {f"{DOTTED}.lora_A.weight": torch.zeros(0, 128), f"{DOTTED}.lora_B.weight": torch.zeros(128, 0)},
        "1 misshaped",
    ),
    "no dimensions": ({f"{DOTTED}.lora_A.weight": torch.tensor(1.0), f"{DOTTED}.lora_B.weight": UP}, "1 misshaped"),
    "half a pair": ({f"{DOTTED}.lora_A.weight": DOWN}, r"1 incomplete \(transformer_blocks.0.attn.to_k\)"),
    "alpha alone": (PAIR | {"transformer.proj_out.alpha": torch.tensor(1.0)}, r"1 incomplete \(proj_out\)"),
    "one module twice": (PAIR | {n.removeprefix("transformer."): t for n, t in PAIR.items()}, "has two down tensors"),
    "one place twice": (
        PAIR
        | {
            "double_blocks.0.img_attn.qkv.lora_A.weight": DOWN,
            "double_blocks.0.img_attn.qkv.lora_B.weight": torch.zeros(384, 4),
        },
        r"1 named twice \(double_blocks.0.img_attn.qkv\)",
    ),
    "NaN": (
        PAIR | {f"{DOTTED}.lora_B.weight": torch.full((128, 4), torch.nan)},
        "1 layers hold values that are not finite",
    ),
    "infinity": (PAIR | {f"{DOTTED}.lora_A.weight": torch.full((4, 128), torch.inf)}, "not finite"),
    "alpha is no number": (PAIR | {f"{DOTTED}.alpha": torch.tensor(torch.nan)}, "expected one finite number"),
    "alpha is many": (PAIR | {f"{DOTTED}.alpha": torch.ones(2)}, "expected one finite number"),
    "integers": ({n: t.to(torch.int8) for n, t in PAIR.items()}, "is I8; expected F32, F16, BF16"),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, tmp_path: Path) -> None:
    tensors, words = REFUSED[kind]
    path = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    with pytest.raises(AdapterError, match=words) as raised:
        read(path)
    assert str(raised.value).startswith(str(path)) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("[1]", "lora_adapter_metadata is no JSON object"),
        ("[" * 100_000, "lora_adapter_metadata is no JSON object"),
        ('{"transformer.use_dora": true}', "is a DoRA"),
        ('{"transformer.lora_alpha": "x"}', "lora_alpha is 'x'; expected a number"),
        ('{"transformer.lora_alpha": NaN}', "lora_alpha is 'nan'; expected a number"),
        ('{"transformer.alpha_pattern": {"(a+)+$": 1}}', "alpha_pattern is .*; expected names"),
    ],
)
def test_metadata_of_strangers(metadata: str, words: str, tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "lora.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(AdapterError, match=words):
        read(tmp_path / "lora.safetensors")


def test_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("reached MLX"))
    path = tmp_path / "lora.safetensors"
    save_file(PAIR, path)
    good = path.read_bytes()
    for data, words in {
        good[:-7]: "cut short",
        good[:99]: "cut short within its header",
        good + b"more": "4 bytes too many",
        b"": "is empty",
        b"\x80\4abcdefghijk": "is a Python pickle",
        b"<html>login</html>": "is a web page",
        good.replace(b'"F32"', b'"F33"', 1): "has dtype 'F33'",
    }.items():
        path.write_bytes(data)
        with pytest.raises(AdapterError, match=words) as raised:
            read(path)
        assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)
    for missing in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(AdapterError, match="there is no such file"):
            read(missing)


def test_flattened_names_are_unambiguous() -> None:
    """At full size: every flattened name belongs to one module, so looking it up is enough."""
    known = places(FluxConfig())
    dotted = [name for name in known if "." in name]
    assert len({name.replace(".", "_") for name in dotted}) == len(dotted)
    assert known["single_transformer_blocks_37_proj_mlp"].start == 9216
    assert len({place.target for place in known.values()}) == 19 * 10 + 38 * 3 + 2 + 6 + 2


# --- as words ---


WRONG: list[tuple[Any, str]] = [
    ("a.safetensors", "expected a list"),
    (["a:nan"], "finite number"),
    (["a:0"], "does nothing; leave the LoRA out"),
    ([("a", "b")], "must be a finite number"),
    ([("a", 101)], "at most 100"),
    ([3], "a LoRA is '3'; expected a path"),
    ([("a", 1, 2)], "expected a path"),
    ([""], "expected the path"),
    ([{"path": 3}], "expected the path"),
    ([{"path": "a", "zoom": 1}], "a LoRA is"),
    ([{"path": "a", "sha256": "x"}], "expected 64 hexadecimal digits"),
    (5, "expected a list"),
]


def test_loras_as_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:2").touch()
    values = ["a.safetensors", "a.safetensors:0.8", ("b", -2), Path("c"), "odd:2", "d:x", {"path": "e", "scale": 3}]
    assert EditRequest("x", loras=values).loras == (
        Lora("a.safetensors"),
        Lora("a.safetensors", 0.8),
        Lora("b", -2.0),
        Lora("c"),
        Lora("odd:2"),
        Lora("d:x"),
        Lora("e", 3.0),
    )
    for wrong, words in WRONG:
        with pytest.raises(RequestError, match=words):
            EditRequest("x", loras=wrong)


# --- at the command line ---


@pytest.fixture
def style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA for the demo model, and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_kontext.config.user_file", lambda: tmp_path / "config.toml")
    config = json.loads((demo_folder() / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(config["num_layers"]):
        stem = f"transformer.transformer_blocks.{i}.norm1.linear"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, width, generator=generator) / width**0.5
        tensors[f"{stem}.lora_B.weight"] = torch.randn(6 * width, 2, generator=generator)
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return exited.value.code, captured.out, captured.err


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_command_line(style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = ["edit", SAMPLE, "make the circle green", "--model", "demo", "--seed", "7", "--steps", "2"]
    pictures = {}
    for name, loras in {
        "plain": [],
        "half": ["--lora", "style.safetensors:0.5"],
        "twice": ["--lora", "style.safetensors:0.25", "--lora", f"{style}:0.25"],
    }.items():
        code, out, err = run(capsys, *edit, "-o", f"{name}.png", *loras)
        assert (code, out) == (0, f"{name}.png\n"), err
        pictures[name] = pixels(f"{name}.png").astype(int)
    assert np.abs(pictures["half"] - pictures["plain"]).max() > 20
    assert np.abs(pictures["half"] - pictures["twice"]).max() <= 1

    record = json.loads(run(capsys, "show", "half.png", "--json")[1])["request"]["loras"]
    assert record[0]["path"] == "style.safetensors" and record[0]["scale"] == 0.5
    assert "style.safetensors" in run(capsys, "show", "half.png")[1]
    assert run(capsys, "edit", "--from", "half.png", SAMPLE, "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pictures["half"])
    shutil.move(style, "elsewhere.safetensors")
    code, _, err = run(capsys, "edit", "--from", "half.png", SAMPLE, "-o", "no.png")
    assert code == 1 and "made with the LoRA style.safetensors, which is not there" in err
    again = ["edit", "--from", "half.png", SAMPLE, "-o", "moved.png", "--lora", "elsewhere.safetensors:0.5"]
    assert run(capsys, *again)[0] == 0 and np.array_equal(pixels("moved.png"), pictures["half"])
    made = ["generate", "a red circle", "--model", "demo", "--steps", "1", "-o", "made.png"]
    assert run(capsys, *made, "--lora", "elsewhere.safetensors")[0] == 0
    code, _, err = run(capsys, *made, "--overwrite", "--lora", "gone.safetensors")
    assert code == 1 and err.splitlines()[-1].startswith("error: gone.safetensors: there is no such file")
    assert run(capsys, *made, "--lora", "elsewhere.safetensors:0")[0] == 2


def test_inspect(style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", "style.safetensors")
    assert code == 0 and "LoRA, PEFT / diffusers" in out and "rank          2" in out
    assert "transformer_blocks.*.norm1.linear" in out and "it does not fit" in out
    assert json.loads(run(capsys, "inspect", "style.safetensors", "--json")[1])["ranks"] == {"2": 3}
    save_file({"transformer.proj_out.lokr_w1": torch.zeros(2, 2)}, style)
    code, out, err = run(capsys, "inspect", "style.safetensors")
    assert (code, out) == (1, "") and "style.safetensors is a LoKr" in err
    width = {"x_embedder.lora_A.weight": torch.zeros(16, 64), "x_embedder.lora_B.weight": torch.zeros(3072, 16)}
    save_file(width, style)
    assert "it fits FLUX.1 Kontext [dev]" in run(capsys, "inspect", "style.safetensors")[1]

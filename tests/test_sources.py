"""One small model in every format people publish, each giving the edit of the original; and files that are refused."""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from PIL import Image
from safetensors.torch import save_file

from mlx_kontext import CheckpointError, KontextPipeline, ModelNotFound, RequestError, convert_checkpoint, disk
from mlx_kontext.backend import tree_flatten
from mlx_kontext.inspection import inspect_model
from mlx_kontext.models.quantized import QuantizedLinear
from mlx_kontext.weights.load import Checkpoint
from mlx_kontext.weights.stored import fp8_table
from tests import reference

Tensors = dict[str, torch.Tensor]
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
# heads of 128 and 64 as in FLUX.1 and CLIP, so that sizes can be read from the tensors; widths that K-quants divide
SHAPE = reference.Shape(
    transformer={"num_attention_heads": 2, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 256, "pooled_projection_dim": 64},
    vae={"block_out_channels": (32, 32, 32, 64), "layers_per_block": 1, "norm_num_groups": 32},
    t5={"d_model": 256, "d_kv": 64, "num_heads": 4, "d_ff": 512, "num_layers": 1},
    clip={"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 128},
    sizes=((64, 64),),
    legacy_end=True,
)


class Model:
    """The original in diffusers' folder, and its tensors under the names of single files."""

    def __init__(self, folder: Path):
        self.folder = folder
        reference.build(folder, SHAPE, 3)
        pipe = reference.load(folder)
        self.theirs: dict[str, Tensors] = {part: getattr(pipe, part).state_dict() for part in PARTS}
        ours_vae = reference.vae_to_ours(pipe.vae)
        self.bfl: dict[str, Tensors] = {
            "transformer": reference.transformer_to_ours(pipe.transformer),
            "vae": {n: v.permute(0, 3, 1, 2) if v.ndim == 4 else v for n, v in ours_vae.items()},
            "text_encoder": {
                "text_model." + n.removeprefix("text_model."): v for n, v in self.theirs["text_encoder"].items()
            },
            "text_encoder_2": {n: v for n, v in self.theirs["text_encoder_2"].items() if "embed_tokens" not in n},
        }
        self.edited = edit(folder)


def edit(model: Any = None, *, loras: tuple[str, ...] | list[str] = (), **options: Any) -> np.ndarray:
    """Latents of a small edit with the model as it is given; parts in files, converted, must give the same, bit for bit."""
    pipe = KontextPipeline.from_pretrained(*([model] if model else []), **options)
    latents = edit_with(pipe, loras)
    if type(pipe.checkpoint) is Checkpoint:
        return latents
    with tempfile.TemporaryDirectory() as name:
        folder = convert_checkpoint(model, Path(name) / "ours", dtype="float32", verify=True, **options)
        assert np.array_equal(edit_with(KontextPipeline.from_pretrained(folder), loras), latents)
    return latents


def edit_with(pipe: KontextPipeline, loras: tuple[str, ...] | list[str]) -> np.ndarray:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    result = pipe(
        picture,
        "make it red",
        seed=1,
        num_inference_steps=2,
        width=64,
        height=64,
        auto_resize=False,
        max_sequence_length=16,
        loras=loras,
    )
    assert not isinstance(result, list)
    return result.latents


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dozens of small models are written here; that they are synced is tested elsewhere."""
    monkeypatch.setattr(disk, "sync", lambda _: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("sources") / "original")


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata)
    return path


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def test_single_files_by_themselves(model: Model, tmp_path: Path) -> None:
    """BFL's transformer and ae.safetensors, and ComfyUI's text encoders: no folder, no config.json."""
    names = {"transformer": "flux1-kontext-dev", "vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5xxl_fp16"}
    files = {part: write(tmp_path / f"{name}.safetensors", model.bfl[part]) for part, name in names.items()}
    assert np.abs(edit(**files, tokenizers=model.folder) - model.edited).max() < 1e-5
    # ae.safetensors lies beside it and is found
    texts = {part: files[part] for part in ("text_encoder", "text_encoder_2")}
    found = KontextPipeline.from_pretrained(files["transformer"], **texts, tokenizers=model.folder)
    assert found.checkpoint.notices == () and found.name == "flux1-kontext-dev.safetensors"
    assert np.abs(edit(files["transformer"], **texts, tokenizers=model.folder) - model.edited).max() < 1e-5


@pytest.mark.parametrize("part", PARTS)
def test_one_part_from_elsewhere(model: Model, tmp_path: Path, part: str) -> None:
    """Over the folder of another model, whose own part differs."""
    other = Path(shutil.copytree(model.folder, tmp_path / "other"))
    wrong = {n: v + 0.5 * torch.ones(()) for n, v in reference.read_tensors(other / part).items()}
    (file,) = (other / part).glob("*.safetensors")
    save_file(wrong, file)
    mine = write(tmp_path / "kontext.safetensors", model.bfl[part])
    assert np.abs(edit(other) - model.edited).max() > 1e-3
    assert np.abs(edit(other, **{part: mine}) - model.edited).max() < 1e-5
    assert np.abs(edit(other, **{part: model.folder / part}) - model.edited).max() < 1e-5  # a folder of shards


def test_all_in_one(model: Model, tmp_path: Path) -> None:
    whole = (
        prefixed("model.diffusion_model.", model.bfl["transformer"])
        | prefixed("vae.", model.bfl["vae"])
        | prefixed("text_encoders.clip_l.transformer.", model.bfl["text_encoder"])
        | prefixed("text_encoders.t5xxl.transformer.", model.bfl["text_encoder_2"])
        | {"text_encoders.clip_l.logit_scale": torch.ones(())}
    )
    file = write(tmp_path / "kontext-all.safetensors", whole)
    assert np.abs(edit(file, tokenizers=model.folder) - model.edited).max() < 1e-5
    with pytest.raises(CheckpointError, match=r"no tokenizer.*--tokenizers DIR"):
        edit(file)


def test_sizes_can_come_from_config(model: Model, tmp_path: Path) -> None:
    """Also the size buckets and the schedule; other heads than FLUX.1's need it."""
    folder = tmp_path / "narrow"
    reference.build(folder, reference.SHAPES["narrow"], 5)
    pipe = reference.load(folder)
    file = write(tmp_path / "kontext.safetensors", reference.transformer_to_ours(pipe.transformer))
    rest = {part: folder / part for part in PARTS[1:]}
    with pytest.raises(CheckpointError, match=r"heads are 24 wide.*--config DIR"):
        KontextPipeline.from_pretrained(file, **rest, tokenizers=folder)
    found = KontextPipeline.from_pretrained(file, **rest, config=folder)
    assert found.sizes == reference.SHAPES["narrow"].sizes
    assert np.abs(edit(file, **rest, config=folder) - edit(folder)).max() < 1e-5


# --- fp8 ---

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("kind", FP8)
def test_every_code_of_fp8(kind: str) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(FP8[kind]).float().numpy()
    assert np.array_equal(fp8_table(f"F8_{kind.upper()}"), theirs, equal_nan=True)


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("scaled", ["plain", "old", "old by rows", "new"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_fp8(model: Model, tmp_path: Path, kind: str, scaled: str, part: str) -> None:
    stored: Tensors = {}
    decoded: Tensors = {}
    for name, value in model.bfl[part].items():
        stem, _, suffix = name.rpartition(".")
        if scaled == "plain":
            stored[name] = value.to(FP8[kind])
            decoded[name] = stored[name].float()
        elif suffix == "weight" and value.ndim == 2 and "bias" not in name and "shared" not in name:
            scale = value.abs().amax(1, keepdim=True) / 400 if scaled == "old by rows" else value.abs().max() / 400
            stored[name] = (value / scale).to(FP8[kind])
            decoded[name] = stored[name].float() * scale
            stored[f"{stem}.weight_scale" if scaled == "new" else f"{stem}.scale_weight"] = scale
            stored[f"{stem}.input_scale" if scaled == "new" else f"{stem}.scale_input"] = torch.ones(())
            if scaled == "new":
                note = json.dumps({"format": "float8_e4m3fn" if kind == "e4m3" else "float8_e5m2"})
                stored[f"{stem}.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
        else:
            stored[name] = decoded[name] = value
    if scaled.startswith("old"):
        stored["scaled_fp8"] = torch.zeros(2, dtype=FP8[kind])
    file = write(tmp_path / f"kontext-fp8-{kind}.safetensors", stored)
    plain = write(tmp_path / "kontext-decoded.safetensors", decoded)
    got = edit(model.folder, **{part: file})
    assert np.abs(got - edit(model.folder, **{part: plain})).max() < 1e-4
    assert np.abs(got - model.edited).max() > 1e-4  # it was really this file
    found = KontextPipeline.from_pretrained(model.folder, **{part: file}).checkpoint
    assert f"fp8 {kind}" in found.format.name and found.parameters(part) == sum(v.numel() for v in decoded.values())


# --- GGUF ---


def write_gguf(path: Path, arch: str, tensors: Tensors, kind: Type) -> tuple[Path, Tensors]:
    """The file, and its tensors as the gguf package dequantizes them."""
    writer, decoded = gguf.GGUFWriter(path, arch), {}
    for name, value in tensors.items():
        array = value.float().numpy()
        quantize = array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 and "rel_b" not in name
        mine = kind if quantize else Type.F32
        k_quant = mine in (Type.Q4_K, Type.Q5_K, Type.Q6_K)  # the package only reads them: sane scales will do
        raw = k_blocks(array, mine) if k_quant else gguf.quants.quantize(array, mine)
        writer.add_tensor(name, raw, raw_dtype=mine)
        decoded[name] = torch.from_numpy(gguf.quants.dequantize(raw, mine).reshape(array.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, decoded


def k_blocks(array: np.ndarray, kind: Type) -> np.ndarray:
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(array.size)
    raw = draw.integers(0, 256, (array.size // numbers, nbytes), np.uint8)
    small = np.full((len(raw), 1), 1e-5, np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        raw[:, -2:] = small
    else:
        raw[:, :2], raw[:, 2:4] = small * 1, np.full((len(raw), 1), 1e-4, np.float16).view(np.uint8)
    return raw.reshape(array.shape[0], -1)


T5_NAMES = {
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    **{f"layer.0.SelfAttention.{x}": f"attn_{x}" for x in "qkvo"},
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}


def llama_names(tensors: Tensors) -> dict[str, str]:
    names = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    for theirs, ours in T5_NAMES.items():
        names[f"encoder.block.0.{theirs}.weight"] = f"enc.blk.0.{ours}.weight"
    return {name: names[name] for name in tensors}


@pytest.mark.parametrize(
    "kind", [Type.F16, Type.BF16, Type.Q4_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
)
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_gguf(model: Model, tmp_path: Path, kind: Type, part: str) -> None:
    names = {name: name for name in model.bfl[part]} if part == "transformer" else llama_names(model.bfl[part])
    arch = "flux" if part == "transformer" else "t5encoder"
    tensors = {names[name]: value for name, value in model.bfl[part].items()}
    file, decoded = write_gguf(tmp_path / "kontext.gguf", arch, tensors, kind)
    plain = write(tmp_path / "kontext.safetensors", {name: decoded[names[name]] for name in names})
    assert np.abs(edit(model.folder, **{part: file}) - edit(model.folder, **{part: plain})).max() < 1e-4
    found = KontextPipeline.from_pretrained(model.folder, **{part: file})
    assert found.checkpoint.parameters(part) == sum(v.numel() for v in tensors.values())
    assert kind.name in found.checkpoint.format.name
    held = sum(x.nbytes for _, x in tree_flatten(found._part(part).parameters()))
    assert held == found._weights[part]


@pytest.mark.parametrize(("kind", "bits", "scales"), [(Type.Q8_0, 8, mx.float16), (Type.Q4_K, 4, mx.float32)])
def test_repacked_scales_are_not_rounded(model: Model, tmp_path: Path, kind: Type, bits: int, scales: mx.Dtype) -> None:
    """In 16 bits too; all of it is counted, and told."""
    file, decoded = write_gguf(tmp_path / "kontext.gguf", "flux", model.bfl["transformer"], kind)
    pipe = KontextPipeline.from_pretrained(model.folder, transformer=file, dtype="bfloat16")
    layer = pipe.flux.double_blocks[0].img_attn.qkv
    assert isinstance(layer, QuantizedLinear) and (layer.bits, layer.group_size) == (bits, 32)
    assert layer.scales.dtype == layer.biases.dtype == scales
    exact = decoded["double_blocks.0.img_attn.qkv.weight"].numpy()
    plain = mx.dequantize(
        layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), layer.group_size, layer.bits
    )
    np.testing.assert_allclose(np.array(plain), exact, rtol=1e-6, atol=1e-9)
    assert sum(x.nbytes for _, x in tree_flatten(pipe.flux.parameters())) == pipe._weights["transformer"]
    found = inspect_model(str(model.folder), "bfloat16", transformer=str(file))
    assert found.quantization == f"{bits}-bit" and found.parts["transformer"].loaded == pipe._weights["transformer"]
    packed = sum(
        v.numel() for n, v in decoded.items() if n.endswith(".weight") and v.ndim == 2 and v.shape[1] % 256 == 0
    )
    assert bits == 8 or found.parts["transformer"].bits == {bits: packed}


def test_lora_on_gguf(model: Model, tmp_path: Path) -> None:
    file, decoded = write_gguf(tmp_path / "kontext.gguf", "flux", model.bfl["transformer"], Type.Q8_0)
    plain = write(tmp_path / "kontext.safetensors", decoded)
    draw = torch.Generator().manual_seed(0)
    lora = {
        f"transformer.transformer_blocks.0.attn.to_q.{name}.weight": torch.randn(shape, generator=draw) / 4
        for name, shape in (("lora_A", (4, 256)), ("lora_B", (256, 4)))
    }
    adapter = write(tmp_path / "lora.safetensors", lora)
    got = edit(model.folder, transformer=file, loras=[str(adapter)])
    assert np.abs(got - edit(model.folder, transformer=plain, loras=[str(adapter)])).max() < 1e-4
    assert np.abs(got - edit(model.folder, transformer=file)).max() > 1e-3


# --- quantized while loading ---


def test_fp8_can_be_quantized(model: Model, tmp_path: Path) -> None:
    """As its decoded version would be; memory is counted so."""
    stored, decoded = dict(model.bfl["transformer"]), dict(model.bfl["transformer"])
    for name in [name for name, value in stored.items() if name.endswith(".weight") and value.ndim == 2]:
        scale = stored[name].abs().max() / 400
        stored[f"{name[:-7]}.scale_weight"] = scale
        stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        decoded[name] = stored[name].float() * scale
    file = write(tmp_path / "kontext-fp8.safetensors", stored)
    plain = write(tmp_path / "kontext.safetensors", decoded)
    got = edit(model.folder, transformer=file, quantize="q8")
    assert np.abs(got - edit(model.folder, transformer=plain, quantize="q8")).max() < 1e-4
    assert np.abs(got - edit(model.folder, transformer=plain)).max() > 1e-5
    pipe = KontextPipeline.from_pretrained(model.folder, transformer=file, quantize="q8")
    assert pipe.quantization == "q8"
    assert sum(x.nbytes for _, x in tree_flatten(pipe.flux.parameters())) == pipe._weights["transformer"]


def test_packed_files_are_not_packed_again(model: Model, tmp_path: Path) -> None:
    file, _ = write_gguf(tmp_path / "kontext.gguf", "flux", model.bfl["transformer"], Type.Q6_K)
    packed = tmp_path / "kontext-4bit.safetensors"
    mx.save_safetensors(str(packed), quantized(model.bfl["transformer"], 64, mixed))
    for path in (file, packed):
        refused("is quantized already", model.folder, transformer=path, quantize="q4", error=RequestError)


def test_parts_over_a_quantized_folder(model: Model, tmp_path: Path) -> None:
    """What stays keeps its packing, what is given by itself needs none."""
    saved = tmp_path / "saved"
    KontextPipeline.from_pretrained(model.folder, quantize="q8").save_pretrained(saved)
    vae = write(tmp_path / "ae.safetensors", model.bfl["vae"])
    assert np.abs(edit(saved, vae=vae) - edit(saved)).max() < 1e-5
    assert (
        np.abs(
            edit(model.folder, transformer=saved / "transformer", text_encoder_2=saved / "text_encoder_2") - edit(saved)
        ).max()
        < 1e-5
    )
    refused("is quantized already", saved, vae=vae, quantize="q4", error=RequestError)
    plain = write(tmp_path / "kontext.safetensors", model.bfl["transformer"])
    whole = edit(saved, transformer=plain, text_encoder_2=model.folder / "text_encoder_2")
    assert np.abs(whole - model.edited).max() < 1e-5


# --- MLX's own quantization, and mflux ---


def quantized(tensors: Tensors, group: int, bits: Callable[[str], int]) -> dict[str, mx.array]:
    """Every matrix that can be, as mx.quantize packs it."""
    out: dict[str, mx.array] = {}
    for name, value in tensors.items():
        array, stem = mx.array(value.numpy()), name.removesuffix(".weight")
        if array.ndim == 2 and name.endswith(".weight") and array.shape[1] % group == 0:
            parts = mx.quantize(array, group, bits(name))
            out |= dict(zip((f"{stem}.weight", f"{stem}.scales", f"{stem}.biases"), parts, strict=True))
        else:
            out[name] = array
    return out


def dequantized(packed: dict[str, mx.array], group: int, bits: Callable[[str], int]) -> Tensors:
    out: Tensors = {}
    for name, value in packed.items():
        stem, _, suffix = name.rpartition(".")
        if f"{stem}.scales" in packed and suffix == "weight":
            value = mx.dequantize(value, packed[f"{stem}.scales"], packed[f"{stem}.biases"], group, bits(name))
        if suffix not in ("scales", "biases"):
            out[name] = torch.from_numpy(np.array(value))
    return out


def mixed(name: str) -> int:
    return 8 if "linear2" in name or "wo" in name else 4


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2"])
def test_quantized_by_mlx_under_our_names(model: Model, tmp_path: Path, part: str, group: int) -> None:
    packed = quantized(model.bfl[part], group, mixed)
    file = tmp_path / "kontext-4bit.safetensors"
    mx.save_safetensors(str(file), packed)
    plain = write(tmp_path / "kontext.safetensors", dequantized(packed, group, mixed))
    assert np.abs(edit(model.folder, **{part: file}) - edit(model.folder, **{part: plain})).max() < 1e-4


def mflux_name(part: str, name: str) -> str:
    if part == "transformer":
        for theirs, ours in ((".net.0.proj.", ".linear1."), (".net.2.", ".linear2.")):
            if ".ff" in name:
                name = name.replace(theirs, ours)
    elif part == "text_encoder_2":
        name = name.replace("encoder.block.", "t5_blocks.").replace("encoder.final", "final")
        name = name.replace(".layer.0.", ".attention.").replace(".layer.1.", ".ff.")
    elif part == "vae":
        for layer in ("conv_in", "conv_out"):
            name = name.replace(f".{layer}.", f".{layer}.conv2d.")
        name = name.replace(".conv_norm_out.", ".conv_norm_out.norm.")
    return name


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_mflux(model: Model, tmp_path: Path, bits: int | None) -> None:
    folder, plain = tmp_path / "mflux", dict[str, Path]()
    for part in PARTS:
        tensors = {n: v for n, v in model.theirs[part].items() if "embed_tokens" not in n}
        tensors = {n: v.permute(0, 2, 3, 1).contiguous() if v.ndim == 4 else v for n, v in tensors.items()}
        packed = (
            quantized(tensors, 64, lambda _: bits or 0)
            if bits
            else {n: mx.array(v.numpy()) for n, v in tensors.items()}
        )
        back = dequantized(packed, 64, lambda _: bits or 0)
        back = {n: v.permute(0, 3, 1, 2) if v.ndim == 4 else v for n, v in back.items()}
        plain[part] = write(tmp_path / f"kontext-{part}.safetensors", back)
        mine = {mflux_name(part, n): v for n, v in packed.items()}
        half = len(mine) // 2
        (folder / part).mkdir(parents=True)
        notes = {"mflux_version": "0.9.0", "quantization_level": str(bits)}
        for i, shard in enumerate([dict(list(mine.items())[:half]), dict(list(mine.items())[half:])]):
            mx.save_safetensors(str(folder / part / f"{i}.safetensors"), shard, notes)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model.folder / name, folder / name)
    got = edit(folder)
    assert np.abs(got - edit(**plain, tokenizers=model.folder)).max() < 1e-4
    assert (np.abs(got - model.edited).max() < 1e-5) == (bits is None)


# --- refused ---


def header(path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None) -> Path:
    """A sound safetensors file of zeros."""
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "U32": 4, "I32": 4}
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * sizes[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


QKV = "double_blocks.0.img_attn.qkv.weight"
BASE = {QKV: ("BF16", [6, 2]), "guidance_in.in_layer.weight": ("BF16", [2, 2]), "img_in.weight": ("BF16", [2, 64])}
COMFY = {f"{QKV[:-7]}.weight_scale": ("F32", []), QKV: ("U8", [6, 2])}
REFUSED: dict[str, tuple[dict[str, tuple[str, list[int]]], dict[str, str] | None, str]] = {
    "nunchaku": ({"transformer_blocks.0.qkv_proj.wscales": ("BF16", [2])}, None, "SVDQuant.*take a bf16, fp8 or GGUF"),
    "nunchaku by metadata": (BASE, {"quantization_config": '{"weight": {"dtype": "int4"}}'}, "SVDQuant"),
    "nvfp4": (BASE, {"_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}'}, "nvfp4.*fp8_scaled or bf16"),
    "convrot": (
        BASE,
        {"_quantization_metadata": '{"layers": {"a": {"format": "int8_tensorwise", "convrot": true}}}'},
        "int8_tensorwise with convrot",
    ),
    "notes damaged": (BASE, {"_quantization_metadata": '{"layers": [1]}'}, "not what ComfyUI writes"),
    "nf4": (BASE | {f"{QKV}.quant_state.bitsandbytes__nf4": ("U8", [9])}, None, r"bitsandbytes \(nf4.*GGUF"),
    "int8": (BASE | {f"{QKV[:-7]}.SCB": ("F32", [6]), QKV: ("I8", [6, 2])}, None, r"bitsandbytes \(int8"),
    "quanto": ({"a._data": ("I8", [2]), "a._scale": ("F32", [1])}, None, "quanto"),
    "GPTQ": (BASE | {"a.qzeros": ("I32", [2])}, None, "GPTQ"),
    "schnell": ({k: v for k, v in BASE.items() if "guidance" not in k}, None, "schnell"),
    "Fill": (BASE | {"img_in.weight": ("BF16", [2, 384])}, None, "Fill.*384"),
    "Canny": (BASE | {"img_in.weight": ("BF16", [2, 128])}, None, "Canny or Depth"),
    "Chroma": (BASE | {"distilled_guidance_layer.in_proj.weight": ("BF16", [2])}, None, "Chroma"),
    "FLUX.2": (BASE | {"double_stream_modulation_img.lin.weight": ("BF16", [2])}, None, r"FLUX\.2"),
    "ControlNet": (BASE | {"controlnet_blocks.0.weight": ("BF16", [2])}, None, "ControlNet"),
    "LoRA": ({"transformer.x.lora_A.weight": ("BF16", [2])}, None, "a LoRA"),
    "something else": ({"a.weight": ("F32", [2])}, None, r"holds a\.weight"),
    "scale missing": (BASE | {QKV: ("F8_E4M3", [6, 2]), "scaled_fp8": ("F8_E4M3", [2])}, None, "scale_weight.*missing"),
    "scale misshaped": (
        BASE | {QKV: ("F8_E4M3", [6, 2]), f"{QKV[:-7]}.scale_weight": ("F32", [5])},
        None,
        "one for each of 6 rows",
    ),
    "biases missing": (BASE | {QKV: ("U32", [6, 2]), f"{QKV[:-7]}.scales": ("F32", [6, 1])}, None, "biases is missing"),
    "odd dtype": (BASE | COMFY, None, "is U8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors, metadata, told = REFUSED[name]
    file = header(tmp_path / "model.safetensors", tensors, metadata)
    refused(told, file)
    refused(told, "demo", transformer=file)


def refused(told: str, *args: Any, error: type[Exception] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error, match=told) as caught:
        edit(*args, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_part_alone_names_what_is_missing(model: Model, tmp_path: Path) -> None:
    file = write(tmp_path / "kontext.safetensors", model.bfl["transformer"])
    refused(r"VAE and CLIP-L and T5 missing; give --vae ae\.safetensors, --clip .*, --t5 ", file)
    refused("holds a FLUX transformer and was given as the VAE; give it with --transformer", model.folder, vae=file)
    refused("vae is 'nowhere'", model.folder, vae="nowhere", error=ModelNotFound)


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "pt"])
@pytest.mark.parametrize(
    ("content", "told"), [(b"PK\3\4" + bytes(600), "zip"), (b"\x80\2}q\0." + b"\xff" * 600, "pickle")]
)
def test_pickles_under_any_name(model: Model, tmp_path: Path, suffix: str, content: bytes, told: str) -> None:
    file = tmp_path / f"kontext.{suffix}"
    file.write_bytes(content)
    refused(told, file)
    refused(told, model.folder, vae=file)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(model: Model, tmp_path: Path, number: float) -> None:
    tensors = dict(model.bfl["transformer"]) | {"img_in.scale_weight": torch.tensor(number)}
    tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.float8_e4m3fn)
    refused(
        "img_in.scale_weight.*not a finite", model.folder, transformer=write(tmp_path / "kontext.safetensors", tensors)
    )


def test_wrong_shapes_in_one_line(model: Model, tmp_path: Path) -> None:
    tensors = dict(model.bfl["transformer"])
    tensors["double_blocks.0.img_attn.proj.weight"] = torch.zeros(255, 256)
    file = write(tmp_path / "kontext.safetensors", tensors)
    refused(r"img_attn\.proj\.weight \(255, 256\) instead of \(256, 256\)", model.folder, transformer=file)
    del tensors["double_blocks.0.img_attn.norm.query_norm.scale"]
    parts = {part: model.folder / part for part in PARTS[1:]}
    refused("1 tensor missing", write(tmp_path / "b.safetensors", tensors), **parts, tokenizers=model.folder)
    packed = quantized(model.bfl["transformer"], 64, lambda _: 4)
    packed["double_blocks.0.img_attn.proj.scales"] = mx.zeros((256, 3))
    mx.save_safetensors(str(tmp_path / "c.safetensors"), packed)
    refused("img_attn.proj is packed as", model.folder, transformer=tmp_path / "c.safetensors")


def test_dev_and_krea_are_told(model: Model, tmp_path: Path) -> None:
    for name, told in (
        ("flux1-krea-dev", "Krea"),
        ("flux1-dev", r"\[dev\], which was not"),
        ("mine", "nothing in mine"),
    ):
        file = write(tmp_path / f"{name}.safetensors", model.bfl["transformer"])
        (notice,) = KontextPipeline.from_pretrained(model.folder, transformer=file).checkpoint.notices
        assert told.replace("\\", "") in notice


def test_inspection_counts_what_is_stored(model: Model, tmp_path: Path) -> None:
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in model.bfl["transformer"].items()}
    file = write(tmp_path / "kontext.safetensors", tensors)
    found = inspect_model(str(model.folder), transformer=str(file))
    plain = inspect_model(str(model.folder))
    assert found.parts["transformer"].parameters == plain.parts["transformer"].parameters
    assert found.parts["transformer"].bytes == plain.parts["transformer"].bytes // 4
    assert found.plan.weights == plain.plan.weights  # decoded, it is as large as any

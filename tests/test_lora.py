"""LoRA: one random change in every spelling gives one picture, the one that diffusers gives; attached, taken off, merged."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from diffusers import FluxKontextPipeline
from peft import LoraConfig, get_peft_model_state_dict
from reference import SHAPES, Tensors, swap_halves
from safetensors.torch import load_file, save_file

from mlx_kontext import AdapterError, EditRequest, EditResult, KontextPipeline
from mlx_kontext.backend import mx, nn, tree_flatten
from mlx_kontext.inspection import inspect_adapter, is_adapter
from mlx_kontext.lora import Adapter, attach, delta, detach, fuse, read_adapter
from mlx_kontext.models.flux import Flux
from mlx_kontext.models.quantized import QuantizedLinear
from mlx_kontext.quantize import Scheme
from mlx_kontext.weights.load import Checkpoint, fill

SHAPE = SHAPES["spec"]
RANK, ALPHA = 4, 2.0
EDIT: dict[str, Any] = {"prompt": "make the red car blue, please", "num_inference_steps": 2, "max_sequence_length": 24}
SIZE = (80, 64)
LATENTS = np.random.RandomState(5).standard_normal((1, SIZE[0] * SIZE[1] // 256, 64)).astype(np.float32)
PHOTO = np.random.RandomState(6).randint(0, 255, (100, 150, 3), np.uint8)

Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""diffusers' name of a linear layer -> A [r, in] and B [out, r]."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "model"
    reference.build(path, SHAPE, 3)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> KontextPipeline:
    return KontextPipeline.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def matrices(folder: Path) -> Matrices:
    """A change of every linear layer that diffusers' transformer has."""
    return random_matrices(folder, 7)


def random_matrices(folder: Path, seed: int) -> Matrices:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in reference.load(folder).transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            a = torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5
            found[name] = (a, torch.randn(layer.out_features, RANK, generator=generator) / 2)
    return found


def edit(pipe: KontextPipeline, *loras: Any, **options: Any) -> EditResult:
    width, height = SIZE
    return pipe(image=PHOTO, width=width, height=height, latents=LATENTS, loras=loras, **EDIT, **options)


def theirs(pipe: Any) -> np.ndarray:
    """Latents of the same edit in diffusers."""
    from PIL import Image

    return reference.run(
        pipe, image=Image.fromarray(PHOTO), size=SIZE, sizes=SHAPE.sizes, latents=LATENTS, guidance_scale=2.5, **EDIT
    )["latents"]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- the spellings, written down here from the trainers' files and not from mlx_kontext ---


def layers() -> dict[str, list[str]]:
    """BFL layer -> diffusers' layers that lie in it, top to bottom."""
    names = reference.transformer_names(SHAPE.transformer["num_layers"], SHAPE.transformer["num_single_layers"])
    return {
        bfl.removesuffix(".weight"): [part.removesuffix(".weight") for part in parts]
        for bfl, parts in names.items()
        if bfl.endswith(".weight")
    }


def over_bfl(matrices: Matrices) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """The same change on BFL's fused layers: A stacked, B block-diagonal, alpha so that alpha / r stays what it was."""
    found = {}
    for bfl, parts in layers().items():
        a = torch.cat([matrices[part][0] for part in parts])
        b = torch.block_diag(*(matrices[part][1] for part in parts))
        found[bfl] = (a, swap_halves(f"{bfl}.weight", b).contiguous(), ALPHA * len(parts))
    return found


def diffusers_names(matrices: Matrices, prefix: str, middle: str, alpha: bool = True) -> Tensors:
    tensors = {}
    for name, (a, b) in matrices.items():
        tensors |= {f"{prefix}{name}.lora_A{middle}.weight": a, f"{prefix}{name}.lora_B{middle}.weight": b}
        tensors |= {f"{prefix}{name}.alpha": torch.tensor(ALPHA)} if alpha else {}
    return tensors


def bfl_names(matrices: Matrices, prefix: str, flat: bool, down: str, up: str, alpha: bool = True) -> Tensors:
    tensors = {}
    for name, (a, b, size) in over_bfl(matrices).items():
        stem = prefix + (name.replace(".", "_") if flat else name)
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b if alpha else b * (ALPHA / RANK)}
        tensors |= {f"{stem}.alpha": torch.tensor(size)} if alpha else {}
    return tensors


def flattened_diffusers(matrices: Matrices, prefix: str) -> Tensors:
    tensors = {}
    for name, (a, b) in matrices.items():
        stem = prefix + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor([ALPHA])}
    return tensors


METADATA = {"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_mlp": ALPHA}}
SPELLINGS: dict[str, tuple[str, Callable[[Matrices], Tensors]]] = {
    "PEFT, diffusers": ("PEFT / diffusers", lambda m: diffusers_names(m, "transformer.", "")),
    "without prefix": ("PEFT / diffusers", lambda m: diffusers_names(m, "", "")),
    "with .default": ("PEFT / diffusers", lambda m: diffusers_names(m, "transformer.", ".default")),
    "PEFT around diffusers": ("PEFT / diffusers", lambda m: diffusers_names(m, "base_model.model.", "")),
    "kohya": ("kohya", lambda m: bfl_names(m, "lora_unet_", True, "lora_down", "lora_up")),
    "ComfyUI, A and B": ("ComfyUI (BFL names)", lambda m: bfl_names(m, "diffusion_model.", False, "lora_A", "lora_B")),
    "ComfyUI, down and up": (
        "ComfyUI (BFL names)",
        lambda m: bfl_names(m, "diffusion_model.", False, "lora_down", "lora_up"),
    ),
    "fal": (
        "fal (PEFT over BFL names)",
        lambda m: bfl_names(m, "base_model.model.", False, "lora_A", "lora_B", alpha=False),
    ),
    "bare BFL": ("BFL names", lambda m: bfl_names(m, "", False, "lora_A", "lora_B")),
    "flattened diffusers": ("flattened diffusers names", lambda m: flattened_diffusers(m, "lora_unet_")),
    "SimpleTuner": ("flattened diffusers names", lambda m: flattened_diffusers(m, "lycoris_")),
}


@pytest.fixture(scope="module")
def peft_file(folder: Path, matrices: Matrices, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by diffusers and peft themselves, alpha in the metadata."""
    transformer = reference.load(folder).transformer
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(matrices))
    transformer.add_adapter(config)
    for name, (a, b) in matrices.items():
        layer = transformer.get_submodule(name)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    place = tmp_path_factory.mktemp("peft")
    FluxKontextPipeline.save_lora_weights(
        place,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata={"r": RANK, "lora_alpha": ALPHA, "target_modules": list(matrices)},
    )
    return place / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def expected(folder: Path, peft_file: Path) -> np.ndarray:
    """Latents with the file loaded by diffusers and peft."""
    pipe = reference.load(folder)
    plain = theirs(pipe)
    pipe.load_lora_weights(peft_file)
    latents = theirs(pipe)
    assert error(plain, latents) > 0.1, "a LoRA that changes nothing tests nothing"
    return latents


@pytest.fixture(scope="module")
def ours(pipe: KontextPipeline, peft_file: Path) -> np.ndarray:
    """Latents with the file that diffusers and peft wrote, loaded by us."""
    return edit(pipe, peft_file).latents


def test_diffusers_own_file(folder: Path, pipe: KontextPipeline, expected: np.ndarray, ours: np.ndarray) -> None:
    """As close as the two are without a LoRA: 1e-4 there (test_parity.py)."""
    assert error(ours, expected) < 1e-4


def test_weights_merged_by_hand(folder: Path, matrices: Matrices, expected: np.ndarray) -> None:
    """So that the test does not hang on how diffusers reads a file."""
    merged = reference.load(folder)
    for name, (a, b) in matrices.items():
        merged.transformer.get_submodule(name).weight += ALPHA / RANK * b @ a
    assert error(theirs(merged), expected) < 1e-5


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_edit(
    name: str, pipe: KontextPipeline, matrices: Matrices, ours: np.ndarray, tmp_path: Path
) -> None:
    form, write = SPELLINGS[name]
    path = tmp_path / "lora.safetensors"
    save_file(write(matrices), path)
    assert error(edit(pipe, path).latents, ours) < 1e-5
    found = inspect_adapter(str(path))
    assert found.format == form and found.misfit is not None  # of the full-size model
    assert form in found.page() and sum(found.targets.values()) in (len(matrices), len(layers()))


def test_xlabs(pipe: KontextPipeline, matrices: Matrices, tmp_path: Path) -> None:
    """Attention only, no alpha; in single blocks the q, k, v rows of linear1, and linear2."""
    fused, xlabs, subset = over_bfl(matrices), {}, {}
    for i in range(SHAPE.transformer["num_layers"]):
        for stream, number in (("img", "1"), ("txt", "2")):
            for layer in ("qkv", "proj"):
                a, b, _ = fused[f"double_blocks.{i}.{stream}_attn.{layer}"]
                stem = f"double_blocks.{i}.processor.{layer}_lora{number}"
                xlabs |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b * (ALPHA / RANK)}
                subset |= dict.fromkeys(layers()[f"double_blocks.{i}.{stream}_attn.{layer}"])
    for i in range(SHAPE.transformer["num_single_layers"]):
        parts = layers()[f"single_blocks.{i}.linear1"][:3]
        a, b = (
            torch.cat([matrices[p][0] for p in parts]),
            torch.block_diag(*(matrices[p][1] for p in parts)) * (ALPHA / RANK),
        )
        stem = f"single_blocks.{i}.processor"
        xlabs |= {f"{stem}.qkv_lora.down.weight": a, f"{stem}.qkv_lora.up.weight": b}
        a, b, _ = fused[f"single_blocks.{i}.linear2"]
        xlabs |= {f"{stem}.proj_lora.down.weight": a, f"{stem}.proj_lora.up.weight": b * (ALPHA / RANK)}
        subset |= dict.fromkeys([*parts, *layers()[f"single_blocks.{i}.linear2"]])
    save_file(xlabs, tmp_path / "xlabs.safetensors")
    some = {name: matrices[name] for name in subset}
    save_file(diffusers_names(some, "transformer.", ""), tmp_path / "peft.safetensors")
    latents = [edit(pipe, tmp_path / f"{name}.safetensors").latents for name in ("xlabs", "peft")]
    assert error(*latents) < 1e-5
    assert inspect_adapter(str(tmp_path / "xlabs.safetensors")).format == "XLabs"


# --- scale, alpha, several ---


def test_alpha_of_the_metadata(pipe: KontextPipeline, matrices: Matrices, tmp_path: Path) -> None:
    """alpha / r, a pattern for some modules, rank-stabilised alpha / sqrt(r), and 1 where nothing is said."""
    path, tensors = tmp_path / "lora.safetensors", diffusers_names(matrices, "transformer.", "", alpha=False)
    found = {}
    for name, metadata in {
        "none": None,
        "pattern": METADATA,
        "rslora": {"transformer.r": RANK, "transformer.lora_alpha": 3, "transformer.use_rslora": True},
    }.items():
        save_file(tensors, path, metadata and {"lora_adapter_metadata": json.dumps(metadata)})
        branches = read(path, pipe).branches
        found[name] = {target: branch.gain.tolist() for target, branch in branches.items()}
    assert {x for gains in found["none"].values() for x in gains} == {1.0}
    assert found["pattern"]["single_blocks.0.linear1"] == [2.0] * 12 + [0.5] * 4
    assert found["rslora"]["img_in"] == [1.5] * 4


def test_scales_and_sums(pipe: KontextPipeline, folder: Path, matrices: Matrices, tmp_path: Path) -> None:
    one, two, both = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "both"))
    other = random_matrices(folder, 8)
    save_file(diffusers_names(matrices, "transformer.", ""), one)
    save_file(bfl_names(other, "lora_unet_", True, "lora_down", "lora_up"), two)
    joined = {
        name: (torch.cat([a, other[name][0]]), torch.cat([0.7 * b, -0.4 * other[name][1]], dim=1))
        for name, (a, b) in matrices.items()
    }
    tensors = diffusers_names(joined, "transformer.", "", alpha=False)
    save_file({n: t * (ALPHA / RANK) if "lora_B" in n else t for n, t in tensors.items()}, both)
    expected = edit(pipe, both).latents
    assert error(edit(pipe, f"{one}:0.7", (two, -0.4)).latents, expected) < 1e-5
    assert error(edit(pipe, (two, -0.4), (one, 0.7)).latents, expected) < 1e-5
    assert error(edit(pipe, (one, 0.7)).latents, expected) > 0.01


def test_members_of_a_fused_layer_may_be_missing(pipe: KontextPipeline, matrices: Matrices, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    some = {n: m for n, m in matrices.items() if n.endswith(("attn.to_k", "attn.add_v_proj", "attn.to_q", ".proj_mlp"))}
    save_file(diffusers_names(some, "transformer.", ""), path)
    adapter = read(path, pipe)
    width = SHAPE.transformer["num_attention_heads"] * SHAPE.transformer["attention_head_dim"]
    change = np.array(adapter.branches["double_blocks.0.txt_attn.qkv"].delta(1))
    a, b = matrices["transformer_blocks.0.attn.add_v_proj"]
    assert not change[: 2 * width].any() and np.allclose(change[2 * width :], (b @ a / 2).numpy(), atol=1e-6)
    x = mx.random.normal((3, 5, width))
    for name in ("double_blocks.1.img_attn.qkv", "single_blocks.2.linear1", "double_blocks.0.txt_attn.qkv"):
        branch = adapter.branches[name]
        side, merged = branch(x, 0.3), x @ branch.delta(0.3).T
        assert side.shape == merged.shape and float(mx.abs(side - merged).max()) < 1e-5


# --- attached, detached, fused, quantized ---


def read(path: Path, pipe: KontextPipeline) -> Adapter:
    return read_adapter(path, pipe.checkpoint.config("transformer"), mx.float32)


def model(pipe: KontextPipeline) -> Flux:
    return pipe.checkpoint.model("transformer", mx.float32)


def velocity(flux: Flux) -> np.ndarray:
    """One pass over fixed inputs, modulation included."""
    random = np.random.RandomState(9)
    txt, vec = (mx.array(random.standard_normal(shape).astype(np.float32)) for shape in ((1, 7, 64), (1, 64)))
    pe = flux.rope(mx.array(random.randint(0, 9, (7 + 20, 3))))
    modulation = flux.modulation(mx.array([0.6]), 2.5, vec)
    return np.array(flux(mx.array(LATENTS), txt, pe, modulation.at(0)))


def test_detached_is_bit_equal(pipe: KontextPipeline, peft_file: Path) -> None:
    flux, adapter = model(pipe), read(peft_file, pipe)
    before, plain = dict(tree_flatten(flux.parameters())), velocity(flux)
    copies = {name: np.array(value) for name, value in before.items()}
    attach(flux, [(adapter, 1.0), (adapter, -0.3)])
    assert error(velocity(flux), plain) > 0.1
    attached = dict(tree_flatten(flux.parameters()))
    assert attached.keys() == before.keys() and all(attached[name] is before[name] for name in before)
    fill(flux, dict(before), mx.float32, "here")  # strict loading sees no difference
    detach(flux)
    assert all(np.array_equal(copies[n], v) for n, v in tree_flatten(flux.parameters()))
    assert np.array_equal(velocity(flux), plain)
    assert {type(layer) for layer in flux.modules() if "inear" in type(layer).__name__} >= {nn.Linear}
    assert not any(hasattr(layer, "side") for layer in flux.modules())


def test_fused_equals_attached(pipe: KontextPipeline, peft_file: Path) -> None:
    flux, adapter = model(pipe), read(peft_file, pipe)
    attach(flux, [(adapter, 0.8)])
    attached, merged = velocity(flux), model(pipe)
    tensors = fuse(pipe.checkpoint.tensors("transformer"), [(adapter, 0.8)])
    fill(merged, tensors, mx.float32, "here")
    assert error(velocity(merged), attached) < 1e-5
    assert delta([(adapter, 0.8)], "img_in.bias") is None and delta([(adapter, 0.8)], "img_in") is None
    half = {"img_in.weight": tensors["img_in.weight"].astype(mx.bfloat16)}
    assert fuse(half, [(adapter, 0.8)])["img_in.weight"].dtype == mx.bfloat16
    with pytest.raises(AdapterError, match=r"img_in.weight is quantized \(mlx.core.uint32\); add a LoRA"):
        fuse({"img_in.weight": mx.zeros((128, 8), mx.uint32)}, [(adapter, 0.8)])


def test_over_8_bits_the_error_is_that_of_8_bits(pipe: KontextPipeline, peft_file: Path) -> None:
    adapters = [(read(peft_file, pipe), 0.3)]
    packed = Checkpoint.open(pipe.checkpoint.folder, Scheme.of(8))
    whole, eight = model(pipe), packed.model("transformer", mx.float32)
    assert any(isinstance(layer, QuantizedLinear) for layer in eight.modules())
    names = [name for name, _ in tree_flatten(eight.parameters())]
    restored = fuse(weights(eight), adapters)
    without, plain = rms(velocity(eight), velocity(whole)), velocity(eight)
    attach(whole, adapters)
    attach(eight, adapters)
    within, attached = rms(velocity(eight), velocity(whole)), velocity(eight)
    assert [name for name, _ in tree_flatten(eight.parameters())] == names
    assert 0 < within < 1.25 * without < 0.02, (within, without)

    # And exactly: it is the model of the 8-bit weights with the whole change added, nothing of which is rounded to 8 bits.
    exact = model(pipe)
    exact.load_weights(list(restored.items()), strict=False)
    assert error(attached, velocity(exact)) < 1e-5
    detach(eight)
    assert np.array_equal(velocity(eight), plain)
    assert not any(hasattr(layer, "side") for layer in eight.modules())


def weights(flux: Flux) -> dict[str, mx.array]:
    """Matrices of every linear layer, those in 8 bits as what they stand for, in fp32."""
    layers = {name: layer for name, layer in flux.named_modules() if isinstance(layer, nn.Linear | QuantizedLinear)}
    return {
        f"{name}.weight": layer.unpacked() if isinstance(layer, QuantizedLinear) else layer.weight
        for name, layer in layers.items()
    }


def rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_sixteen_bits(dtype: str, folder: Path, peft_file: Path) -> None:
    half = KontextPipeline.from_pretrained(folder, dtype=dtype)
    result = edit(half, peft_file)
    assert np.isfinite(result.latents).all()
    flux = half.flux_with(half._loras.read(result.request.loras, []))
    layer = flux.single_blocks[0].linear1
    assert layer(mx.ones((1, 2, 128), half.dtype)).dtype == layer.side.branches[0][0].a.dtype == half.dtype


# --- in the pipeline ---


def test_a_lora_lasts_one_edit(pipe: KontextPipeline, peft_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = edit(pipe)
    first = edit(pipe, peft_file)
    monkeypatch.setattr("mlx_kontext.lora.read_adapter", lambda *_: pytest.fail("read again"))
    assert np.array_equal(edit(pipe, peft_file).latents, first.latents)
    assert error(edit(pipe, (peft_file, 0.5)).latents, first.latents) > 0.01
    assert np.array_equal(edit(pipe).latents, plain.latents)
    pipe.release("transformer")
    assert np.array_equal(edit(pipe).latents, plain.latents)


def test_two_streams_at_once(pipe: KontextPipeline, peft_file: Path) -> None:
    plain, changed = edit(pipe), edit(pipe, peft_file)
    common = {"image": PHOTO, "width": SIZE[0], "height": SIZE[1], "latents": LATENTS} | EDIT
    pair = [pipe.stream(**common), pipe.stream(**common, loras=[peft_file])]
    steps = [[next(stream) for stream in pair] for _ in range(EDIT["num_inference_steps"])]
    assert np.array_equal(steps[-1][0].result.latents, plain.latents)
    assert np.array_equal(steps[-1][1].result.latents, changed.latents)
    assert not any(hasattr(layer, "side") for layer in pipe.flux.modules())  # `flux` is the model without


def test_a_result_remembers_its_loras(pipe: KontextPipeline, peft_file: Path, tmp_path: Path) -> None:
    result = edit(pipe, (peft_file, 0.5))
    (lora,) = result.request.loras
    assert (lora.path, lora.scale, len(lora.sha256)) == (str(peft_file), 0.5, 64)
    assert np.array_equal(pipe(result.request).latents, result.latents)
    assert result.to_json()["request"]["loras"] == [{"path": peft_file.name, "scale": 0.5, "sha256": lora.sha256}]
    stored = json.loads(json.dumps(result.request.to_json()))
    again = EditRequest.from_json(stored, image=PHOTO, latents=LATENTS)
    assert again.loras == result.request.loras and np.array_equal(pipe(again).latents, result.latents)
    other = dataclasses.replace(lora, sha256="0" * 64)
    with pytest.raises(AdapterError, match="is not the LoRA this edit was made with"):
        edit(pipe, other)
    for name in ("gone.safetensors", "x" * 5000 + ":1", "~nobody/x.safetensors"):
        with pytest.raises(AdapterError, match=r"there is no such file|cannot be read"):
            edit(pipe, name)
    with pytest.raises(AdapterError, match=r"made with the LoRA gone.safetensors, which is not there"):
        edit(pipe, dataclasses.replace(lora, path="gone.safetensors"))


def test_the_plan_counts_adapters(pipe: KontextPipeline, peft_file: Path) -> None:
    adapter = read(peft_file, pipe)
    plain, more = (pipe.plan(64, 64, None, None, chosen) for chosen in ((), [(adapter, 1.0)]))
    assert more.denoise - plain.denoise == adapter.nbytes > 0


def test_hyper_flux_is_told_of_its_scale(pipe: KontextPipeline, peft_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(peft_file, tmp_path / "Hyper-FLUX.1-dev-8steps-lora.safetensors"))
    assert any("0.125" in notice for notice in edit(pipe, path).notices)
    assert not any("0.125" in notice for notice in edit(pipe, (path, 0.125)).notices)


def test_text_encoder_parts_are_told_and_left_out(
    pipe: KontextPipeline, matrices: Matrices, ours: np.ndarray, tmp_path: Path
) -> None:
    path, tensors = tmp_path / "lora.safetensors", SPELLINGS["kohya"][1](matrices)
    text = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 64),
        "lora_te3_encoder_block_0.lora_up.weight": torch.zeros(4, 64),
        "text_encoder_2.encoder.block.0.lora_A.weight": torch.zeros(4, 64),
    }
    save_file(tensors | text, path)
    result = edit(pipe, path)
    assert "lora.safetensors: 3 tensors for the text encoders are left out; the rest is applied" in result.notices
    assert error(result.latents, ours) < 1e-5
    assert inspect_adapter(str(path)).text == 3
    save_file(text, path)
    with pytest.raises(AdapterError, match="tensors for text encoders only; expected a LoRA for the transformer"):
        edit(pipe, path)


def test_is_adapter(peft_file: Path, folder: Path, tmp_path: Path) -> None:
    assert is_adapter(str(peft_file))
    assert not is_adapter("demo") and not is_adapter(str(folder))
    assert not is_adapter(str(next((folder / "vae").glob("*.safetensors"))))
    found = inspect_adapter(str(peft_file))
    assert found.ranks == {RANK: len(load_file(peft_file)) // 2} and found.bytes == sum(
        4 * t.numel() for t in load_file(peft_file).values()
    )
    assert found.targets["transformer_blocks.*.attn.to_q"] == 2 and json.dumps(found.to_json())

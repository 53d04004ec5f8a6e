"""The models at the size of FLUX.1 Kontext [dev]: their tensors by name and shape, and one block of each kind by number."""

import json
import subprocess
import sys
from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import reference
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mlx_kontext.backend import mx
from mlx_kontext.models.flux import Flux, FluxConfig

Shapes = dict[str, tuple[int, ...]]

BUILD = """
import json, resource, sys
from mlx_kontext.backend import mx, tree_flatten
from mlx_kontext.models.clip import CLIPConfig, CLIPText
from mlx_kontext.models.flux import Flux, FluxConfig
from mlx_kontext.models.t5 import T5Config, T5Encoder
from mlx_kontext.models.vae import AutoEncoder, VAEConfig

def peak():  # MB; Linux counts in kB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

mx.eval(mx.zeros((8, 8)) @ mx.zeros((8, 8)))  # what the first computation of a process takes is not the models'
before = peak()
models = {
    "transformer": Flux(FluxConfig()),
    "vae": AutoEncoder(VAEConfig()),
    "text_encoder_2": T5Encoder(T5Config()),
    "text_encoder": CLIPText(CLIPConfig()),
}
shapes = {part: {name: value.shape for name, value in tree_flatten(model.parameters())} for part, model in models.items()}
print(json.dumps({"shapes": shapes, "grown": peak() - before}))
"""


@pytest.fixture(scope="module")
def ours() -> dict[str, Shapes]:
    """Part -> tensor name -> shape of our models with their default configuration, built in a process of their own.

    Nothing may be allocated for it: the parameters together would take 66 GB.
    """
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert built["grown"] < 200, "building the models took memory: something is evaluated"
    return {part: {name: tuple(shape) for name, shape in shapes.items()} for part, shapes in built["shapes"].items()}


def transformer() -> reference.Tensors:
    return reference.transformer_to_ours(
        FluxTransformer2DModel(guidance_embeds=True)
    )  # its other defaults are FLUX.1's


def vae() -> reference.Tensors:
    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return reference.vae_to_ours(model)


def t5() -> reference.Tensors:
    """T5 v1.1 XXL, the encoder; the embedding that transformers lists twice is stored once."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    states = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).state_dict()
    states.pop("encoder.embed_tokens.weight", None)
    return states


def clip() -> reference.Tensors:
    """CLIP ViT-L/14, the text tower, with the prefix of the published files that transformers 5 has dropped."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    states = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes)).state_dict()
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in states.items()}


@pytest.mark.parametrize(
    ("part", "published", "tensors", "parameters"),
    [
        ("transformer", transformer, 780, 11_901_408_320),
        ("vae", vae, 244, 83_819_683),
        ("text_encoder_2", t5, 219, 4_762_310_656),
        ("text_encoder", clip, 196, 123_060_480),
    ],
    ids=["transformer", "VAE", "T5-XXL", "CLIP-L"],
)
def test_tensors_are_the_published_ones(
    part: str, published: Callable[[], reference.Tensors], tensors: int, parameters: int, ours: dict[str, Shapes]
) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in published().items()}
    assert ours[part] == expected
    assert len(ours[part]) == tensors
    assert sum(map(prod, ours[part].values())) == parameters


# --- one block of each kind, 3072 wide ---

TEXT, ROWS, COLUMNS = 64, 16, 14
"""64 text tokens, and 16 x 14 each of target and reference: 512 together."""


@pytest.fixture(scope="module")
def flux() -> Flux:
    """A full-width model of one double and one single block. Only the blocks' weights are ever filled in."""
    return Flux(FluxConfig(num_layers=1, num_single_layers=1))


@pytest.fixture(scope="module")
def rope(flux: Flux) -> tuple[tuple[torch.Tensor, torch.Tensor], mx.array]:
    """Rotations of text, target and reference tokens: diffusers' cos and sin, and ours of the same ids."""
    grid = np.stack(np.meshgrid(np.arange(ROWS), np.arange(COLUMNS), indexing="ij"), axis=-1).reshape(-1, 2)
    ids = np.zeros((TEXT + 2 * len(grid), 3), np.int32)
    ids[TEXT:, 1:] = np.tile(grid, (2, 1))
    ids[TEXT + len(grid) :, 0] = 1
    return FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(torch.from_numpy(ids).float()), flux.rope(mx.array(ids))


def random_block(block: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        module = block(dim=3072, num_attention_heads=24, attention_head_dim=128)
    module.to_empty(device="cpu")
    reference.randomise(module, torch.Generator().manual_seed(3))
    return module


def inputs(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def to_mx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.numpy())


def fill(flux: Flux, ours: str, theirs: str, block: torch.nn.Module) -> None:
    """Put the tensors of diffusers' block into ours, by the independent table of names."""
    states = block.state_dict()
    names = {name: parts for name, parts in reference.transformer_names(1, 1).items() if name.startswith(ours)}
    assert sorted(part.removeprefix(theirs) for parts in names.values() for part in parts) == sorted(states)
    for name, parts in names.items():
        values = [to_mx(states[part.removeprefix(theirs)]) for part in parts]
        flux.load_weights([(name, mx.concatenate(values) if len(values) > 1 else values[0])], strict=False)


def assert_close(found: mx.array, expected: torch.Tensor) -> None:
    difference = np.abs(np.array(found) - expected.numpy()).max()
    assert difference <= 1e-4 * expected.abs().max().item()


@pytest.mark.slow  # a minute each without OpenBLAS
def test_full_width_double_block(flux: Flux, rope: tuple[tuple[torch.Tensor, torch.Tensor], mx.array]) -> None:
    theirs = random_block(FluxTransformerBlock)
    fill(flux, "double_blocks.0.", "transformer_blocks.0.", theirs)
    ours = flux.double_blocks[0]
    img, txt, vec = inputs(4, 2 * ROWS * COLUMNS, 3072), inputs(5, TEXT, 3072), inputs(6, 3072)
    expected_txt, expected_img = theirs(
        hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=rope[0]
    )
    found_img, found_txt = ours(to_mx(img), to_mx(txt), rope[1], (ours.img_mod(to_mx(vec)), ours.txt_mod(to_mx(vec))))
    assert_close(found_img, expected_img)
    assert_close(found_txt, expected_txt)


@pytest.mark.slow
def test_full_width_single_block(flux: Flux, rope: tuple[tuple[torch.Tensor, torch.Tensor], mx.array]) -> None:
    theirs = random_block(FluxSingleTransformerBlock)
    fill(flux, "single_blocks.0.", "single_transformer_blocks.0.", theirs)
    ours = flux.single_blocks[0]
    img, txt, vec = inputs(7, 2 * ROWS * COLUMNS, 3072), inputs(8, TEXT, 3072), inputs(9, 3072)
    expected = theirs(hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=rope[0])
    found = ours(to_mx(torch.cat([txt, img], dim=1)), rope[1], ours.modulation(to_mx(vec)))
    assert_close(found, torch.cat(expected, dim=1))

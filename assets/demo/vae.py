"""Stage 1: the autoencoder learns to keep scenes."""

import argparse
import random
from collections.abc import Callable

import numpy as np
import torch
from optimizer import Optimizer
from scenes import GRIDS, PALETTE, Scene, Shape, jittered, random_scene
from torch import Tensor, nn

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 2,
    "sample_size": 64,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
}
SCALE, SHIFT = CONFIG["scaling_factor"], CONFIG["shift_factor"]
Run = Callable[..., None]


def new_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    nn.init.constant_(vae.encoder.conv_out.bias[16:], -5)  # log variance: begin with little noise
    return vae


def train_vae(run: Run, args: argparse.Namespace) -> nn.Module:
    """Stage 1. Loss: that of pictures, and a weak pull of the latents to N(0, 1).

    Half of the steps on the smallest grid, none on the largest: what is learnt on 64 and 96 pixels holds there too.
    """
    vae = new_vae()
    opt = Optimizer([vae], is_convolution, rate=2e-3, muon_rate=3e-3, betas=(0.9, 0.99))

    def loss(step: int, draw: random.Random) -> tuple[Tensor, dict[str, float]]:
        x = to_tensor([training_scene(draw, GRIDS[step % 4 % 3]) for _ in range(args.vae_batch)])
        with fast():
            mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
            z = mean + torch.randn_like(mean) * (logvar / 2).exp()
            y = vae.decoder(z).float()
        pull = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return picture_loss(y, x) + 1e-3 * pull, {"psnr": psnr(y, x), "kl": pull.item(), "size": mean.std().item()}

    run("vae", opt, args.vae_steps, loss)
    opt.use_average()
    normalise(vae)
    return vae


def encode(vae: nn.Module, x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1 … 1 -> the latents the transformer sees, [B, 16, H / 8, W / 8]."""
    return (vae.encoder(x)[:, :16] - SHIFT) * SCALE


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    return vae.decoder(latents / SCALE + SHIFT)


@torch.no_grad()
def normalise(vae: nn.Module) -> None:
    """Scale the latent channels so that FLUX's own constants bring them to variance 1; the autoencoder stays what it is."""
    draw = random.Random("normalise")
    scenes = [training_scene(draw, GRIDS[0]) for _ in range(256)]
    z = vae.encoder(to_tensor(scenes))[:, :16]
    factor = 1 / (SCALE * z.std(dim=(0, 2, 3)))
    print("latent means over deviations:", (z.mean(dim=(0, 2, 3)) / z.std(dim=(0, 2, 3))).numpy().round(2), flush=True)
    vae.encoder.conv_out.weight[:16] *= factor[:, None, None, None]
    vae.encoder.conv_out.bias[:16] *= factor
    vae.decoder.conv_in.weight /= factor[None, :, None, None]


def is_convolution(name: str, p: Tensor) -> bool:
    return p.ndim >= 2 and "conv_in" not in name and not name.endswith("decoder.conv_out.weight")


def fast() -> torch.autocast:
    """Convolutions in bfloat16 with pictures channels-last: 90 ms a step in place of 130."""
    return torch.autocast("cpu", torch.bfloat16)


def picture_loss(y: Tensor, x: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of gradients."""
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.25 * edges


def psnr(y: Tensor, x: Tensor) -> float:
    """dB of pictures in -1 … 1."""
    return float(10 * torch.log10(4 / (y.detach().clamp(-1, 1) - x).square().mean()))


def training_scene(draw: random.Random, grid: tuple[int, int]) -> Scene:
    """As in the tests, and also empty, with all four kinds, with two shapes of one colour, and as an edit leaves them."""
    scene = random_scene(draw, grid, most=4)
    if draw.random() < 0.04:
        return scene.becomes()
    shapes = list(scene.shapes)
    for i, shape in enumerate(shapes):
        colour = draw.choice(list(PALETTE)) if draw.random() < 0.15 else shape.colour
        if colour == scene.colour:
            colour = shape.colour
        made = Shape.added(shape.kind, colour, shape.cell)
        rgb = made.rgb if draw.random() < 0.4 else jittered(draw, colour)
        place = made if draw.random() < 0.3 else shape
        shapes[i] = Shape(shape.kind, colour, rgb, shape.cell, place.x, place.y, place.r)
    rgb = PALETTE[scene.colour] if draw.random() < 0.3 else scene.rgb
    return Scene(scene.colour, rgb, tuple(shapes), scene.rows, scene.columns)


def to_tensor(scenes: list[Scene]) -> Tensor:
    """[B, 3, H, W] in -1 … 1."""
    pixels = torch.from_numpy(np.stack([scene.pixels() for scene in scenes])).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

"""Sizes, arrays, tokens and noise, against diffusers and torch themselves."""

import numpy as np
import pytest
from PIL import Image

from mlx_kontext.image import (
    KONTEXT_SIZES,
    nearest_size,
    noise,
    pack,
    position_ids,
    psnr,
    ssim,
    to_array,
    to_image,
    unpack,
)


def test_nearest_size_as_diffusers():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert list(KONTEXT_SIZES) == PREFERRED_KONTEXT_RESOLUTIONS
    sides = np.random.default_rng(0).integers(16, 3000, (500, 2)).tolist()
    for width, height in [*sides, *KONTEXT_SIZES, (603, 647), (16, 16), (320, 16), (16, 320)]:
        floored_width, floored_height = width - width % 16, height - height % 16  # get_default_height_width
        aspect_ratio = floored_width / floored_height
        _, *expected = min((abs(aspect_ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert nearest_size(width, height) == tuple(expected), (width, height)


def test_nearest_size_floors_first_and_breaks_ties_as_diffusers():
    assert nearest_size(603, 647) == (944, 1104)
    raw = min((abs(603 / 647 - w / h), w, h) for w, h in KONTEXT_SIZES)
    assert raw[1:] == (1024, 1024)  # what BFL, which does not floor, finds
    assert nearest_size(30, 30, sizes=((64, 64), (32, 32))) == (32, 32)
    assert nearest_size(47, 33, sizes=((64, 64), (96, 64)), multiple=32) == (64, 64)


@pytest.mark.parametrize("size", [(64, 48), (150, 101), (17, 300), (1024, 768)])
def test_to_array_equals_diffusers_bit_by_bit(size):
    import torch
    from diffusers.image_processor import VaeImageProcessor

    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = VaeImageProcessor(vae_scale_factor=16)
    resized = processor.resize(photo, 96, 160)
    expected = processor.preprocess(resized, 96, 160).permute(0, 2, 3, 1)
    ours = to_array(photo, 160, 96)
    assert ours.shape == (1, 96, 160, 3) and ours.dtype == np.float32
    assert torch.equal(torch.from_numpy(ours), expected)


def test_to_image_equals_diffusers():
    import torch
    from diffusers.image_processor import VaeImageProcessor

    decoded = np.random.default_rng(2).normal(0, 0.8, (1, 32, 48, 3)).astype(np.float32)
    decoded[0, 0, :, 0] = (np.arange(48) * 2 + 1) / 255 - 1  # exact halves between two levels
    [expected] = VaeImageProcessor(vae_scale_factor=16).postprocess(torch.from_numpy(decoded).permute(0, 3, 1, 2))
    assert np.array_equal(np.asarray(to_image(decoded)), np.asarray(expected))


def test_image_to_array_and_back_is_the_same_picture():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(np.asarray(to_image(to_array(Image.fromarray(levels), 16, 16))), levels)


def test_pack_and_unpack_as_diffusers():
    import torch
    from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

    latents = np.random.default_rng(3).normal(size=(2, 6, 10, 16)).astype(np.float32)
    nchw = torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous()
    tokens = pack(latents)
    assert tokens.shape == (2, 15, 64)
    assert np.array_equal(tokens, FluxKontextPipeline._pack_latents(nchw, 2, 16, 6, 10).numpy())
    assert np.array_equal(unpack(tokens, 6, 10), latents)
    assert tokens[0, 6, 5 * 4 + 1 * 2 + 0] == latents[0, 2 * 1 + 1, 2 * 1 + 0, 5]  # token 6 is row 1, column 1


def test_pack_takes_mx_arrays():
    import mlx.core as mx

    latents = np.random.default_rng(3).normal(size=(1, 4, 6, 16)).astype(np.float32)
    tokens = pack(mx.array(latents))
    assert isinstance(tokens, mx.array)
    assert np.array_equal(np.array(tokens), pack(latents))
    assert np.array_equal(np.array(unpack(tokens, 4, 6)), latents)


def test_position_ids_as_diffusers():
    import torch
    from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline

    ids = position_ids(3, 5, plane=0)
    assert ids.dtype == np.int32
    expected = FluxKontextPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32).numpy()
    assert np.array_equal(ids, expected)
    assert np.array_equal(position_ids(3, 5, plane=1), expected + np.array([1, 0, 0]))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 + 7, 2**64 - 1])
def test_noise_is_torchs(seed):
    import torch

    for height, width, channels in [(128, 128, 16), (14, 10, 16), (5, 7, 3)]:  # 105 values: an incomplete last block
        shape = (1, channels, height, width)
        expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).permute(0, 2, 3, 1).numpy()
        ours = noise(seed, height, width, channels)
        assert ours.shape == expected.shape and ours.dtype == np.float32
        assert np.abs(ours - expected).max() <= 1e-6


def test_noise_of_seed_0_as_written_down():
    """These values hold without torch, on every machine."""
    ours = noise(0, 128, 128, 16)
    assert ours[0, 0, :4, 0] == pytest.approx([-1.125840, -1.152360, -0.250579, -0.433879], abs=1e-6)
    assert pack(ours)[0, 0, :4] == pytest.approx([-1.125840, -1.152360, -0.883376, -0.418913], abs=1e-6)


def random_pictures(count: int, side: int, seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)]


def test_psnr():
    black, grey, white = (Image.new("RGB", (12, 12), (value,) * 3) for value in (0, 51, 255))
    assert psnr(black, white) == 0
    assert psnr(black, grey) == psnr(grey, black) == pytest.approx(20 * np.log10(5))
    assert psnr(black, black.copy()) is None
    dot = white.copy()
    dot.putpixel((3, 4), (255, 254, 255))  # one step in one of 432 numbers
    assert psnr(white, dot) == pytest.approx(10 * np.log10(255**2 * 432))


def test_ssim_of_one_window():
    """11x11 pixels are one window: the formula of the paper, written out."""
    a, b = random_pictures(2, 11)
    x, y = (np.asarray(picture.convert("L"), float) for picture in (a, b))
    row, column = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(row**2 + column**2) / (2 * 1.5**2))
    weights /= weights.sum()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy, vxy = (
        (weights * (x - mx) ** 2).sum(),
        (weights * (y - my) ** 2).sum(),
        (weights * (x - mx) * (y - my)).sum(),
    )
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)


def test_ssim():
    a, b = random_pictures(2, 40)
    assert ssim(a, a.copy()) == pytest.approx(1, abs=1e-12)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12) and abs(ssim(a, b)) < 0.1
    flat, paler = (Image.new("RGB", (40, 30), (value,) * 3) for value in (100, 120))
    assert ssim(flat, paler) == pytest.approx((2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2))
    found = [ssim(a, Image.blend(a, b, share)) for share in (0.1, 0.3, 0.6)]
    assert 1 > found[0] > found[1] > found[2] > 0
    # turned or mirrored together, two pictures are as alike as before
    assert ssim(a.rotate(90), b.rotate(90)) == pytest.approx(ssim(a, b), abs=1e-12)

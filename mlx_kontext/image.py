"""Pictures as arrays and arrays as tokens: sizes, resize, pack, position ids, noise; how alike two are. numpy and PIL only."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

# (width, height): the sizes FLUX.1 Kontext was trained on; BFL and diffusers carry the same list.
KONTEXT_SIZES = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)


def nearest_size(
    width: int, height: int, sizes: Iterable[tuple[int, int]] = KONTEXT_SIZES, multiple: int = 16
) -> tuple[int, int]:
    """The (width, height) among `sizes` whose aspect is nearest to a picture of width x height pixels.

    As diffusers: both sides are floored to `multiple` first (BFL compares the raw sides, and chooses differently for
    1 in 17 odd sizes), and the narrower of two equally near sizes wins. Both sides must be at least `multiple`.
    """
    aspect = (width // multiple * multiple) / (height // multiple * multiple)
    return min((abs(aspect - w / h), w, h) for w, h in sizes)[1:]


def to_array(image: Image.Image, width: int, height: int) -> np.ndarray:
    """An RGB picture resized to width x height, aspect not kept, as float32 [1, H, W, 3] in -1..1.

    The same bits as diffusers' VaeImageProcessor: Lanczos on 8-bit values, then / 255 * 2 - 1.
    """
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.float32(2.0) * (np.array(resized, np.float32) / np.float32(255.0))[None] - np.float32(1.0)


def to_image(array: np.ndarray) -> Image.Image:
    """Inverse of `to_array` for [1, H, W, 3]: clamped, rounded half to even as diffusers does. No NaN may be left."""
    unit = np.clip(np.asarray(array[0], np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return Image.fromarray(np.rint(unit * np.float32(255.0)).astype(np.uint8))


def pack(latents: Any) -> Any:
    """Latents [B, h, w, C] -> tokens [B, h/2 * w/2, 4C], for numpy and mx.array alike.

    Tokens go row by row; the channel of a token is c * 4 + dy * 2 + dx, the order the model was trained on.
    """
    batch, height, width, channels = latents.shape
    patches = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Any, height_latent: int, width_latent: int) -> Any:
    """Inverse of `pack`: tokens [B, h/2 * w/2, 4C] -> latents [B, h, w, C]."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height_latent // 2, width_latent // 2, channels // 4, 2, 2)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height_latent, width_latent, channels // 4)


def position_ids(rows: int, columns: int, plane: int) -> np.ndarray:
    """(plane, row, column) of each token, int32 [rows * columns, 3]; plane 0 is the target, 1 the reference."""
    row, column = np.mgrid[:rows, :columns]
    return np.stack([np.full_like(row, plane), row, column], axis=-1).reshape(-1, 3).astype(np.int32)


def noise(seed: int, height_latent: int, width_latent: int, channels: int) -> np.ndarray:
    """torch.randn(1, C, h, w) of torch's CPU generator at `seed`, as float32 [1, h, w, C]; needs 16 values or more.

    torch fills large tensors 16 values at a time (ATen's normal_fill): 24-bit uniforms from a Mersenne Twister, of
    which the first 8 give radii and the last 8 angles (Box-Muller). An incomplete last block is drawn anew. So
    diffusers, BFL, ComfyUI and we start from the same noise, to within 1e-6: torch's sine is an approximation.
    """
    twister = np.random.RandomState(seed & 0xFFFFFFFF)  # torch seeds its twister with the low 32 bits, too

    def uniform(n: int) -> np.ndarray:
        words = np.frombuffer(twister.bytes(4 * n), np.dtype("<u4"))
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(u: np.ndarray) -> np.ndarray:
        u = u.reshape(-1, 2, 8)
        radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
        angle = np.float32(2 * np.pi) * u[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

    count = channels * height_latent * width_latent
    values = np.empty(count, np.float32)
    uniforms = uniform(count)
    whole = count // 16 * 16
    values[:whole] = normal(uniforms[:whole])
    if whole < count:
        values[-16:] = normal(uniform(16))
    return values.reshape(1, channels, height_latent, width_latent).transpose(0, 2, 3, 1).copy()


def psnr(image: Image.Image, other: Image.Image) -> float | None:
    """Peak signal-to-noise ratio of two RGB pictures of one size, in dB, over all pixels and channels; None if they are equal."""
    error = float(np.mean(np.square(np.asarray(image, np.float64) - np.asarray(other, np.float64))))
    return float(10 * np.log10(255**2 / error)) if error else None


def ssim(image: Image.Image, other: Image.Image) -> float:
    """Structural similarity of two pictures of one size, at least 11 pixels a side: 1 if equal, near 0 if unrelated.

    On luma, under a Gaussian window of 11x11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, as in Wang, Bovik, Sheikh and
    Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), 2004, eq. 13.
    """
    window = np.exp(-np.square(np.arange(11) - 5.0) / (2 * 1.5**2))
    window /= window.sum()

    def averaged(values: np.ndarray) -> np.ndarray:
        """Under the window at each place where it lies wholly inside: [H, W] -> [H - 10, W - 10]."""
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, 11, axis=axis) @ window
        return values

    x, y = (np.asarray(picture.convert("L"), np.float64) for picture in (image, other))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = averaged(x), averaged(y)
    spread = averaged(x * x) - mean_x**2 + averaged(y * y) - mean_y**2
    shared = averaged(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(luminance * (2 * shared + c2) / (spread + c2)))

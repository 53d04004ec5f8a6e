"""The FLUX autoencoder: RGB pictures to 16-channel latents at an eighth of the size, and back.

Tensor names are those of Black Forest Labs' `ae.safetensors`; convolution weights are OHWI and pictures NHWC, as MLX
wants them. What is unusual: the downsampling convolution pads right and bottom only, and the attention in the middle
has one head as wide as the channels, which MLX has no fused kernel for.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import mx, nn

_QUERY_ROWS = 1024  # attention scores are made for so many queries at a time: 16k tokens would need 1 GB at once


@dataclass(frozen=True)
class VAEConfig:
    """Sizes as in diffusers' `vae/config.json`; the defaults are FLUX.1's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    REQUIRED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no autoencoder of pictures has."""
        widths, groups = self.block_out_channels, self.norm_num_groups
        if len(widths) > 8 or self.layers_per_block > 64 or any(width % groups for width in widths):
            raise ValueError(
                f"{self.layers_per_block} blocks at each width of {widths!r:.80}, normed in {groups} groups; expected at most 8 "
                "widths that divide into groups"
            )
        if self.in_channels != 3 or self.out_channels != 3 or not abs(self.scaling_factor) > 1e-6:
            raise ValueError(
                f"{self.in_channels} channels in, {self.out_channels} out, scaled by {self.scaling_factor}; expected 3 and 3"
            )

    @property
    def downsampling(self) -> int:
        """Pixels of the picture per latent, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.silu(self.norm1(x)))
        h = self.conv2(nn.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if "nin_shortcut" in self else x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions; q, k, v and the output are 1x1 convolutions in the checkpoint."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).reshape(B, H * W, C) for layer in (self.q, self.k, self.v))
        out = []
        for first in range(0, H * W, _QUERY_ROWS):
            scores = (q[:, first : first + _QUERY_ROWS] * C**-0.5) @ k.transpose(0, 2, 1)
            out.append(mx.softmax(scores, axis=-1, precise=True) @ v)
        return x + self.proj_out(mx.concatenate(out, axis=1).reshape(B, H, W, C))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def __call__(self, x: mx.array) -> mx.array:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, groups: int, resample: type[nn.Module] | None):
        super().__init__()
        self.block = [ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(depth)]
        if resample is Downsample:
            self.downsample = Downsample(out_channels)
        elif resample is Upsample:
            self.upsample = Upsample(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.block:
            x = block(x)
        if "downsample" in self:
            return self.downsample(x)
        return self.upsample(x) if "upsample" in self else x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv3x3(config.in_channels, widths[0])
        self.down = [
            Level(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, Downsample if i < last else None)
            for i in range(len(widths))
        ]
        self.mid = Mid(widths[-1], groups)
        self.norm_out = group_norm(groups, widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(nn.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv3x3(config.latent_channels, widths[-1])
        self.mid = Mid(widths[-1], groups)
        # up[i] works at the resolution of down[i]: the checkpoint counts from the full picture, the data flows backwards
        self.up = [
            Level(widths[min(i + 1, last)], widths[i], config.layers_per_block + 1, groups, Upsample if i > 0 else None)
            for i in range(len(widths))
        ]
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = conv3x3(widths[0], config.out_channels)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(nn.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Pictures [B, H, W, 3] in -1…1 to latents [B, H/8, W/8, 16] and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, x: mx.array) -> mx.array:
        """Mean and log variance of the posterior, side by side in the channels: [B, H/8, W/8, 32]."""
        return self.encoder(x)

    def encode(self, x: mx.array) -> mx.array:
        """The posterior's mean (never a sample: an edit is to start from the picture itself), shifted and scaled."""
        mean, _ = mx.split(self.encode_moments(x), 2, axis=-1)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, z: mx.array) -> mx.array:
        """Inverse of `encode`; values may leave -1…1 a little."""
        return self.decoder(z / self.config.scaling_factor + self.config.shift_factor)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6, pytorch_compatible=True)

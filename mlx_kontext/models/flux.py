"""The FLUX.1 transformer: 19 double-stream and 38 single-stream blocks over text, noise and reference tokens.

Tensor names are those of Black Forest Labs' checkpoint, so a canonical file needs no renaming. What is unusual:
  - everything that depends on time, guidance and prompt alone (the `mod` tables) is computed before the loop;
  - text goes before image in every concatenation, the order the model was trained on;
  - RoPE rotates interleaved pairs, over three axes: plane (0 target, 1 reference), row, column;
  - a single block feeds attention and MLP from the same normed input and joins them in one projection.
Reference: https://arxiv.org/abs/2506.15742 and github.com/black-forest-labs/flux.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..backend import mx, nn


@dataclass(frozen=True)
class FluxConfig:
    """Sizes as in diffusers' `transformer/config.json`; the defaults are FLUX.1 Kontext [dev]."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    REQUIRED: ClassVar[dict[str, Any]] = {"guidance_embeds": True, "patch_size": 1}

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no transformer has, so that none is built of a million blocks."""
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(dims % 2 for dims in axes) or sum(axes) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope is {axes!r:.80}; expected three even sizes, {self.attention_head_dim} together as a head is wide"
            )
        if self.num_layers + self.num_single_layers > 512 or self.hidden > 2**16:
            raise ValueError(
                f"{self.num_layers} and {self.num_single_layers} blocks {self.hidden} wide; FLUX.1 has 19 and 38 of 3072"
            )

    @property
    def hidden(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        return 4 * self.hidden


@dataclass
class Modulation:
    """Shift, scale and gate vectors of every block for some moments in time; `at(i)` picks one moment.

    double: per block (img, txt), each [T, 6, D]; single: per block [T, 3, D]; final: [T, 2, D].
    """

    double: list[tuple[mx.array, mx.array]]
    single: list[mx.array]
    final: mx.array

    def at(self, i: int) -> "Modulation":
        """The vectors of moment `i`, shaped [1, k, D]."""
        now = slice(i, i + 1)
        return Modulation([(a[now], b[now]) for a, b in self.double], [m[now] for m in self.single], self.final[now])

    def arrays(self) -> list[mx.array]:
        """All tables, to evaluate them together."""
        return [*(m for pair in self.double for m in pair), *self.single, self.final]


class RMSNorm(nn.Module):
    """RMS norm whose gain is called `scale`, as in the checkpoint."""

    def __init__(self, dims: int):
        super().__init__()
        self.scale = mx.ones((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.query_norm = RMSNorm(dims)
        self.key_norm = RMSNorm(dims)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dims: int, dims: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dims, dims)
        self.out_layer = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(nn.silu(self.in_layer(x)))


class ModulationLinear(nn.Module):
    """[T, D] -> [T, parts, D]: the AdaLN vectors of one block."""

    def __init__(self, dims: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dims, parts * dims)

    def __call__(self, vec: mx.array) -> mx.array:
        return self.lin(nn.silu(vec)).reshape(vec.shape[0], self.parts, -1)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is joint, see `attention`."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.norm = QKNorm(config.attention_head_dim)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return split_heads(self.qkv(x), self.heads, self.norm)


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, meeting in attention."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.img_mod = ModulationLinear(config.hidden, 6)
        self.img_attn = SelfAttention(config)
        self.img_mlp = [
            nn.Linear(config.hidden, config.mlp_hidden),
            nn.GELU("tanh"),
            nn.Linear(config.mlp_hidden, config.hidden),
        ]
        self.txt_mod = ModulationLinear(config.hidden, 6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = [
            nn.Linear(config.hidden, config.mlp_hidden),
            nn.GELU("tanh"),
            nn.Linear(config.mlp_hidden, config.hidden),
        ]

    def __call__(
        self, img: mx.array, txt: mx.array, pe: mx.array, mod: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, mx.array]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = mx.split(mod[0], 6, axis=1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = mx.split(mod[1], 6, axis=1)

        img_q, img_k, img_v = self.img_attn.project(modulated_norm(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.project(modulated_norm(txt, txt_shift1, txt_scale1))
        q = mx.concatenate([txt_q, img_q], axis=2)
        k = mx.concatenate([txt_k, img_k], axis=2)
        v = mx.concatenate([txt_v, img_v], axis=2)
        attn = attention(q, k, v, pe)
        txt_attn, img_attn = mx.split(attn, [txt.shape[1]], axis=1)

        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * run(self.img_mlp, modulated_norm(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * run(self.txt_mlp, modulated_norm(txt, txt_shift2, txt_scale2))
        return clip_fp16(img), clip_fp16(txt)


class SingleStreamBlock(nn.Module):
    """All tokens together: attention and MLP side by side from one input, one projection out."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.hidden = config.hidden
        self.modulation = ModulationLinear(config.hidden, 3)
        self.linear1 = nn.Linear(config.hidden, 3 * config.hidden + config.mlp_hidden)
        self.norm = QKNorm(config.attention_head_dim)
        self.linear2 = nn.Linear(config.hidden + config.mlp_hidden, config.hidden)

    def __call__(self, x: mx.array, pe: mx.array, mod: mx.array) -> mx.array:
        shift, scale, gate = mx.split(mod, 3, axis=1)
        qkv, mlp = mx.split(self.linear1(modulated_norm(x, shift, scale)), [3 * self.hidden], axis=-1)
        attn = attention(*split_heads(qkv, self.heads, self.norm), pe)
        return clip_fp16(x + gate * self.linear2(mx.concatenate([attn, nn.gelu_approx(mlp)], axis=-1)))


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.in_channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden)]

    def modulation(self, vec: mx.array) -> mx.array:
        """[T, D] -> [T, 2, D]: shift, then scale (diffusers' files hold the two halves the other way round)."""
        return run(self.adaLN_modulation, vec).reshape(vec.shape[0], 2, -1)

    def __call__(self, x: mx.array, mod: mx.array) -> mx.array:
        shift, scale = mx.split(mod, 2, axis=1)
        return self.linear(modulated_norm(x, shift, scale))


class Flux(nn.Module):
    """Velocity of the rectified flow, for the image tokens.

    The call reads like the figure in the paper; `modulation` and `rope` prepare what stays the same in every step.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.in_channels, config.hidden)
        self.txt_in = nn.Linear(config.joint_attention_dim, config.hidden)
        self.time_in = MLPEmbedder(256, config.hidden)
        self.vector_in = MLPEmbedder(config.pooled_projection_dim, config.hidden)
        self.guidance_in = MLPEmbedder(256, config.hidden)
        self.double_blocks = [DoubleStreamBlock(config) for _ in range(config.num_layers)]
        self.single_blocks = [SingleStreamBlock(config) for _ in range(config.num_single_layers)]
        self.final_layer = LastLayer(config)

    def __call__(self, img: mx.array, txt: mx.array, pe: mx.array, mod: Modulation) -> mx.array:
        """img: [B, N, 64] noise ++ reference tokens, txt: [B, L, 4096], pe from `rope`, mod of one moment -> [B, N, 64]."""
        img, txt = self.img_in(img), self.txt_in(txt)
        for double, mod_i in zip(self.double_blocks, mod.double, strict=True):
            img, txt = double(img, txt, pe, mod_i)
        x = mx.concatenate([txt, img], axis=1)
        for single, mod_j in zip(self.single_blocks, mod.single, strict=True):
            x = single(x, pe, mod_j)
        return self.final_layer(x[:, txt.shape[1] :], mod.final)

    def modulation(self, sigmas: mx.array, guidance: float, vec: mx.array) -> Modulation:
        """Every modulation vector of a whole schedule in one pass. sigmas: [T] in 0…1, vec: [1, 768] pooled CLIP."""
        dtype = vec.dtype
        moment = rounded_time(sigmas, dtype)
        strength = mx.array([guidance], mx.float32).astype(dtype) * 1000
        vec = (
            self.time_in(sinusoid(moment).astype(dtype))
            + self.guidance_in(sinusoid(strength).astype(dtype))
            + self.vector_in(vec)
        )  # [T, D]
        return Modulation(
            [(block.img_mod(vec), block.txt_mod(vec)) for block in self.double_blocks],
            [block.modulation(vec) for block in self.single_blocks],
            self.final_layer.modulation(vec),
        )

    def rope(self, ids: mx.array) -> mx.array:
        """Rotations of every token. ids: [L, 3] whole numbers (text zeros first) -> cos and sin, [2, L, head_dim / 2] fp32."""
        angles = []
        for axis, dims in enumerate(self.config.axes_dims_rope):
            omega = 10000.0 ** (-mx.arange(0, dims, 2, dtype=mx.float32) / dims)
            angles.append(ids[:, axis : axis + 1].astype(mx.float32) * omega)
        angle = mx.concatenate(angles, axis=1)
        return mx.stack([mx.cos(angle), mx.sin(angle)])


def rounded_time(sigmas: mx.array, dtype: mx.Dtype) -> mx.array:
    """1000 σ as the published model sees it: in a 16-bit run it is rounded on each of its three ways there.

    The first sinusoid is the cosine of this number itself, so 2496 in place of 2500 is another embedding.
    """
    timestep = (sigmas * 1000).astype(dtype)
    return (timestep / 1000) * 1000


def sinusoid(v: mx.array) -> mx.array:
    """v: [T] -> [T, 256] fp32: 128 cosines, then 128 sines, of falling frequency."""
    frequencies = mx.exp(-math.log(10000.0) * mx.arange(128, dtype=mx.float32) / 128)
    angle = v.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1)


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Layer norm without gain of its own, then (1 + scale) x + shift. x: [B, L, D], shift and scale: [1, 1, D]."""
    return mx.fast.layer_norm(x, None, None, 1e-6) * (1 + scale) + shift


def split_heads(qkv: mx.array, heads: int, norm: QKNorm) -> tuple[mx.array, mx.array, mx.array]:
    """qkv: [B, L, 3 D] -> normed q, normed k, v, each [B, heads, L, head_dim]."""
    B, L, _ = qkv.shape
    q, k, v = qkv.reshape(B, L, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def attention(q: mx.array, k: mx.array, v: mx.array, pe: mx.array) -> mx.array:
    """Joint attention of all tokens, no mask: padding is attended too, as in training. [B, H, L, d] x 3 -> [B, L, H d]."""
    q, k = rotate(q, pe), rotate(k, pe)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    return out.transpose(0, 2, 1, 3).flatten(2)


def rotate(x: mx.array, pe: mx.array) -> mx.array:
    """RoPE on interleaved pairs, computed in fp32 and rounded once. x: [B, H, L, d], pe: [2, L, d / 2]."""
    cos, sin = pe
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return mx.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def clip_fp16(x: mx.array) -> mx.array:
    """Keep an fp16 residual finite, as the reference does; other formats have the range."""
    return mx.clip(x, -65504, 65504) if x.dtype == mx.float16 else x


def run(layers: list[nn.Module], x: mx.array) -> mx.array:
    for layer in layers:
        x = layer(x)
    return x

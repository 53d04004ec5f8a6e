"""The FLUX.1 transformer in torch, for training only: the same names, shapes and arithmetic as `mlx_kontext/models/flux.py`.

Linear layers run in bfloat16 (twice as fast as float32 on a CPU that has it), attention, norms and the sums between blocks in
float32 (torch's bfloat16 attention is ten times slower backwards).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A float32 layer that multiplies in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())


class RMSNorm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale, 1e-6)


class QKNorm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dims), RMSNorm(dims)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dims: int, dims: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(in_dims, dims), nn.Linear(dims, dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """[B, D] -> `parts` vectors [B, 1, D]; zero at first, so that every block begins as the identity."""

    def __init__(self, dims: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dims, parts * dims)
        nn.init.zeros_(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(dims, 3 * dims), Linear(dims, dims)
        self.norm = QKNorm(dims // heads)


class DoubleStreamBlock(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(dims, 6))
            setattr(self, f"{stream}_attn", SelfAttention(dims, heads))
            mlp = nn.Sequential(Linear(dims, 4 * dims), nn.GELU("tanh"), Linear(4 * dims, dims))
            setattr(self, f"{stream}_mlp", mlp)

    def forward(self, img: Tensor, txt: Tensor, pe: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        qkv = torch.cat(
            [
                split_heads(self.txt_attn.qkv(modulated(txt, *txt_mod[:2])), self.txt_attn),
                split_heads(self.img_attn.qkv(modulated(img, *img_mod[:2])), self.img_attn),
            ],
            dim=3,
        )
        attn = attention(qkv, pe)
        txt = txt + txt_mod[2] * self.txt_attn.proj(attn[:, : txt.shape[1]])
        img = img + img_mod[2] * self.img_attn.proj(attn[:, txt.shape[1] :])
        txt = txt + txt_mod[5] * self.txt_mlp(modulated(txt, *txt_mod[3:5]))
        img = img + img_mod[5] * self.img_mlp(modulated(img, *img_mod[3:5]))
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.dims, self.heads = dims, heads
        self.modulation = Modulation(dims, 3)
        self.linear1, self.linear2 = Linear(dims, 7 * dims), Linear(5 * dims, dims)
        self.norm = QKNorm(dims // heads)

    def forward(self, x: Tensor, pe: Tensor, vec: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulated(x, shift, scale)).split([3 * self.dims, 4 * self.dims], dim=-1)
        attn = attention(split_heads(qkv, self), pe)
        return x + gate * self.linear2(torch.cat([attn.bfloat16(), F.gelu(mlp, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    def __init__(self, dims: int, out: int):
        super().__init__()
        self.linear = nn.Linear(dims, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dims, 2 * dims))
        for layer in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)))


class Flux(nn.Module):
    """config: as in `transformer/config.json`."""

    def __init__(self, config: dict):
        super().__init__()
        heads, self.axes = config["num_attention_heads"], config["axes_dims_rope"]
        dims = heads * config["attention_head_dim"]
        self.img_in = nn.Linear(config["in_channels"], dims)
        self.txt_in = nn.Linear(config["joint_attention_dim"], dims)
        self.time_in, self.guidance_in = MLPEmbedder(256, dims), MLPEmbedder(256, dims)
        self.vector_in = MLPEmbedder(config["pooled_projection_dim"], dims)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(dims, heads) for _ in range(config["num_layers"]))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(dims, heads) for _ in range(config["num_single_layers"]))
        self.final_layer = LastLayer(dims, config["in_channels"])

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, t: Tensor, guidance: Tensor, ids: Tensor) -> Tensor:
        """img: [B, N, 64], txt: [B, L, 64], vec: [B, 64], t and guidance: [B], ids: [L + N, 3] -> velocity [B, N, 64]."""
        vec = self.time_in(sinusoid(1000 * t)) + self.guidance_in(sinusoid(1000 * guidance)) + self.vector_in(vec)
        pe = rope(ids, self.axes)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, pe, vec)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, pe, vec)
        return self.final_layer(x[:, txt.shape[1] :], vec)


def sinusoid(v: Tensor) -> Tensor:
    angle = v[:, None] * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope(ids: Tensor, axes: list[int]) -> Tensor:
    """ids: [L, 3] -> cos and sin of every pair, [2, L, head_dim / 2]."""
    angle = torch.cat([ids[:, a, None] * 10000.0 ** (-torch.arange(0, d, 2) / d) for a, d in enumerate(axes)], dim=1)
    return torch.stack([angle.cos(), angle.sin()])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


def split_heads(qkv: Tensor, layer: nn.Module) -> Tensor:
    """[B, L, 3 D] -> normed q, normed k, v in one float32 tensor [3, B, heads, L, head_dim]."""
    B, L, _ = qkv.shape
    q, k, v = qkv.float().view(B, L, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
    return torch.stack([layer.norm.query_norm(q), layer.norm.key_norm(k), v])


def attention(qkv: Tensor, pe: Tensor) -> Tensor:
    """[3, B, heads, L, d] -> [B, L, heads d]."""
    q, k = rotate(qkv[:2], pe)
    return F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    cos, sin = pe
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

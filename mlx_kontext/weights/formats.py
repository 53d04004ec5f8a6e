"""Where a checkpoint's tensors are and how their names become canonical.

Canonical names are Black Forest Labs' for transformer and VAE, Hugging Face's for T5 and CLIP; convolutions are OHWI.
A format is a row of FORMATS: how to recognise the folder, and one function a part that renames (never computes) tensors.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..backend import mx

Tensors = dict[str, mx.array]
PARTS = {"transformer": "FLUX transformer", "vae": "VAE", "text_encoder": "CLIP-L", "text_encoder_2": "T5"}


@dataclass(frozen=True)
class Format:
    """name: for people; matches: takes the folder's model_index.json; to_canonical: part -> function on its tensors."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    to_canonical: Mapping[str, Callable[[Tensors], Tensors]]


@dataclass(frozen=True)
class Piece:
    """Tensors that are read together. outline: arrays of their names, shapes and dtypes, only to be looked at."""

    outline: Tensors
    load: Callable[[], Tensors]


# canonical name <- one or more names in diffusers' file, joined along the rows; a second line is another spelling
_DOUBLE = [
    ("img_mod.lin", ["norm1.linear"]),
    ("txt_mod.lin", ["norm1_context.linear"]),
    ("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    ("img_attn.qkv", ["attn.to_qkv"]),
    ("txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    ("txt_attn.qkv", ["attn.to_added_qkv"]),
    ("img_attn.proj", ["attn.to_out.0"]),
    ("txt_attn.proj", ["attn.to_add_out"]),
    ("img_mlp.0", ["ff.net.0.proj"]),
    ("img_mlp.2", ["ff.net.2"]),
    ("txt_mlp.0", ["ff_context.net.0.proj"]),
    ("txt_mlp.2", ["ff_context.net.2"]),
]
_DOUBLE_NORMS = [
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
]
_SINGLE = [
    ("modulation.lin", ["norm.linear"]),
    ("linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ("linear2", ["proj_out"]),
]
_SINGLE_NORMS = [("norm.query_norm", "attn.norm_q"), ("norm.key_norm", "attn.norm_k")]
_OUTSIDE = [
    ("img_in", ["x_embedder"]),
    ("txt_in", ["context_embedder"]),
    ("time_in.in_layer", ["time_text_embed.timestep_embedder.linear_1"]),
    ("time_in.out_layer", ["time_text_embed.timestep_embedder.linear_2"]),
    ("guidance_in.in_layer", ["time_text_embed.guidance_embedder.linear_1"]),
    ("guidance_in.out_layer", ["time_text_embed.guidance_embedder.linear_2"]),
    ("vector_in.in_layer", ["time_text_embed.text_embedder.linear_1"]),
    ("vector_in.out_layer", ["time_text_embed.text_embedder.linear_2"]),
    ("final_layer.linear", ["proj_out"]),
    ("final_layer.adaLN_modulation.1", ["norm_out.linear"]),
]


def transformer_from_diffusers(tensors: Tensors) -> Tensors:
    """Join split projections and rename. What no row names stays as it is, for the strict check to report."""
    left, out = dict(tensors), {}

    def take(target: str, sources: list[str]) -> None:
        for kind in ("weight", "scales", "biases", "bias"):  # groups of a quantized layer lie along its rows
            names = [f"{source}.{kind}" for source in sources]
            if all(name in left for name in names):
                parts = [left.pop(name) for name in names]
                out[f"{target}.{kind}"] = parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def take_block(theirs: str, ours: str, linears: list[tuple[str, list[str]]], norms: list[tuple[str, str]]) -> None:
        for target, sources in linears:
            take(f"{ours}.{target}", [f"{theirs}.{source}" for source in sources])
        for target, source in norms:
            if f"{theirs}.{source}.weight" in left:
                out[f"{ours}.{target}.scale"] = left.pop(f"{theirs}.{source}.weight")

    for i in _indices(left, "transformer_blocks"):
        take_block(f"transformer_blocks.{i}", f"double_blocks.{i}", _DOUBLE, _DOUBLE_NORMS)
    for i in _indices(left, "single_transformer_blocks"):
        take_block(f"single_transformer_blocks.{i}", f"single_blocks.{i}", _SINGLE, _SINGLE_NORMS)
    for target, sources in _OUTSIDE:
        take(target, sources)
    for name in [name for name in out if name.startswith("final_layer.adaLN_modulation.1.")]:
        scale, shift = mx.split(out[name], 2)  # diffusers holds scale above shift, the original shift above scale
        out[name] = mx.concatenate([shift, scale])
    return out | left


def diffusers_linears(double: int, single: int) -> Iterator[tuple[str, list[str]]]:
    """Every linear layer of a transformer of so many blocks: its canonical name, and the names in diffusers' file whose rows
    lie in it, top to bottom. A layer that has two spellings comes twice.
    """
    for i in range(double):
        for target, sources in _DOUBLE:
            yield f"double_blocks.{i}.{target}", [f"transformer_blocks.{i}.{source}" for source in sources]
    for i in range(single):
        for target, sources in _SINGLE:
            yield f"single_blocks.{i}.{target}", [f"single_transformer_blocks.{i}.{source}" for source in sources]
    yield from _OUTSIDE


def vae_from_diffusers(tensors: Tensors) -> Tensors:
    """Rename, turn convolutions to OHWI, and attention's linear layers into 1x1 convolutions."""
    levels = 1 + max(_indices(tensors, "decoder.up_blocks"), default=0)
    out = {}
    for name, value in tensors.items():
        name = re.sub(
            r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name
        )  # the original counts decoder levels from the full picture
        for theirs, ours in _VAE_NAMES:
            name = re.sub(theirs, ours, name)
        if value.ndim == 4:
            value = value.transpose(0, 2, 3, 1)
        elif value.ndim == 2:
            value = value[:, None, None, :]
        out[name] = value
    return out


_VAE_NAMES = [
    (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."),
    (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.downsamplers\.0\.conv\.", ".downsample.conv."),
    (r"\.upsamplers\.0\.conv\.", ".upsample.conv."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
]


def t5_canonical(tensors: Tensors) -> Tensors:
    """The embedding may be stored under either of two names, or both; a decoder is of no use here."""
    out = {name: value for name, value in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    tied = out.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        out.setdefault("shared.weight", tied)
    return out


def clip_canonical(tensors: Tensors) -> Tensors:
    """transformers 5 writes no `text_model.` prefix, published files do; projections and buffers are of no use here."""
    out = {}
    for name, value in tensors.items():
        name = name if name.startswith("text_model.") or "." not in name else f"text_model.{name}"
        if not name.endswith(("position_ids", "text_projection.weight")) and name != "logit_scale":
            out[name] = value
    return out


def _indices(tensors: Mapping[str, Any], prefix: str) -> list[int]:
    """Block numbers that appear as `prefix.N.`, in order."""
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d{{1,4}})\.")
    return sorted({int(match[1]) for name in tensors if (match := pattern.match(name))})


def _same(tensors: Tensors) -> Tensors:
    return tensors


FORMATS = (
    Format(
        "mlx_kontext folder",
        lambda index: index.get("_class_name") == "KontextPipeline",
        dict.fromkeys(PARTS, _same),
    ),
    Format(
        "diffusers folder",
        lambda index: index.get("_class_name") in ("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
        {
            "transformer": transformer_from_diffusers,
            "vae": vae_from_diffusers,
            "text_encoder": clip_canonical,
            "text_encoder_2": t5_canonical,
        },
    ),
)

"""Which part of FLUX.1 Kontext a file holds and by whose names, told from its header; and what we refuse, by name.

A layout is a row of LAYOUTS: a part, a name that only this layout has, and one function that makes names canonical.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..backend import mx
from ..errors import CheckpointError
from .formats import Tensors, _indices, clip_canonical, t5_canonical, transformer_from_diffusers, vae_from_diffusers
from .gguf_parts import part_of, t5_from_gguf
from .header import _line
from .stored import Contents, Stored, check, comfy_formats

KONTEXT = "take FLUX.1 Kontext [dev]"
_PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model."),
    "vae": ("", "vae.", "first_stage_model."),
    "text_encoder": ("", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("", "text_encoders.t5xxl.transformer."),
}


@dataclass(frozen=True)
class Layout:
    """name: for people; sign: a tensor that this layout always has; to_canonical: renames, and never computes."""

    name: str
    part: str
    sign: str
    to_canonical: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Source:
    """One part in files of a known layout. tensors: without the prefix that the file puts before their names."""

    where: Contents
    layout: Layout
    tensors: dict[str, Stored]


def transformer_from_mflux(tensors: Tensors) -> Tensors:
    """mflux keeps diffusers' names but for the two layers of an MLP."""
    inner = {"1": "net.0.proj", "2": "net.2"}
    return transformer_from_diffusers(
        {
            re.sub(r"(\.ff(?:_context)?\.)linear([12])\.", lambda m: f"{m[1]}{inner[m[2]]}.", name): value
            for name, value in tensors.items()
        }
    )


def vae_canonical(tensors: Tensors) -> Tensors:
    """A VAE under diffusers', mflux' or BFL's names; convolutions as torch (OIHW) or MLX (OHWI) holds them."""
    plain = {re.sub(r"\.(conv2d|norm)\.(?=weight$|bias$)", _inner, name): x for name, x in _unpacked(tensors).items()}
    conv = plain.get("decoder.conv_in.weight")
    ours = conv is not None and conv.ndim == 4 and conv.shape[1] == conv.shape[2] and conv.shape[3] != conv.shape[2]
    if ours:  # vae_from_diffusers turns all convolutions, so give it what it expects
        plain = {name: value.transpose(0, 3, 1, 2) if value.ndim == 4 else value for name, value in plain.items()}
    return vae_from_diffusers(plain)


def _inner(match: re.Match[str]) -> str:
    """Drop mflux' `.conv2d`, and its `.norm` where that is a layer within a layer (`norm_out.norm.weight`)."""
    before = match.string[: match.start()].rpartition(".")[2]
    return "." if match[1] == "conv2d" or "norm" in before else match[0]


def _unpacked(tensors: Tensors) -> Tensors:
    """Quantized layers as plain ones: those of a VAE are square, and convolutions here."""
    out = {}
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and f"{stem}.scales" in tensors:
            scales, columns = tensors[f"{stem}.scales"], value.shape[0]
            bits, group = value.shape[1] * 32 // columns, columns // scales.shape[1]
            value = mx.dequantize(value, scales, tensors[f"{stem}.biases"], group, bits)
        if kind not in ("scales", "biases"):
            out[name] = value
    return out


def t5_from_mflux(tensors: Tensors) -> Tensors:
    """mflux' names of T5's layers; it repeats the position bias in every block."""
    out = {}
    for name, value in tensors.items():
        name = re.sub(r"^t5_blocks\.(\d+)\.attention\.", r"encoder.block.\1.layer.0.", name)
        name = re.sub(r"^t5_blocks\.(\d+)\.ff\.", r"encoder.block.\1.layer.1.", name)
        name = name.replace("final_layer_norm.", "encoder.final_layer_norm.") if name.startswith("final") else name
        if "relative_attention_bias" not in name or name.startswith("encoder.block.0."):
            out[name] = value
    return out


def _t5_gguf(tensors: Tensors) -> Tensors:
    return t5_canonical(t5_from_gguf(tensors))


def _clip(tensors: Tensors) -> Tensors:
    """As published, with or without `text_model.`, and without the projection that only a search needs."""
    return clip_canonical(
        {name: value for name, value in tensors.items() if name.rpartition(".")[0] != "text_projection"}
    )


def _same(tensors: Tensors) -> Tensors:
    return dict(tensors)


LAYOUTS = (
    Layout("mflux", "transformer", "transformer_blocks.0.ff.linear1.weight", transformer_from_mflux),
    Layout("BFL", "transformer", "double_blocks.0.img_attn.qkv.weight", _same),
    Layout("diffusers", "transformer", "transformer_blocks.0.attn.add_q_proj.weight", transformer_from_diffusers),
    Layout("diffusers", "transformer", "transformer_blocks.0.attn.to_added_qkv.weight", transformer_from_diffusers),
    Layout("BFL", "vae", "decoder.mid.block_1.conv1.weight", vae_canonical),
    Layout("diffusers", "vae", "decoder.mid_block.resnets.0.conv1.weight", vae_canonical),
    Layout("mflux", "vae", "decoder.mid_block.resnets.0.conv1.conv2d.weight", vae_canonical),
    Layout("Hugging Face", "text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight", _clip),
    Layout("Hugging Face", "text_encoder", "encoder.layers.0.mlp.fc1.weight", _clip),
    Layout("Hugging Face", "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight", t5_canonical),
    Layout("mflux", "text_encoder_2", "t5_blocks.0.attention.SelfAttention.q.weight", t5_from_mflux),
    Layout("llama.cpp", "text_encoder_2", "enc.blk.0.attn_q.weight", _t5_gguf),
)


def sources_in(contents: Contents) -> dict[str, Source]:
    """Part -> where it is in this file. Raises CheckpointError for what we refuse, and for files that hold none of them."""
    if contents.gguf:
        part_of(contents.gguf)
    refuse(contents)
    found: dict[str, Source] = {}
    for layout in LAYOUTS:
        for prefix in _PREFIXES[layout.part]:
            if layout.part not in found and prefix + layout.sign in contents.tensors:
                mine = {n.removeprefix(prefix): t for n, t in contents.tensors.items() if n.startswith(prefix)}
                found[layout.part] = Source(contents, layout, mine)
    if not found:
        names = ", ".join(list(contents.tensors)[:3]) or "nothing"
        raise _refusal(contents, f"holds {names}, which is no part of FLUX.1 Kontext", KONTEXT)
    for source in found.values():
        check(contents.where, source.tensors)
        if source.layout.part == "transformer":
            _expect_kontext(source)
    return found


def format_name(source: Source) -> str:
    """For people: whose names, and how the numbers are stored."""
    dtypes = {stored.info.dtype for stored in source.tensors.values()}
    if source.where.gguf:
        kinds = sorted(dtypes - {"F32", "F16", "BF16"}) or sorted(dtypes)
        return f"{source.layout.name} names, GGUF {'/'.join(kinds)}"
    scaled = any(name.endswith((".scale_weight", ".weight_scale")) for name in source.tensors)
    words = {"F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2", "I8": "int8", "U32": "MLX quantized"}
    kinds = [
        word + (" scaled" if scaled and dtype != "U32" else "") for dtype, word in words.items() if dtype in dtypes
    ]
    return ", ".join([f"{source.layout.name} names", *kinds])


_REFUSED: tuple[tuple[str, str, str], ...] = (  # pattern of a tensor's name, what it shows, what to take instead
    (
        r"\.(wscales|smooth|smooth_factor|smooth_orig|wzeros|wcscales)$|\.(qkv_proj|mlp_fc1|mlp_context_fc1)\.",
        "nunchaku SVDQuant, packed for NVIDIA's tensor cores",
        "take a bf16, fp8 or GGUF file of that model",
    ),
    (
        r"\.quant_state\.bitsandbytes__|\.(absmax|quant_map|nested_absmax)$",
        "quantized by bitsandbytes (nf4 or fp4)",
        "take a GGUF or fp8 file of that model",
    ),
    (r"\.SCB$", "quantized by bitsandbytes (int8)", "take a GGUF or fp8 file of that model"),
    (r"\._(data|scale)$", "quantized by quanto", "take a GGUF or fp8 file of that model"),
    (r"\.(qzeros|g_idx)$", "quantized by GPTQ or AWQ", "take a GGUF or fp8 file of that model"),
    (r"\.weight_packed$", "quantized by compressed-tensors", "take a GGUF or fp8 file of that model"),
    (r"^(.*\.)?controlnet_|^input_hint_block\.", "a ControlNet", KONTEXT),
    (r"distilled_guidance_layer\.", "Chroma", KONTEXT),
    (r"single_stream_modulation\.|double_stream_modulation_", "FLUX.2", KONTEXT),
    (r"multimodal_transformer_blocks\.", "an argmax DiffusionKit model", KONTEXT),
    (r"\.(lora_[AB]|lora_up|lora_down)\.", "a LoRA and no model", KONTEXT),
)


def refuse(contents: Contents) -> None:
    """Raises CheckpointError for a file of a kind we know and do not read."""
    for pattern, what, instead in _REFUSED:
        if any(re.search(pattern, name) for name in contents.tensors):
            raise _refusal(contents, f"is {what}", instead)
    if re.search(r"int4|fp4_e2m1", contents.metadata.get("quantization_config", "")):
        raise _refusal(contents, f"is {_REFUSED[0][1]}", _REFUSED[0][2])
    for layer, word in comfy_formats(contents).items():
        if word not in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise"):
            raise _refusal(contents, f"has {layer} in ComfyUI's {word[:40]}", "take the fp8_scaled or bf16 file")


def _expect_kontext(source: Source) -> None:
    """Variants of FLUX.1 that have Kontext's names but are other models."""
    names = source.tensors
    if not any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in names):
        raise _refusal(source.where, "has no guidance (FLUX.1 [schnell], or a model made from it)", KONTEXT)
    for name in ("img_in.weight", "x_embedder.weight"):
        columns = names[name].info.shape[-1:] if name in names and names[name].info.dtype != "U32" else ()
        if columns in ((128,), (384,)):
            kind = "Canny or Depth" if columns == (128,) else "Fill"
            raise _refusal(source.where, f"is FLUX.1 {kind} [dev] ({columns[0]} input channels)", KONTEXT)


def told_apart(source: Source) -> str | None:
    """A notice if nothing says that this is Kontext: FLUX.1 [dev] and Krea have the same names, shapes and dtypes."""
    words = " ".join([source.where.where.name, *source.where.metadata.values()]).lower()
    if "kontext" in words:
        return None
    other = "FLUX.1 Krea [dev]" if "krea" in words else "FLUX.1 [dev]" if re.search(r"flux\.?1?.?dev", words) else None
    if other:
        return f"{source.where.where.name} calls itself {other}, which was not trained to edit; {KONTEXT}"
    return f"nothing in {source.where.where.name} tells FLUX.1 Kontext [dev] from [dev] or Krea, which cannot edit"


def blocks(tensors: Mapping[str, object], prefix: str) -> int:
    """How many blocks there are under `prefix`."""
    return len(_indices(tensors, prefix))


def _refusal(contents: Contents, what: str, instead: str) -> CheckpointError:
    return CheckpointError(_line(f"{contents.where} {what}; this version does not read that: {instead}"))

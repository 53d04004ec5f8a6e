"""The other side of the parity tests: FLUX.1 Kontext as diffusers and transformers run it.

`build` writes small pipelines with random weights in diffusers' folder layout, `run` edits with one and keeps every number
on the way, `diffusers_from_ours` reads a folder of ours back into diffusers. The name tables here were written from
BFL's and diffusers' own sources, on purpose not from mlx_kontext: each would show a mistake in the other.
"""

import io
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

torch.set_num_threads(2)
torch.set_grad_enabled(False)
diffusers_logging.set_verbosity_error()  # a truncated prompt is a case here, not an accident
transformers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

Tensors = dict[str, torch.Tensor]
Recording = dict[str, np.ndarray]
"""Everything an edit computes, by name, in the order in which it is computed. Pictures are NHWC."""


# --- small models with random weights ---


@dataclass(frozen=True)
class Shape:
    """The sizes of a small pipeline and the way its files are written."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    t5: dict[str, Any]
    clip: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    """Size buckets (width, height), in place of Kontext's 17 large ones."""
    legacy_end: bool
    """CLIP's config says eos_token_id 2, as the published one does: its pooling then looks for the highest id."""
    tokenizer_json: bool = True
    """False: only vocab.json, merges.txt and spiece.model, what tokenizers were before tokenizer.json."""
    shard: str = "1GB"
    """Largest weight file."""
    scheduler: dict[str, Any] = field(default_factory=dict)


# No two agree in heads, head size, axes, depths, widths or groups; rows and columns get rotary axes of unequal size in
# one; T5's attention is never as wide as its states; MLPs of T5 and CLIP have odd ratios.
SHAPES = {
    "spec": Shape(
        transformer={"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
        | {"num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 64, "pooled_projection_dim": 64},
        vae={"block_out_channels": (32, 64, 64, 96), "layers_per_block": 2, "norm_num_groups": 32},
        t5={"d_model": 64, "d_kv": 32, "num_heads": 4, "d_ff": 192, "num_layers": 3},
        clip={"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 192},
        sizes=((64, 112), (80, 80), (112, 64), (96, 80)),
        legacy_end=True,
        shard="500KB",
    ),
    "narrow": Shape(
        transformer={"num_attention_heads": 2, "attention_head_dim": 24, "axes_dims_rope": (4, 8, 12)}
        | {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 40, "pooled_projection_dim": 32},
        vae={"block_out_channels": (8, 16, 24, 32), "layers_per_block": 1, "norm_num_groups": 4},
        t5={"d_model": 40, "d_kv": 16, "num_heads": 3, "d_ff": 104, "num_layers": 2},
        clip={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 128},
        sizes=((64, 96), (80, 80), (96, 64)),
        legacy_end=False,
        tokenizer_json=False,
    ),
    "deep": Shape(
        transformer={"num_attention_heads": 3, "attention_head_dim": 16, "axes_dims_rope": (2, 6, 8)}
        | {"num_layers": 4, "num_single_layers": 2, "joint_attention_dim": 48, "pooled_projection_dim": 48},
        vae={"block_out_channels": (16, 16, 48, 32), "layers_per_block": 3, "norm_num_groups": 8}
        | {"scaling_factor": 0.5, "shift_factor": -0.07},
        t5={"d_model": 48, "d_kv": 8, "num_heads": 8, "d_ff": 80, "num_layers": 5},
        clip={"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 112},
        sizes=((48, 112), (64, 64), (112, 48)),
        legacy_end=False,
        scheduler={"base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 128, "max_image_seq_len": 2048},
    ),
}

CORPUS = (
    "make the red car blue, please",
    "change the sky to a sunset with 2 moons",
    "remove the dog's hat and don't touch the rest!",
    "give her a scarf (test:1.2) in café colours: naïve ½",
    "Put the Small cat on the BIG square; it is red",
    "turn the circle into a star, keep everything else as it was",
)


def build(folder: Path, shape: Shape, seed: int) -> None:
    """Write a FluxKontextPipeline of this shape with weights of this seed, fp32, and our `resolutions` beside it."""
    clip_files, t5_files = clip_tokenizer_files(folder.parent / "clip"), t5_tokenizer_files(folder.parent / "t5")
    tokenizer, tokenizer_2 = CLIPTokenizer.from_pretrained(clip_files), T5Tokenizer.from_pretrained(t5_files)
    end = tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    pipe = FluxKontextPipeline(
        transformer=FluxTransformer2DModel(in_channels=64, guidance_embeds=True, **shape.transformer),
        vae=AutoencoderKL(
            **{"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159} | shape.vae,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                bos_token_id=0 if shape.legacy_end else end - 1,
                eos_token_id=2 if shape.legacy_end else end,
                pad_token_id=1 if shape.legacy_end else end,
                projection_dim=shape.clip["hidden_size"],
                **shape.clip,
            )
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=math.ceil(len(tokenizer_2) / 64) * 64,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                is_encoder_decoder=False,
                use_cache=False,
                **shape.t5,
            )
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shape.scheduler),
    )
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        randomise(part, generator)
    pipe.save_pretrained(folder, max_shard_size=shape.shard)
    if not shape.tokenizer_json:
        for name, files in (("tokenizer", clip_files), ("tokenizer_2", t5_files)):
            shutil.rmtree(folder / name)
            shutil.copytree(files, folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"resolutions": shape.sizes}))


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Normal weights of a size that keeps activations near 1. Gains vary too: ones would hide a norm that is swapped."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        elif name.endswith("weight"):
            parameter.normal_(1, 0.2, generator=generator)
        else:
            parameter.normal_(0, 0.1, generator=generator)


def clip_tokenizer_files(folder: Path) -> Path:
    """A byte-level BPE in CLIP's own files: 256 bytes, the same ending a word, merges, and the two special tokens last."""
    if folder.exists():
        return folder
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([line.lower() for line in CORPUS], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"])
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocab)}), "utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n", "utf-8"
    )
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special["unk_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def t5_tokenizer_files(folder: Path) -> Path:
    """A sentencepiece unigram model with T5's normalisation and ids: pad 0, end 1, unknown 2."""
    if folder.exists():
        return folder
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=150,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 100,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
    return folder


# --- an edit, step by step ---


def load(folder: Path) -> FluxKontextPipeline:
    """The pipeline that `build` wrote, read from its files."""
    pipe = FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    pipe: FluxKontextPipeline,
    *,
    size: tuple[int, int],
    sizes: tuple[tuple[int, int], ...],
    latents: np.ndarray | None = None,
    seed: int | None = None,
    auto_resize: bool = True,
    **options: Any,
) -> Recording:
    """Edit at exactly `size` (width, height) with `sizes` as buckets; `options` are diffusers' own keywords."""
    width, height = size
    record: Recording = {}
    passes: list[np.ndarray] = []

    def after_transformer(_: Any, __: Any, inputs: dict[str, Any], outputs: tuple[torch.Tensor]) -> None:
        which = " (negative prompt)" if len(passes) % len(prompts) else ""
        record.setdefault(f"pooled{which}", to_numpy(inputs["pooled_projections"]))
        record.setdefault(f"text{which}", to_numpy(inputs["encoder_hidden_states"]))
        record.setdefault("tokens", to_numpy(inputs["hidden_states"]))
        record[f"pass {len(passes) // len(prompts) + 1}{which}"] = to_numpy(outputs[0])
        passes.append(outputs[0])

    def after_encoder(_: Any, __: Any, moments: torch.Tensor) -> None:
        record["moments"] = to_numpy(moments.permute(0, 2, 3, 1))

    def after_decoder(_: Any, __: Any, decoded: torch.Tensor) -> None:
        record["decoded"] = to_numpy(decoded.permute(0, 2, 3, 1))

    def step(velocity: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        record[f"velocity {len(passes) // len(prompts)}"] = to_numpy(velocity)
        return original_step(velocity, *args, **kwargs)

    def after_step(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        record["latents"] = to_numpy(values["latents"])
        return values

    prompts = [options[key] for key in ("prompt", "negative_prompt") if options.get(key) is not None]
    original_step = pipe.scheduler.step
    hooks = [
        pipe.transformer.register_forward_hook(after_transformer, with_kwargs=True),
        pipe.vae.encoder.register_forward_hook(after_encoder),
        pipe.vae.decoder.register_forward_hook(after_decoder),
    ]
    try:
        with (
            mock.patch.object(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", list(sizes)),
            mock.patch.object(pipe.scheduler, "step", step),
        ):
            image = pipe(
                width=width,
                height=height,
                max_area=width * height,
                latents=None if latents is None else torch.from_numpy(latents),
                generator=None if seed is None else torch.Generator("cpu").manual_seed(seed),
                _auto_resize=auto_resize,
                callback_on_step_end=after_step,
                **options,
            ).images[0]
    finally:
        for hook in hooks:
            hook.remove()
    last = {name: record.pop(name) for name in ("latents", "decoded")}
    return {"sigmas": to_numpy(pipe.scheduler.sigmas)} | record | last | {"image": np.array(image)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy().copy()


# --- names: BFL's and diffusers' ---


def transformer_names(double: int, single: int) -> dict[str, list[str]]:
    """BFL tensor -> the tensors of diffusers that lie in it, one below the other.

    `final_layer.adaLN_modulation.1` is the one that also differs in order: BFL stores shift above scale.
    """
    layers: dict[str, list[str]] = {
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "final_layer.linear": ["proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    }
    for ours, theirs in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
        layers[f"{ours}_in.in_layer"] = [f"time_text_embed.{theirs}_embedder.linear_1"]
        layers[f"{ours}_in.out_layer"] = [f"time_text_embed.{theirs}_embedder.linear_2"]
    gains: dict[str, list[str]] = {}
    for i in range(double):
        bfl, block = f"double_blocks.{i}", f"transformer_blocks.{i}"
        layers |= {
            f"{bfl}.img_mod.lin": [f"{block}.norm1.linear"],
            f"{bfl}.txt_mod.lin": [f"{block}.norm1_context.linear"],
            f"{bfl}.img_attn.qkv": [f"{block}.attn.to_{x}" for x in "qkv"],
            f"{bfl}.txt_attn.qkv": [f"{block}.attn.add_{x}_proj" for x in "qkv"],
            f"{bfl}.img_attn.proj": [f"{block}.attn.to_out.0"],
            f"{bfl}.txt_attn.proj": [f"{block}.attn.to_add_out"],
            f"{bfl}.img_mlp.0": [f"{block}.ff.net.0.proj"],
            f"{bfl}.img_mlp.2": [f"{block}.ff.net.2"],
            f"{bfl}.txt_mlp.0": [f"{block}.ff_context.net.0.proj"],
            f"{bfl}.txt_mlp.2": [f"{block}.ff_context.net.2"],
        }
        gains |= {
            f"{bfl}.img_attn.norm.query_norm.scale": [f"{block}.attn.norm_q.weight"],
            f"{bfl}.img_attn.norm.key_norm.scale": [f"{block}.attn.norm_k.weight"],
            f"{bfl}.txt_attn.norm.query_norm.scale": [f"{block}.attn.norm_added_q.weight"],
            f"{bfl}.txt_attn.norm.key_norm.scale": [f"{block}.attn.norm_added_k.weight"],
        }
    for i in range(single):
        bfl, block = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        layers |= {
            f"{bfl}.modulation.lin": [f"{block}.norm.linear"],
            f"{bfl}.linear1": [*(f"{block}.attn.to_{x}" for x in "qkv"), f"{block}.proj_mlp"],
            f"{bfl}.linear2": [f"{block}.proj_out"],
        }
        gains |= {
            f"{bfl}.norm.query_norm.scale": [f"{block}.attn.norm_q.weight"],
            f"{bfl}.norm.key_norm.scale": [f"{block}.attn.norm_k.weight"],
        }
    kinds = ("weight", "bias")
    return {f"{bfl}.{kind}": [f"{x}.{kind}" for x in parts] for bfl, parts in layers.items() for kind in kinds} | gains


def vae_names(levels: int, layers: int) -> dict[str, str]:
    """BFL tensor of `ae.safetensors` -> diffusers' tensor. Decoder levels count from opposite ends."""

    def resnet(bfl: str, theirs: str) -> dict[str, str]:
        parts = {x: x for x in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
        return {f"{bfl}.{ours}": f"{theirs}.{name}" for ours, name in parts.items()}

    names: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names |= {f"{side}.norm_out": f"{side}.conv_norm_out"}
        for i in (0, 1):
            names |= resnet(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        names |= {f"{side}.mid.attn_1.{x}": f"{side}.mid_block.attentions.0.{y}" for x, y in attention.items()}
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        names |= {f"encoder.down.{i}.downsample.conv": f"{down}.downsamplers.0.conv"}
        names |= {f"decoder.up.{i}.upsample.conv": f"{up}.upsamplers.0.conv"}
        for j in range(layers):
            names |= resnet(f"encoder.down.{i}.block.{j}", f"{down}.resnets.{j}")
        for j in range(layers + 1):
            names |= resnet(f"decoder.up.{i}.block.{j}", f"{up}.resnets.{j}")
    return {f"{bfl}.{kind}": f"{theirs}.{kind}" for bfl, theirs in names.items() for kind in ("weight", "bias")}


def transformer_to_ours(model: FluxTransformer2DModel) -> Tensors:
    """The tensors of diffusers' transformer under our names. Works on the meta device too."""
    theirs = model.state_dict()
    names = transformer_names(model.config.num_layers, model.config.num_single_layers)
    assert sorted(theirs) == sorted(x for parts in names.values() for x in parts)
    ours = {name: torch.cat([theirs[x] for x in parts]) for name, parts in names.items()}
    return {name: swap_halves(name, value) for name, value in ours.items()}


def transformer_from_ours(ours: Tensors, model: FluxTransformer2DModel) -> None:
    """Inverse of `transformer_to_ours`, into `model`."""
    names = transformer_names(model.config.num_layers, model.config.num_single_layers)
    assert sorted(ours) == sorted(names)
    shapes = model.state_dict()
    theirs: Tensors = {}
    for name, parts in names.items():
        rows = [shapes[x].shape[0] for x in parts]
        theirs |= dict(zip(parts, swap_halves(name, ours[name]).split(rows), strict=True))
    model.load_state_dict(theirs)


def swap_halves(name: str, value: torch.Tensor) -> torch.Tensor:
    if not name.startswith("final_layer.adaLN_modulation.1."):
        return value
    first, second = value.chunk(2)
    return torch.cat([second, first])


def vae_to_ours(model: AutoencoderKL) -> Tensors:
    """The tensors of diffusers' VAE under our names: convolutions OHWI, attention's linear layers as 1x1 convolutions."""
    theirs, ours = model.state_dict(), {}
    for name, source in vae_names(len(model.config.block_out_channels), model.config.layers_per_block).items():
        if source in theirs:  # a level has a shortcut only where it changes width, and the last has no resampling
            value = theirs.pop(source)
            if is_attention_matrix(name):
                value = value[:, :, None, None]
            ours[name] = value.permute(0, 2, 3, 1) if value.ndim == 4 else value
    assert not theirs
    return ours


def vae_from_ours(ours: Tensors, model: AutoencoderKL) -> None:
    """Inverse of `vae_to_ours`, into `model`."""
    names, theirs = vae_names(len(model.config.block_out_channels), model.config.layers_per_block), {}
    for name, value in ours.items():
        value = value.permute(0, 3, 1, 2) if value.ndim == 4 else value
        theirs[names[name]] = value[:, :, 0, 0] if is_attention_matrix(name) else value
    model.load_state_dict(theirs)


def is_attention_matrix(name: str) -> bool:
    return name.endswith(".weight") and ".attn_1." in name and ".norm." not in name


# --- our folder, in diffusers ---


def diffusers_from_ours(folder: Path) -> FluxKontextPipeline:
    """A model folder in our own format (design.md §6) as a FluxKontextPipeline in fp32."""
    transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder / "transformer"))
    transformer_from_ours(read_tensors(folder / "transformer"), transformer)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    vae_from_ours(read_tensors(folder / "vae"), vae)
    t5 = T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder_2", dtype=torch.float32))
    states = read_tensors(folder / "text_encoder_2")
    t5.load_state_dict(states | {"encoder.embed_tokens.weight": states["shared.weight"]})
    clip = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder", dtype=torch.float32))
    bare = {name.removeprefix("text_model."): value for name, value in read_tensors(folder / "text_encoder").items()}
    clip.load_state_dict(bare)
    pipe = FluxKontextPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=clip.eval(),
        text_encoder_2=t5.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_tensors(part: Path) -> Tensors:
    """All tensors of one part, in fp32, however many files they are in."""
    files = sorted(part.glob("*.safetensors"))
    assert files, part
    return {name: value.float() for path in files for name, value in load_file(path).items()}

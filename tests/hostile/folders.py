"""Model folders: damaged JSON, sizes that no model has, shards that lead elsewhere, packings that do not fit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kontext.backend import mx
from tests.hostile.carrier import HARMLESS, HEADER, NUMBERS, PARTS, Carrier, Case, rejson, whole, write
from tests.hostile.files import PAGE, PICKLE
from tests.hostile.ggufs import gguf
from tests.hostile.tensors import FIRST, LAST, QKV

NAN, ESCAPES = float("nan"), "\x1b[2J\n" + "x" * 10**6
INDEX, WEIGHTS, SHARD = (
    "transformer/model.safetensors.index.json",
    "transformer/model.safetensors",
    "transformer/a.safetensors",
)


def folder(told: str, alter: Callable[[Path], object], refused: str = HEADER) -> Case:
    def make(place: Path, carrier: Carrier) -> Path:
        model = carrier.copy(place / "model")
        alter(model)
        return model

    return Case(make, told, ("model",), refused)


def instead(told: str, name: str, content: Any, refused: str = HEADER) -> Case:
    """content: of the file, None for no file, or a function that makes something else of that name."""

    def alter(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        if callable(content):
            content(model / name)
        elif content is not None:
            write(model / name, content)

    return folder(told, alter, refused)


def to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


# --- JSON ---

OBJECTS = b'{"a":[' + b'{"":0},' * 1_190_000 + b"0]}"
DAMAGE: dict[str, tuple[Any, str]] = {
    "empty": (b"", "not readable JSON"),
    "cut": (b'{"a": [1, 2', "not readable JSON"),
    "a list": ([], "expected a JSON object"),
    "null": (b"null", "expected a JSON object"),
    "a web page": (PAGE, "not readable JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not readable JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not readable JSON"),
    "deep": (b"[" * 10**6, "not readable JSON"),
    "a million objects": (OBJECTS, "over half a million values"),
    "over 8 MB": (b'{"a": "' + b"x" * 2**23 + b'"}', "over 8 MB"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
    "a pipe": (os.mkfifo, "is missing|no model_index"),
    "a device": (to_device, "is missing|no model_index"),
    "a folder": (Path.mkdir, "is missing|no model_index"),
    "gone": (None, "is missing|no model_index"),
}
FILES = ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS))
JSON: dict[str, Case] = {
    f"{name} is {what}": instead(told, name, content)
    for name in FILES
    for what, (content, told) in DAMAGE.items()
    if name in FILES[:3] or not isinstance(content, bytes)  # they are read by one function
}


def said(told: str, refused: str = HEADER, **values: Any) -> Case:
    return folder(told, lambda model: rejson(model / "model_index.json", **values), refused)


WRONG_SIZES = (
    [],
    [[0, 0]],
    [[-32, 32]],
    [[33, 32]],
    [[2**40, 32]],
    [["32", "32"]],
    "32x32",
    [[32]],
    None,
    [[True, 32]],
    [[32.0, 32]],
)
WRONG_DEFAULTS: tuple[Any, ...] = (
    [], {"x": 1}, {"x\x1b\n" * 999: 1}, {"num_inference_steps": 0}, {"num_inference_steps": 2.5}, {"num_inference_steps": 10**9},
    {"max_sequence_length": 0.5}, {"max_sequence_length": -1}, {"max_sequence_length": "16"}, {"draft_steps": 1.5},
    {"guidance_scale": None}, {"guidance_scale": NAN}, {"draft_scale": 1000}, {"guidance_scale": ESCAPES},
)  # fmt: skip
SAID: dict[str, Case] = {
    "another class": said("holds a StableDiffusion", _class_name="StableDiffusionPipeline"),
    "class of a megabyte": said("expected FluxKontextPipeline", _class_name=ESCAPES),
    "class is a list": said("expected FluxKontextPipeline", _class_name=["KontextPipeline"]),
    **{f"resolutions {x!r:.30}": said("resolutions is", resolutions=x) for x in (*WRONG_SIZES, [ESCAPES])},
    "100,000 resolutions": said("", HARMLESS, resolutions=[[32, 32]] * 10**5),
    "pictures of 32,768": said("", HARMLESS, resolutions=[[2**15, 2**15]]),
    **{f"defaults {x!r:.60}": said("defaults", defaults=x) for x in WRONG_DEFAULTS},
}

# --- sizes ---


def config(told: str, part: str, refused: str = HEADER, **values: Any) -> Case:
    file = f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
    return folder(told, lambda model: rejson(model / file, **values), refused)


MANY, NO_MODEL, BELONG = 10**6, "download the model again", "are these parts of one model|fit config.json"
VALUES: dict[str, dict[str, tuple[str, tuple[Any, ...]]]] = {
    "transformer": {
        "num_layers": ("num_layers is|blocks 64 wide", (0, -1, 2**20, MANY, True, ESCAPES, [1], 1.0, None)),
        "num_single_layers": ("num_single_layers is|blocks 64 wide", (MANY, "1")),
        "num_attention_heads": ("blocks 33554432 wide", (2**20,)),
        "attention_head_dim": ("as a head is wide", (2**20, 31, 64)),
        "joint_attention_dim": (BELONG, (65, 2**20)),
        "pooled_projection_dim": (BELONG, (2**20,)),
        "in_channels": (BELONG, (128,)),
        "axes_dims_rope": (
            "axes_dims_rope is",
            ([16, 16], [9, 11, 12], [2**16, 12, 12], [8, 12, 12, 2], [], "8,12,12", [8] * 10**5, [2, 2, 2], [8, 12, 12.0]),
        ),
        "guidance_embeds": ("guidance_embeds is", (False, ESCAPES)),
        "patch_size": ("patch_size is", (2,)),
    },
    "vae": {
        "block_out_channels": ("block_out_channels is|at each width of", ([32] * 60, [32] * 10**5, [0, 32, 32, 32], [33])),
        "norm_num_groups": ("norm_num_groups is|normed in", (0, 7, 64, 2**20)),
        "layers_per_block": ("blocks at each width", (MANY,)),
        "latent_channels": (BELONG, (8, 2**20)),
        "in_channels": ("4 channels in", (4,)),
        "scaling_factor": ("scal", (0, 1e-9, 1e9, NAN, float("inf"), "1")),
        "shift_factor": ("shift_factor is", (NAN, "0", None)),
        "use_quant_conv": ("use_quant_conv is", (True,)),
    },
    "text_encoder": {
        "num_attention_heads": ("of 3 heads|of 1048576 heads", (3, 2**20)),
        "num_hidden_layers": ("num_hidden_layers is|layers 64 wide", (MANY, 2**20, 0)),
        "vocab_size": ("tokens up to 714", (10,)),
        "max_position_embeddings": ("CLIP reads 77", (1,)),
        "hidden_size": (BELONG, (2**20,)),
        "hidden_act": ("hidden_act is", ("relu", ESCAPES)),
        "layer_norm_eps": ("layer_norm_eps", (-1, 0, "1e-5")),
    },
    "text_encoder_2": {
        "num_layers": ("num_layers is|layers of", (MANY, 2**20, 0)),
        "vocab_size": ("tokens up to 296", (10,)),
        "d_kv": ("heads 1048576 wide", (2**20,)),
        "relative_attention_num_buckets": ("T5 has 32", (1, 2**20)),
        "layer_norm_epsilon": ("layer_norm_epsilon", (-1, 0, NAN)),
        "feed_forward_proj": ("feed_forward_proj is", ("relu",)),
    },
    "scheduler": {
        "max_image_seq_len": ("the shift goes from", (256, 257, 1)),
        "base_image_seq_len": ("base_image_seq_len is|the shift goes", (0, 2**20)),
        "base_shift": ("the shift goes from|base_shift is", (999999, -999999, NAN, 1e9)),
        "max_shift": ("the shift goes from|max_shift is", (999999, NAN, "1")),
        "use_dynamic_shifting": ("use_dynamic_shifting is", (False,)),
    },
}  # fmt: skip


def of_size(told: str, part: str, shapes: dict[str, tuple[int, ...]], **sizes: int) -> Case:
    """Tensors and config agree on sizes that the other parts do not have."""

    def alter(model: Path) -> None:
        file = model / part / "model.safetensors"
        tensors = {name: np.array(value) for name, value in mx.load(str(file)).items()}
        write(file, whole(tensors | {name: np.zeros(shape, "f4") for name, shape in shapes.items()}))
        rejson(model / part / "config.json", **sizes)

    return folder(told, alter)


POSITIONS, VECTOR, T5_BIAS = (
    "text_model.embeddings.position_embedding.weight",
    "vector_in.in_layer.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
)
LAST_96 = {FIRST["transformer"]: (64, 96), LAST["transformer"]: (96, 64), "final_layer.linear.bias": (96,)}
SIZES: dict[str, Case] = {
    f"{part}: {key} {value!r:.30}": config(told, part, **{key: value})
    for part, keys in VALUES.items()
    for key, (told, values) in keys.items()
    for value in values
} | {
    "transformer: a block more": config("missing", "transformer", NUMBERS, num_layers=2),
    "VAE: one level": config("fit", "vae", NUMBERS, block_out_channels=[32]),
    "VAE: very wide": config("fit", "vae", NUMBERS, block_out_channels=[2**16] * 4),
    "CLIP: large vocabulary": config("fit", "text_encoder", NUMBERS, vocab_size=2**20),
    "T5: another number of heads": config("fit", "text_encoder_2", NUMBERS, num_heads=3),
    "T5: distance of 1": config("", "text_encoder_2", HARMLESS, relative_attention_max_distance=1),
    "T5: distance of 2^20": config("", "text_encoder_2", HARMLESS, relative_attention_max_distance=2**20),
    "CLIP of 10 tokens": of_size("tokens up to 714", "text_encoder", {FIRST["text_encoder"]: (10, 64)}, vocab_size=10),
    "CLIP of 8 positions": of_size("CLIP reads 77", "text_encoder", {POSITIONS: (8, 64)}, max_position_embeddings=8),
    "T5 of 10 tokens": of_size("tokens up to 296", "text_encoder_2", {"shared.weight": (10, 64)}, vocab_size=10),
    "T5 of 2^20 buckets": of_size("T5 has", "text_encoder_2", {T5_BIAS: (2**20, 1)}, relative_attention_num_buckets=2**20),
    "for another T5": of_size("takes 96", "transformer", {"txt_in.weight": (64, 96)}, joint_attention_dim=96),
    "for another CLIP": of_size("takes 96", "transformer", {VECTOR: (64, 96)}, pooled_projection_dim=96),
    "for another VAE": of_size("takes 96", "transformer", LAST_96, in_channels=96),
    "VAE of four channels": of_size("channels in", "vae", {FIRST["vae"]: (32, 3, 3, 4)}, in_channels=4),
}  # fmt: skip

# --- shards ---


def index(shard: Any, told: str) -> Case:
    """Every tensor is said to be in this shard."""

    def alter(model: Path) -> None:
        (model / WEIGHTS).rename(model / SHARD)
        write(model / INDEX, {"weight_map": {"img_in.weight": shard, QKV: shard}})

    return folder(told, alter)


def linked(target: str, told: str) -> Case:
    def alter(model: Path) -> None:
        write(model / INDEX, {"weight_map": {"a": "a.safetensors"}})
        (model / SHARD).symlink_to(target)

    return folder(told, alter)


def doubled(model: Path) -> None:
    os.link(model / WEIGHTS, model / SHARD)
    write(model / INDEX, {"weight_map": {"a": "model.safetensors", "b": "a.safetensors"}})


def to_bin(model: Path) -> None:
    (model / "vae/model.safetensors").rename(model / "vae/pytorch_model.bin")


def named(count: int) -> dict[str, Any]:
    return {"weight_map": {f"{i}": "model.safetensors" for i in range(count)}}


ELSEWHERE, NONE, VAE = (
    "expected a safetensors file beside it|leads elsewhere|is missing",
    "no model.safetensors",
    "vae/model.safetensors",
)
NAMES: tuple[Any, ...] = (
    "../vae/model.safetensors", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "sub/a.safetensors",
    "..\\model.safetensors", "C:\\a.safetensors", "~/a.safetensors", "file:///etc/passwd.safetensors", "a.safetensors\n",
    "a.safetensors\0", "a.safetensors/", "\x1b[2Ja.safetensors", "model.bin", "n" * 10**5 + ".safetensors", None, 7,
    ["a.safetensors"], {"a": "b"}, "gone.safetensors",
)  # fmt: skip
SHARDS: dict[str, Case] = {
    **{f"shard {name!r:.30}": index(name, ELSEWHERE) for name in NAMES},
    **{
        f"link to {target}": linked(target, "leads elsewhere")
        for target in ("/etc/passwd", "../vae/model.safetensors", "/dev/zero")
    },
    "link to itself": linked("a.safetensors", "cannot be read|missing"),
    "same tensors in two shards": folder("in another shard too", doubled),
    "index of 30,000 names": instead("", INDEX, named(30_000), HARMLESS),
    "index of 50,000 names": instead("some thousand tensor names", INDEX, named(50_000)),
    "index of 100,000 names": instead("too long", INDEX, named(100_000)),
    "index that is a web page": instead("damaged", INDEX, PAGE),
    "index without a map": instead("no weight_map", INDEX, {"metadata": {}}),
    "index over 8 MB": instead("over 8 MB", INDEX, b"{}".ljust(2**23 + 1)),
    "index that is a pipe": instead("", INDEX, os.mkfifo, HARMLESS),
    **{f"{part}: no weights": instead(NONE, f"{part}/model.safetensors", None) for part in PARTS},
    "weights are a pipe": instead(NONE, VAE, os.mkfifo),
    "weights are a device": instead(NONE, VAE, to_device),
    "weights are a folder": instead(NONE, VAE, Path.mkdir),
    "weights are a pickle": instead("pickle", VAE, PICKLE),
    "weights are a GGUF": instead("is a GGUF file", VAE, gguf()),
    "weights called .bin": folder("found config.json, pytorch_model.bin", to_bin),
}

# --- quantization ---


def packed(block: Any, told: str, refused: str = HEADER) -> Case:
    """The transformer's first projection is packed in groups of 32 with 4 bits, and this is said of it."""

    def alter(model: Path) -> None:
        tensors = {name: np.array(value) for name, value in mx.load(str(model / WEIGHTS)).items()}
        for suffix, value in zip(
            ("weight", "scales", "biases"), mx.quantize(mx.array(tensors[QKV]), 32, 4), strict=True
        ):
            tensors[QKV.replace("weight", suffix)] = np.array(value)
        write(model / WEIGHTS, whole(tensors))
        rejson(model / "transformer/config.json", quantization=block)

    return folder(told, alter, refused)


GOOD = {"group_size": 32, "bits": 4}
BLOCKS: tuple[Any, ...] = (
    None, [], "q4", {}, {"group_size": 32}, {"bits": 4}, GOOD | {"bits": 7}, GOOD | {"group_size": 0}, GOOD | {"group_size": -32},
    GOOD | {"group_size": 2**40}, {"group_size": "32", "bits": "4"}, {"group_size": 32.0, "bits": 4.0}, GOOD | {"group_size": True},
    GOOD | {"mode": "nf4"}, GOOD | {"mode": ESCAPES}, GOOD | {"img_in": {"bits": 4}}, GOOD | {ESCAPES: {}},
    {"group_size": [32], "bits": {"a": 4}},
)  # fmt: skip
OTHERS = (GOOD | {"bits": 8}, GOOD | {"group_size": 64}, GOOD | {"mode": "mxfp4"})
QUANTIZED = {f"said {x!r:.60}": packed(x, "quantiz") for x in BLOCKS}
QUANTIZED |= {f"said {x!r:.60}": packed(x, "fit|in groups of", NUMBERS) for x in OTHERS}

CASES = JSON | SAID | SIZES | SHARDS | QUANTIZED

"""Sound safetensors files of wrong tensors: parts of a model, alone or over the carrier, and scales of packed weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kontext.backend import mx
from tests.hostile.carrier import HARMLESS, HEADER, NUMBERS, PARTS, Carrier, Case, Tensors, hollow, whole, write

Alter = Callable[[Tensors], Any]
"""Changes tensors; may return dtypes that numpy does not have, by name."""

QKV = "double_blocks.0.img_attn.qkv.weight"
FIRST = {
    "transformer": "img_in.weight",
    "vae": "encoder.conv_in.weight",
    "text_encoder": "text_model.embeddings.token_embedding.weight",
    "text_encoder_2": "shared.weight",
}
LAST = {
    "transformer": "final_layer.linear.weight",
    "vae": "decoder.conv_out.weight",
    "text_encoder": "text_model.final_layer_norm.weight",
    "text_encoder_2": "encoder.final_layer_norm.weight",
}
BLOCK = {
    "transformer": "double_blocks.{}.img_mod.lin.bias",
    "vae": "encoder.down.{}.downsample.conv.bias",
    "text_encoder": "text_model.encoder.layers.{}.layer_norm1.bias",
    "text_encoder_2": "encoder.block.{}.layer.0.layer_norm.weight",
}


def altered(part: str, told: str, alter: Alter, refused: str = NUMBERS, *, in_folder: bool = False) -> Case:
    """The carrier's part with some tensors changed, as a file of its own; in_folder: and in the place of the carrier's."""

    def make(folder: Path, carrier: Carrier) -> Path:
        tensors = dict(carrier.tensors[part])
        words = alter(tensors)
        return write(folder / "kontext.safetensors", whole(tensors, words if isinstance(words, dict) else None))

    return Case(make, told, (part, f"{part}/model.safetensors") if in_folder else (part,), refused)


def filled(name: str, number: float) -> Alter:
    return lambda tensors: tensors.update({name: np.full_like(tensors[name], number)})


def spoiled(name: str, number: float) -> Alter:
    """One number among many."""

    def alter(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[-1] = number

    return alter


def shaped(name: str, *shape: int) -> Alter:
    return lambda tensors: tensors.update({name: np.zeros(shape, "f4")})


def typed(name: str, dtype: str) -> Alter:
    return lambda tensors: tensors.update({name: tensors[name].astype(dtype)})


def more(*names: str) -> Alter:
    return lambda tensors: tensors.update(dict.fromkeys(names, np.zeros(1, "f4")))


def replaced(part: str) -> Case:
    other = PARTS[PARTS.index(part) - 1]

    def make(folder: Path, carrier: Carrier) -> Path:
        return write(folder / "kontext.safetensors", whole(carrier.tensors[other]))

    return Case(make, "was given as|missing|fit", (part, f"{part}/model.safetensors"), NUMBERS)


def wrong(part: str) -> dict[str, Case]:
    first, last, fit = FIRST[part], LAST[part], "misshaped|shapes|fit"
    blocks = [BLOCK[part].format(i) for i in range(2, 1000)]
    damaged = partial(altered, part, in_folder=part == "transformer")
    return {
        "NaN in the first tensor": damaged("not finite", filled(first, np.nan)),
        "NaN in the last tensor": damaged("not finite", spoiled(last, np.nan)),
        "infinity": damaged("not finite", spoiled(last, -np.inf)),
        "3e38 everywhere": damaged("not finite", filled(first, 3e38), HARMLESS),
        "zeros everywhere": damaged("", lambda t: t.update({n: np.zeros_like(v) for n, v in t.items()}), HARMLESS),
        "a tensor less": damaged("missing", lambda t: t.pop(last) is None),
        "a tensor more": damaged("1 unexpected", more("x" * 256)),
        "a thousand more": damaged("1000 unexpected", more(*(f"{i}{'y' * 250}" for i in range(1000)))),
        "a thousand blocks": damaged("unexpected|misshaped|missing", more(*blocks)),
        "five dimensions": damaged(fit, shaped(last, 1, 1, 1, 1, 1)),
        "no dimensions": damaged(fit, shaped(first)),
        "size 0": damaged(fit, shaped(first, 0, 64)),
        "int64": damaged("is I64", typed(first, "i8"), HEADER),
        "float64": damaged("is F64", typed(first, "f8"), HEADER),
        "bytes": damaged("is U8", typed(first, "u1"), HEADER),
        "words without scales": damaged("is U32|scales is missing", typed(first, "u4"), HEADER),
        "another part": replaced(part),
    }  # fmt: skip


# --- a transformer by itself, whose sizes are read from its tensors ---

ALONE: dict[str, tuple[int, ...]] = {
    QKV: (384, 128),
    "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
    "single_blocks.0.linear1.weight": (896, 128),
    "guidance_in.in_layer.weight": (128, 256),
    "img_in.weight": (128, 64),
    "img_in.bias": (128,),
    "txt_in.weight": (128, 64),
    "vector_in.in_layer.weight": (128, 64),
    "final_layer.linear.bias": (64,),
}


def alone(told: str, refused: str = HEADER, **shapes: tuple[int, ...]) -> Case:
    """Keys have __ for dots."""
    changes = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return Case(lambda folder, _: hollow(folder / "kontext.safetensors", ALONE | changes), told, ("alone",), refused)


NO_SUCH, TAKES = "shapes that no such model has", "are these parts of one model"
SIZES: dict[str, Case] = {
    "no more than sizes": alone("missing", NUMBERS),
    "9,999 blocks": alone("blocks 128 wide", **{f"double_blocks__{i}__x": (1,) for i in range(1, 9999)}),
    "heads of 0": alone("heads are 0 wide", double_blocks__0__img_attn__norm__query_norm__scale=(0,)),
    "head without dimensions": alone(NO_SUCH, double_blocks__0__img_attn__norm__query_norm__scale=()),
    "0 wide": alone(NO_SUCH, img_in__bias=(0,)),
    "2^30 wide": alone("blocks 1073741824 wide", img_in__bias=(2**30,)),
    "no channels": alone(NO_SUCH, final_layer__linear__bias=(0,)),
    "another T5": alone(TAKES, txt_in__weight=(128, 96)),
    "text of no width": alone(NO_SUCH, txt_in__weight=(128, 0)),
    "text of one dimension": alone(NO_SUCH, txt_in__weight=(128,)),
    "another CLIP": alone(TAKES, vector_in__in_layer__weight=(128, 2**30)),
    "another VAE": alone(TAKES, final_layer__linear__bias=(128,)),
}


# --- fp8, and MLX's groups ---


def fp8(
    told: str,
    scale: Any,
    refused: str = NUMBERS,
    part: str = "transformer",
    name: str = QKV,
    code: int = 0x38,
    **rest: Any,
) -> Case:
    """One layer in fp8, all of it the same code (0x38 is 1), and its `scale_weight`."""

    def alter(tensors: Tensors) -> dict[str, str]:
        stem = name.removesuffix("weight")
        tensors[name] = np.full(tensors[name].shape, code, "u1")
        tensors[f"{stem}scale_weight"] = scale if isinstance(scale, np.ndarray) else np.asarray(scale, "f4")
        tensors.update({stem + suffix: np.frombuffer(value, "u1") for suffix, value in rest.items()})
        return {name: "F8_E4M3"}

    return altered(part, told, alter, refused)


def grouped(told: str, alter: Alter, refused: str = HEADER, part: str = "transformer", name: str = QKV) -> Case:
    """One layer as MLX packs it, 4 bits in groups of 32, and then changed."""

    def pack(tensors: Tensors) -> None:
        matrix = tensors.pop(name)
        packed = mx.quantize(mx.array(matrix).reshape(matrix.shape[0], -1), 32, 4)
        mine = {suffix: np.array(value) for suffix, value in zip(("weight", "scales", "biases"), packed, strict=True)}
        alter(mine)
        tensors.update({name.removesuffix("weight") + suffix: value for suffix, value in mine.items()})

    return altered(part, told, pack, refused)


def of_scales(suffix: str) -> dict[str, Case]:
    return {
        "NaN": grouped("not finite", filled(suffix, np.nan), NUMBERS),
        "infinite in one group": grouped("not finite", spoiled(suffix, np.inf), NUMBERS),
        "3e38": grouped("not finite", filled(suffix, 3e38), HARMLESS),
        "a column less": grouped("is packed as", shaped(suffix, 192, 1)),
        "a row less": grouped("is packed as", shaped(suffix, 191, 2)),
        "no columns": grouped("is packed as", shaped(suffix, 192, 0)),
        "one dimension": grouped("is packed as", shaped(suffix, 384)),
        "no dimensions": grouped("is packed as|fit", shaped(suffix), NUMBERS),
        "bytes": grouped("does not read", typed(suffix, "u1")),
        "missing": grouped("is missing", lambda tensors: tensors.pop(suffix) is None),
    }


def notes(folder: Path, carrier: Carrier) -> Path:
    text = '{"layers":[' + '{"":0},' * 590_000 + "0]}"
    return write(
        folder / "kontext.safetensors", whole(carrier.tensors["transformer"], None, {"_quantization_metadata": text})
    )


NO_NUMBER, ONE, NOTES = (
    "not a finite number",
    "expected one number, or one for each of 192 rows",
    "notes on quantization",
)
SCALES: dict[str, Case] = {
    "fp8 NaN": fp8(NO_NUMBER, np.nan),
    "fp8 infinite": fp8(NO_NUMBER, -np.inf),
    "fp8 3e38": fp8("not finite", 3e38, HARMLESS),
    "fp8 0": fp8("", 0, HARMLESS),
    "fp8 negative": fp8("", -1, HARMLESS),
    "fp8 by rows, one NaN": fp8(NO_NUMBER, [np.nan] + [1] * 191),
    "fp8 by rows, one less": fp8(ONE, [1] * 191, HEADER),
    "fp8 by columns": fp8(ONE, np.ones((1, 64), "f4"), HEADER),
    "fp8 none": fp8(ONE, [], HEADER),
    "fp8 five dimensions": fp8(ONE, np.ones((1, 1, 1, 1, 1), "f4"), HEADER),
    "fp8 integers": fp8(ONE, np.ones((), "i4"), HEADER),
    "fp8 bytes": fp8(ONE, np.ones((), "u1"), HEADER),
    "fp8 codes that are NaN": fp8("not finite", 1, code=0x7F),
    "fp8 notes of lists": fp8(NOTES, 1, HEADER, comfy_quant=b"[" * 4000),
    "fp8 notes of noise": fp8(NOTES, 1, HEADER, comfy_quant=bytes(range(256))),
    "fp8 notes of another kind": fp8("in ComfyUI's", 1, HEADER, comfy_quant=b'{"format": "\\u001b[2Jnvfp4"}'),
    "notes of a million objects": Case(notes, NOTES, ("transformer",)),
    "fp8 NaN in T5, which has some": fp8("", 1, HARMLESS, "text_encoder_2", FIRST["text_encoder_2"], 0xFF),
    "fp8 NaN in CLIP": fp8("not finite", 1, NUMBERS, "text_encoder", FIRST["text_encoder"], 0x7F),
    "fp8 NaN in the VAE": fp8("not finite", 1, NUMBERS, "vae", FIRST["vae"], 0xFF),
    **{f"{suffix} {name}": case for suffix in ("scales", "biases") for name, case in of_scales(suffix).items()},
    "words, a column less": grouped("is packed as", lambda t: t.update(weight=t["weight"][:, :-1])),
    "words, no columns": grouped("is packed as", lambda t: t.update(weight=t["weight"][:, :0])),
    "words, one dimension": grouped("does not read", lambda t: t.update(weight=t["weight"].reshape(-1))),
    "words of 64 bits": grouped("is I64", typed("weight", "i8")),
    "a VAE of no columns": grouped("fit|packed", shaped("scales", 32, 0), HEADER, "vae", "encoder.mid.attn_1.q.weight"),
}  # fmt: skip
CASES = (
    {f"{part}: {name}": case for part in PARTS for name, case in wrong(part).items()}
    | {f"alone: {name}": case for name, case in SIZES.items()}
    | SCALES
)

"""LoRA files of wrong ranks, shapes, numbers and notes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.carrier import HARMLESS, HEADER, NUMBERS, Carrier, Case, Tensors, hollow, whole, write

DOWN, UP = np.full((4, 64), 0.01, "f4"), np.full((64, 4), 0.01, "f4")
STEM = "transformer.transformer_blocks.0.attn.to_k"


def pair(down: np.ndarray = DOWN, up: np.ndarray = UP, stem: str = STEM, **more: np.ndarray) -> Tensors:
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up} | {f"{stem}.{k}": v for k, v in more.items()}


def pairs(count: int, stem: str) -> Tensors:
    small = pair(DOWN[:1, :1], UP[:1, :1], "{}")
    return {name.format(stem.format(i)): value for i in range(count) for name, value in small.items()}


def lora(told: str, tensors: Tensors, refused: str = NUMBERS, metadata: Any = None) -> Case:
    return Case(
        lambda folder, _: write(folder / "lora.safetensors", whole(tensors, None, metadata)), told, ("lora",), refused
    )


def alpha(told: str, value: Any, refused: str = NUMBERS, kind: str = "f4") -> Case:
    return lora(told, pair(alpha=np.asarray(value, kind)), refused)


def noted(told: str, text: str, refused: str = NUMBERS) -> Case:
    """What PEFT's metadata says."""
    return lora(told, pair(), refused, {"lora_adapter_metadata": text})


def of_rank(rank: int) -> Case:
    shapes = {f"{STEM}.lora_A.weight": (rank, 64), f"{STEM}.lora_B.weight": (64, rank)}
    return Case(
        lambda folder, _: hollow(folder / "lora.safetensors", shapes), "1 misshaped.*r at most 192", ("lora",), NUMBERS
    )


def a_model(folder: Path, carrier: Carrier) -> Path:
    return write(folder / "lora.safetensors", whole(carrier.tensors["transformer"]))


SHAPES, ALPHA, NUMBER, ESCAPES = "1 misshaped", "one finite number", "expected a number", "\x1b[2J\n" + "x" * 10**6
QKV = np.zeros((192, 4), "f4")
CASES: dict[str, Case] = {
    "rank 0": lora(SHAPES, pair(DOWN[:0], UP[:, :0])),
    "ranks differ": lora(SHAPES, pair(DOWN[:3])),
    **{f"rank {n}": of_rank(n) for n in (193, 10**6, 2**30)},
    "inputs wrong": lora(SHAPES, pair(DOWN[:, :63])),
    "outputs wrong": lora(SHAPES, pair(up=UP[:63])),
    "turned": lora(SHAPES, pair(DOWN.T, UP.T)),
    "one dimension": lora(SHAPES, pair(DOWN.reshape(-1))),
    "no dimensions": lora(SHAPES, pair(np.zeros((), "f4"))),
    "of convolutions": lora(SHAPES, pair(DOWN.reshape(4, 64, 1, 1), UP.reshape(64, 4, 1, 1))),
    "half a pair": lora("1 incomplete", {f"{STEM}.lora_A.weight": DOWN}),
    "NaN": lora("not finite", pair(np.full_like(DOWN, np.nan))),
    "one NaN": lora("not finite", pair(up=np.where(np.arange(256).reshape(64, 4) == 255, np.nan, UP).astype("f4"))),
    "infinity": lora("not finite", pair(up=np.full_like(UP, -np.inf))),
    "3e38": lora("not finite with the LoRA", pair(np.full_like(DOWN, 3e38), np.full_like(UP, 3e38)), HARMLESS),
    "integers": lora("is I32", pair(DOWN.astype("i4"))),
    "bytes": lora("is U8", pair(DOWN.astype("u1"), UP.astype("u1"))),
    "float64": lora("is F64", pair(DOWN.astype("f8"))),
    "alpha NaN": alpha(ALPHA, np.nan),
    "alpha infinite": alpha(ALPHA, np.inf),
    "alpha 3e38": alpha("", 3e38, HARMLESS),
    "alpha 0": alpha("", 0, HARMLESS),
    "alpha negative": alpha("", -4, HARMLESS),
    "alpha of two numbers": alpha(ALPHA, [1, 2]),
    "alpha of none": alpha(ALPHA, []),
    "alpha in bytes": alpha(ALPHA, 1, kind="u1"),
    "alpha 2^63 - 1": alpha("not finite", 2**63 - 1, HARMLESS, "i8"),
    "another model's": lora("1 unknown", pair(stem="unet.down_blocks.0.attn.to_k")),
    "a block too far": lora("1 unknown", pair(stem="transformer.transformer_blocks.99.attn.to_k")),
    "block of 100 digits": lora("1 unknown", pair(stem=f"transformer.transformer_blocks.{'9' * 100}.attn.to_k")),
    "long names": lora("9 unknown", pairs(9, "{}" + "z" * 240)),
    "7,000 modules": lora("7000 unknown", pairs(7000, "a.{}")),
    "20,000 modules": lora("too long", pairs(20_000, "a.{}"), HEADER),
    "one place twice": lora("named twice", pair() | pair(stem="double_blocks.0.img_attn.qkv", up=QKV)),
    "one module twice": lora("two down tensors", pair() | pair(stem=STEM.removeprefix("transformer."))),
    "LoKr": lora("is a LoKr", {"lora_unet_double_blocks_0_img_attn_proj.lokr_w1": DOWN}, HEADER),
    "biases": lora("biases", pair(**{"lora_B.bias": DOWN[0]}), HEADER),
    "text encoders only": lora("text encoders only", pair(stem="text_encoder.text_model.encoder.layers.0.mlp.fc1"), HEADER),
    "a model": Case(a_model, "no LoRA we know|control LoRA|VAE and CLIP-L and T5 missing", ("lora",)),
    "PEFT: no object": noted("no JSON object", "[1]", HEADER),
    "PEFT: deep": noted("no JSON object", "[" * 10**6, HEADER),
    "PEFT: a million objects": noted("no JSON object", '{"a":[' + '{"":0},' * 590_000 + "0]}", HEADER),
    "PEFT: DoRA": noted("is a DoRA", '{"transformer.use_dora": true}', HEADER),
    **{f"PEFT: alpha {x}": noted(NUMBER, f'{{"lora_alpha": {x}}}') for x in ("NaN", "1e999", "-1e999", "true", "[1]", '"4"')},
    "PEFT: alpha of 4,000 digits": noted(NUMBER, '{"lora_alpha": ' + "9" * 4000 + "}"),
    "PEFT: alpha of 5,000 digits": noted("no JSON object", '{"lora_alpha": ' + "9" * 5000 + "}", HEADER),
    "PEFT: alpha with escapes": noted(NUMBER, json.dumps({"lora_alpha": ESCAPES})),
    "PEFT: pattern that runs for ever": noted("expected names", '{"alpha_pattern": {"(a+)+$": 1}}'),
    "PEFT: patterns are a list": noted("expected names", '{"alpha_pattern": [1]}'),
    "PEFT: pattern to a text": noted(NUMBER, '{"alpha_pattern": {"to_k": "x"}}'),
}  # fmt: skip

"""What the tensors of a LoRA file are called, and where in the transformer each belongs. Names and headers only.

A pair of tensors `down` [r, in] and `up` [out, r] changes one linear layer. Trainers spell the layer in Black Forest Labs'
or in diffusers' names, with dots or flattened to underscores, behind a prefix of their own; every spelling is looked up
in one dictionary made from the model's own layers. Other kinds of adapter are refused by name: applied as if they were
LoRAs they would give a picture, only not the right one.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from ..backend import nn
from ..errors import AdapterError
from ..models.flux import Flux, FluxConfig
from .formats import diffusers_linears
from .header import Header

_PREFIXES = (  # in the order in which they may be nested
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
)
_TEXT = ("lora_te", "text_encoder")  # lora_te1_, lora_te3_, text_encoder., text_encoder_2., text_encoders.t5xxl., ...
_PAIR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight")
_XLABS = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
_ROLES = {"lora_A": "down", "lora_down": "down", "down": "down", "lora_B": "up", "lora_up": "up", "up": "up"}
_DIFFUSERS = ("transformer_blocks", "single_transformer_blocks", "time_text_embed", "x_embedder", "context_embedder")
_PLAIN = "take a plain LoRA of it"
_MAX_NOTES = 2**20  # letters of metadata that are parsed; 8 MB of JSON could take 300 MB
_SOME_ADAPTER = re.compile(r"lora_|_lora|lokr_|hada_|\.[ab][12]\.weight$|oft_|\.diff(_b)?$|\.set_weight$|\.dora_scale$")
# In this order: BFL's control LoRAs have biases too, which alone would be told as such.
_REFUSED = (
    (
        r"\.mlp_fc[12]\b|mlp_context_fc[12]\b|qkv_proj\b",
        "a LoRA packed for nunchaku",
        "take the original it was made from",
    ),
    (
        r"\bquery_norm\.scale$",
        "a control LoRA of Black Forest Labs (Canny, Depth)",
        "it needs FLUX.1 [dev] with twice the input channels and does not work on Kontext",
    ),
    (r"\.lokr_", "a LoKr", _PLAIN),
    (r"\.hada_", "a LoHa", _PLAIN),
    (r"\.[ab][12]\.weight$", "a GLoRA", _PLAIN),
    (r"\b(b?oft_(blocks|R|r|diag))\b", "an OFT", _PLAIN),
    (r"\.diff(_b)?$|\.set_weight$", "whole differences of weights (.diff), not a LoRA", _PLAIN),
    (r"\.dora_scale$|lora_magnitude_vector", "a DoRA", _PLAIN),
    (r"\.lora_mid\.", "a LoCon with a middle part", _PLAIN),
    (r"^lora_transformer_", "in OneTrainer's own names", "convert it to diffusers' or kohya's names"),
    (r"\.(lora_[AB](\.default)?|lora_down|lora_up)\.bias$", "a LoRA that changes biases too", _PLAIN),
)


@dataclass(frozen=True)
class Place:
    """Rows `start` … `start + rows` of the canonical layer `target`, which takes `columns` inputs."""

    target: str
    start: int
    rows: int
    columns: int
    out: int
    """Rows of the whole layer."""
    swapped: bool = False
    """The two halves of the rows lie the other way round in the file: diffusers' final modulation."""


@dataclass(frozen=True)
class Pair:
    """The tensors of one module: keys in the file of [r, in] and [out, r], of alpha if it has one, and its place."""

    place: Place
    down: str
    up: str
    alpha: str | None
    gain: float | None
    """alpha / r (or the like) where the file's metadata gives it; None asks the alpha tensor, or else is 1."""
    rank: int


@dataclass(frozen=True)
class Spelling:
    """A LoRA file by its names. modules: module name, without prefix -> role ("down", "up", "alpha") -> key in the file."""

    format: str
    modules: Mapping[str, Mapping[str, str]]
    text: tuple[str, ...] = ()
    """Keys that belong to text encoders."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's configuration, from the metadata that diffusers writes."""


def spell(header: Header, where: str) -> Spelling:
    """Sort the keys of a file by module. Raises AdapterError for what is no LoRA, or of a kind we refuse."""
    text = tuple(key for key in header.tensors if key.startswith(_TEXT))
    rest = [key for key in header.tensors if not key.startswith(_TEXT)]
    for pattern, kind, advice in _REFUSED:
        if looks_like_adapter(header) and any(re.search(pattern, key) for key in rest):
            raise AdapterError(f"{where} is {kind}; {advice}")
    modules: dict[str, dict[str, str]] = {}
    formats: Counter[str] = Counter()
    strange = []
    for key in rest:
        match = _PAIR.fullmatch(key) or _XLABS.fullmatch(key)
        stem, role = (match[1], _ROLES[match[2]]) if match else (key.removesuffix(".alpha"), "alpha")
        if not match and not key.endswith(".alpha"):
            strange.append(key)
            continue
        module, prefixes = _stripped(stem)
        if role in modules.setdefault(module, {}):
            raise AdapterError(f"{where}: {module} has two {role} tensors; expected one, save it again in one format")
        modules[module][role] = key
        formats[_format(module, prefixes)] += 1
    if strange:
        raise AdapterError(
            f"{where} is no LoRA we know: {len(strange)} tensors of other kinds ({some(strange)}); expected pairs such as "
            "lora_A.weight and lora_B.weight"
        )
    if not modules:
        found = "tensors for text encoders only" if text else "no tensors"
        raise AdapterError(f"{where} holds {found}; expected a LoRA for the transformer of FLUX.1")
    for module, keys in modules.items():
        inputs = header.tensors[keys["down"]].shape[1:] if "down" in keys else ()
        if module in ("img_in", "x_embedder") and inputs in ((128,), (384,)):
            raise AdapterError(
                f"{where} is for FLUX.1 Canny, Depth or Fill ({inputs[0]} input channels); Kontext has 64"
            )
    config = _peft_config(header.metadata.get("lora_adapter_metadata"), where)
    return Spelling(formats.most_common(1)[0][0], modules, text, config)


def looks_like_adapter(header: Header) -> bool:
    """Whether a file's names are those of a LoRA or its kin. A whole checkpoint, whose names may end alike, has none of these."""
    if any(key.endswith(".qweight") for key in header.tensors):  # nunchaku's models have a LoRA inside
        return False
    return any(_SOME_ADAPTER.search(key) for key in header.tensors)


def fit(spelling: Spelling, header: Header, config: FluxConfig, where: str) -> list[Pair]:
    """Find the place of every module in a transformer of these sizes, ordered by rows.

    Raises AdapterError that lists the first few modules which are unknown, incomplete, misshaped or named twice.
    """
    known = places(config)
    pairs: list[Pair] = []
    problems: dict[str, list[str]] = {"unknown": [], "incomplete": [], "misshaped": [], "named twice": []}
    for module, keys in spelling.modules.items():
        place = known.get(module)
        if place is None:
            problems["unknown"].append(module)
        elif not {"down", "up"} <= keys.keys():
            problems["incomplete"].append(module)
        else:
            down, up = header.tensors[keys["down"]].shape, header.tensors[keys["up"]].shape
            rank = down[0] if down else 0
            most = max(place.out, place.columns)  # a whole matrix has no more
            if not 1 <= rank <= most or down != (rank, place.columns) or up != (place.rows, rank):
                problems["misshaped"].append(
                    f"{module} {up} {down} instead of ({place.rows}, r) (r, {place.columns})"
                    + (f", r at most {most}" if rank > most else "")
                )
            gain = None if "alpha" in keys else _gain(spelling.config, module, rank, where)
            pairs.append(Pair(place, keys["down"], keys["up"], keys.get("alpha"), gain, rank))
    pairs.sort(key=lambda pair: (pair.place.target, pair.place.start))
    for one, two in pairwise(pairs):
        if one.place.target == two.place.target and two.place.start < one.place.start + one.place.rows:
            problems["named twice"].append(one.place.target)
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names)
        raise AdapterError(f"{where} does not fit this transformer: {told}; is it a LoRA for FLUX.1 of this size?")
    return pairs


@lru_cache(maxsize=4)
def places(config: FluxConfig) -> dict[str, Place]:
    """Every spelling of every linear layer -> its place: BFL's, diffusers' and XLabs' names, with dots and flattened."""
    shapes = {
        name: (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
        for name, layer in Flux(config).named_modules()
        if isinstance(layer, nn.Linear)
    }
    found = {name: Place(name, 0, rows, columns, rows) for name, (rows, columns) in shapes.items()}
    third = config.hidden
    for target, sources in diffusers_linears(config.num_layers, config.num_single_layers):
        rows, columns = shapes[target]
        if len(sources) == 1:
            found[sources[0]] = Place(target, 0, rows, columns, rows, swapped=sources[0] == "norm_out.linear")
            continue
        for i, source in enumerate(sources):  # q, k, v, and in a single block the MLP's rows below them
            found[source] = Place(target, i * third, third if i < 3 else rows - 3 * third, columns, rows)
    for i in range(config.num_layers):
        for number, stream in (("1", "img"), ("2", "txt")):
            for layer in ("qkv", "proj"):
                whole = found[f"double_blocks.{i}.{stream}_attn.{layer}"]
                found[f"double_blocks.{i}.processor.{layer}_lora{number}"] = whole
    for i in range(config.num_single_layers):
        linear1 = found[f"single_blocks.{i}.linear1"]
        qkv = replace(linear1, rows=3 * third)
        found[f"single_transformer_blocks.{i}.attn.to_qkv"] = found[f"single_blocks.{i}.processor.qkv_lora"] = qkv
        found[f"single_blocks.{i}.processor.proj_lora"] = found[f"single_blocks.{i}.linear2"]
    # never by turning underscores into dots: names have underscores of their own
    return found | {name.replace(".", "_"): place for name, place in found.items()}


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _stripped(stem: str) -> tuple[str, tuple[str, ...]]:
    """The module's own name, and the prefixes that stood before it."""
    found = []
    for prefix in _PREFIXES:
        if stem.startswith(prefix):
            stem = stem.removeprefix(prefix)
            found.append(prefix)
    return stem, tuple(found)


def _format(module: str, prefixes: tuple[str, ...]) -> str:
    """A name for people: which trainer or program spells it so."""
    if ".processor." in module:
        return "XLabs"
    diffusers = module.startswith(_DIFFUSERS) or module.startswith(("norm_out", "proj_out"))
    if {"lora_unet_", "lycoris_"} & set(prefixes):
        return "flattened diffusers names" if diffusers else "kohya"
    if diffusers:
        return "PEFT / diffusers"
    if "base_model.model." in prefixes:
        return "fal (PEFT over BFL names)"
    return "ComfyUI (BFL names)" if prefixes else "BFL names"


def _peft_config(text: str | None, where: str) -> dict[str, Any]:
    """The part of diffusers' `lora_adapter_metadata` on the transformer; refuses what it says and we do not do."""
    if text is None:
        return {}
    try:
        values = json.loads(text) if len(text) < _MAX_NOTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise AdapterError(f"{where}: its lora_adapter_metadata is no JSON object; save it again without metadata")
    config = {key.removeprefix("transformer."): value for key, value in values.items()}
    if config.get("use_dora"):
        raise AdapterError(f"{where} is a DoRA; {_PLAIN}")
    return config


def _gain(config: Mapping[str, Any], module: str, rank: int, where: str) -> float | None:
    """alpha / r, or alpha / sqrt(r) in a rank-stabilised LoRA, if PEFT's configuration tells alpha."""
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", name) for name in patterns):
        # PEFT takes regular expressions; a stranger's may run for ever
        raise AdapterError(f"{where}: its alpha_pattern is {str(patterns)[:80]!r}; expected names of modules")
    for name, value in patterns.items():
        if module == name or module.endswith(f".{name}"):
            alpha = value
            break
    if alpha is None:
        return None
    if type(alpha) not in (int, float) or not abs(alpha) <= 1e12:  # NaN is neither, and some integers are no float
        raise AdapterError(f"{where}: its lora_alpha is {str(alpha)[:80]!r}; expected a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") is True else max(rank, 1))

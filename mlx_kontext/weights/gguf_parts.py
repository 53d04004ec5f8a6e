"""What a GGUF file is to FLUX: which part, by which names, and with which tokenizer. Headers only; no weights are read."""

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import CheckpointError
from .gguf import GGUF, _short
from .header import _line

_ARCHITECTURES = {"flux": "transformer", "t5": "text_encoder_2", "t5encoder": "text_encoder_2"}
_ANY_ARCHITECTURE = (None, "pig", "cow")  # stable-diffusion.cpp writes none, calcuis' tools write these for all models
_PREFIX = "model.diffusion_model."
_SIGNS = {
    "double_blocks.0.img_attn.qkv.weight": "transformer",
    "enc.blk.0.attn_q.weight": "text_encoder_2",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "text_encoder_2",  # calcuis' tools keep Hugging Face's names
}

_T5_BLOCK = {  # llama.cpp -> Hugging Face
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",  # the one GELU is applied to
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_T5_OUTSIDE = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_T5_DECODER = ("dec.", "output.")

# T5's character map (sentencepiece's nmt_nfkc of 2019), and the same of sentencepiece 0.2. A crafted one makes the tokenizers
# library panic.
CHARSMAPS = (
    "0942789e0111452f1cc446f70036e26d24458c3c7858c53cc12ca4d87531279b",
    "1e2c7b43d3ee9755ceaa2ac335e253d8703604e0249ee1e81156c92b46423844",
)
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5  # sentencepiece's kinds of tokens
_T = TypeVar("_T")


def part_of(gguf: GGUF) -> str:
    """Which part of a FLUX pipeline a file holds: "transformer" or "text_encoder_2" (T5). Raises CheckpointError."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture in _ANY_ARCHITECTURE:
        for name, part in _SIGNS.items():
            if name in gguf.tensors or _PREFIX + name in gguf.tensors:
                return part
        told = "names no architecture we know, nor tensors of one"
    elif isinstance(architecture, str) and architecture in _ARCHITECTURES:
        return _ARCHITECTURES[architecture]
    else:
        told = f"holds a model of architecture {_short(architecture)}"
    raise CheckpointError(
        _line(f"{gguf.path} {told}; expected flux (take a GGUF of FLUX.1 Kontext [dev]) or t5encoder (of T5 v1.1 XXL)")
    )


def transformer_from_gguf(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Take the prefix off that some tools write; the names under it are Black Forest Labs' and so canonical."""
    return _renamed({name: name.removeprefix(_PREFIX) for name in tensors}, tensors)


def t5_from_gguf(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """llama.cpp's names of T5's encoder -> Hugging Face's; a decoder is of no use here.

    What no row names stays as it is, for the strict check to report. Raises CheckpointError if two names become one.
    """
    return _renamed({name: _t5_name(name) for name in tensors if not name.startswith(_T5_DECODER)}, tensors)


def t5_tokenizer_json(gguf: GGUF) -> dict[str, Any]:
    """T5's `tokenizer.json`, as published, rebuilt from the metadata llama.cpp keeps of `spiece.model`.

    Tokens that only fill the vocabulary up are left out at its end and match nothing elsewhere. llama.cpp gives them and
    added tokens scores of -1000 and less; they get 0 as published, for an unknown letter's price goes by the lowest score.
    Raises CheckpointError.
    """
    try:
        tokens, scores, kinds, charsmap = _t5_vocabulary(gguf.metadata)
    except ValueError as error:
        told = f"{gguf.path}: {error}; take tokenizer_2/ of the published FLUX.1 Kontext [dev]"
        raise CheckpointError(_line(told)) from None
    while kinds[len(tokens) - 1] == _UNUSED:
        tokens = tokens[:-1]
    vocab = [
        # no text has a blank by the time it is matched: they are ▁ then
        [f" {token}" if kind == _UNUSED else token, score if kind == _NORMAL else 0.0]
        for token, score, kind in zip(tokens, scores, kinds, strict=False)
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": i, "content": tokens[i]} | flags for i in range(len(tokens)) if kinds[i] not in (_NORMAL, _UNUSED)]
    precompiled = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    end, number = {"SpecialToken": {"id": "</s>", "type_id": 0}}, tokens.index("</s>")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [precompiled, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
        },
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [number], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": kinds.index(_UNKNOWN), "vocab": vocab},
    }


def _t5_vocabulary(metadata: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...], bytes]:
    """Tokens, scores, kinds and character map. Raises ValueError for what is no T5's."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "t5":
        raise ValueError(f"its tokenizer is {_short(kind)}; expected t5")
    names = ("tokens", "scores", "token_type", "precompiled_charsmap")
    tokens, scores, kinds, charsmap = lists = [metadata.get(f"tokenizer.ggml.{name}") for name in names]
    for name, found, wanted in zip(names, lists, (str, float, int, int), strict=True):
        if not isinstance(found, tuple) or not all(type(item) is wanted for item in found):
            raise ValueError(f"its tokenizer.ggml.{name} is {_short(found)}; expected a list of {wanted.__name__}")
    assert tokens is not None and scores is not None and kinds is not None and charsmap is not None  # for mypy
    if not len(tokens) == len(scores) == len(kinds):
        raise ValueError(
            f"it has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} token types; expected one each"
        )
    if not all(0 < len(token) <= 256 for token in tokens) or not all(map(math.isfinite, scores)):
        raise ValueError("it has tokens that are empty, very long or of no finite score")
    if not set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED} or kinds.count(_UNKNOWN) != 1:
        raise ValueError(f"its tokens are of types {sorted(set(kinds))[:9]}; expected 1 to 5 and one of type 2, <unk>")
    if not {"<pad>", "</s>"} <= {token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL}:
        raise ValueError("it has no control tokens <pad> and </s>")
    table = bytes(number & 255 for number in charsmap)  # some tools write signed bytes
    if hashlib.sha256(table).hexdigest() not in CHARSMAPS:
        raise ValueError(f"its character map ({len(table):,} bytes) is not T5's")
    return tokens, scores, kinds, table


def _t5_name(name: str) -> str:
    stem, dot, kind = name.rpartition(".")
    block, _, inner = stem.removeprefix("enc.blk.").partition(".")
    if stem.startswith("enc.blk.") and block.isdecimal() and inner in _T5_BLOCK:
        return f"encoder.block.{block}.{_T5_BLOCK[inner]}.{kind}"
    return _T5_OUTSIDE.get(stem, stem) + dot + kind


def _renamed(names: Mapping[str, str], tensors: Mapping[str, _T]) -> dict[str, _T]:
    out: dict[str, _T] = {}
    for theirs, ours in names.items():
        if ours in out:
            raise CheckpointError(_line(f"{ours} is stored twice, once as {theirs}; take another GGUF of this model"))
        out[ours] = tensors[theirs]
    return out

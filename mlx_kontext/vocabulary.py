"""The gate that tokenizer files pass before the libraries that read them: bounded, of the parts we know, ids within the model.

The tokenizers library panics or aborts over some crafted files, runs for ever over others, and a token the model has no row
for makes MLX read whatever lies in memory there. CLIP cuts text in one way only, so of its files nothing but the vocabulary
is used; of T5's also how text is normalised and split, if in one of the ways that published files do it.
"""

import base64
import hashlib
import math
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .weights.gguf_parts import CHARSMAPS
from .weights.header import _cut, read_small
from .weights.load import read_json

_LONGEST = 256  # letters of a token
_MOST = 2**17  # tokens
_PLAIN = ("NFC", "NFKC", "Nmt", "Lowercase", "Strip", "WhitespaceSplit")


def clip_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids, and its merges, from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Raises CheckpointError if the files are missing or not what CLIP has.
    """
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            model = _model(read_json(file), "BPE", folder)
            vocab, merges = model.get("vocab"), model.get("merges")
        elif (folder / "vocab.json").is_file():
            vocab = read_json(folder / "vocab.json")
            lines = read_small(folder / "merges.txt", "a list of merges").decode().splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
        else:
            raise ValueError("there are none")
        if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < _MOST for i in vocab.values()):
            raise ValueError("its vocabulary is no object of tokens and their ids")
        _check_tokens(vocab)
        return vocab, _pairs(merges)
    except ValueError as error:
        raise unusable(folder, "tokenizer.json, or vocab.json with merges.txt", error) from None


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges as pairs; older files write each as one text with a space."""
    if not isinstance(merges, list):
        raise ValueError("it has no list of merges")
    pairs = [merge.split() if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in pairs):
        raise ValueError("a merge is no pair of tokens")
    _check_tokens([token for pair in pairs for token in pair], 2 * _MOST)
    return [(first, second) for first, second in pairs]


def t5_contents(contents: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What of a `tokenizer.json` of T5 is used: vocabulary, added tokens, and how text is normalised and split.

    Padding, truncation and the end token are ours to decide. Raises CheckpointError for what T5 does not have.
    """
    model = _model(contents, "Unigram", folder)
    try:
        vocab, added = model.get("vocab"), contents.get("added_tokens") or []
        if not isinstance(vocab, list) or not all(_is_piece(piece) for piece in vocab):
            raise ValueError("its vocabulary is no list of pieces with their scores")
        unknown = model.get("unk_id")
        if type(unknown) is not int or not 0 <= unknown < len(
            vocab
        ):  # without it the first odd letter of a prompt fails
            raise ValueError(f"its unk_id is {_cut(unknown)}, which is no piece")
        if not isinstance(added, list) or not all(
            isinstance(t, dict) and isinstance(t.get("content"), str) for t in added
        ):
            raise ValueError("its added_tokens are no list of tokens")
        _check_tokens([piece for piece, _ in vocab])
        _check_tokens([token["content"] for token in added], 1024)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": _known(contents.get("normalizer")),
            "pre_tokenizer": _known(contents.get("pre_tokenizer")),
            "post_processor": None,
            "decoder": None,
            "model": {"type": "Unigram", "unk_id": unknown, "vocab": vocab},
        }
    except ValueError as error:
        raise unusable(folder, "a tokenizer.json of T5", error) from None


def spiece_model(folder: Path) -> bytes:
    """The bytes of `spiece.model`, T5's other kind of file, for sentencepiece to check. Raises CheckpointError."""
    if not (folder / "spiece.model").is_file():
        raise unusable(folder, "tokenizer.json or spiece.model", ValueError("there are none"))
    return read_small(folder / "spiece.model", "a vocabulary of 1 MB")


def check_ids(most: int, vocab_size: int | None, folder: Path) -> None:
    """Raises CheckpointError if tokens are numbered up to `most` and the model has fewer rows. None: of no known model."""
    if vocab_size is not None and most >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has tokens up to {most:,} and the model a vocabulary of {vocab_size:,}; "
            "are tokenizer and model of one model?"
        )


def unusable(folder: Path, needed: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{folder}: {needed} is needed ({reason[:200]}); download the model again")


def swapped(folder: Path, lacks: str) -> CheckpointError:
    return CheckpointError(f"{folder}: the tokenizer {lacks}; are tokenizer/ (CLIP) and tokenizer_2/ (T5) swapped?")


def _model(contents: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    model = contents.get("model")
    if not isinstance(model, dict):
        raise unusable(folder, "a readable tokenizer.json", ValueError("it has no model"))
    found = model.get("type", kind)  # files of old do not tell
    if found != kind:
        raise swapped(folder, f"is of type {_cut(found)} and not {kind}")
    return model


def _check_tokens(tokens: Any, most: int = _MOST) -> None:
    if len(tokens) > most:
        raise ValueError(f"it has {len(tokens):,} tokens, at most {most:,} are expected")
    if not all(len(token) <= _LONGEST for token in tokens):
        raise ValueError(f"it has tokens of over {_LONGEST} letters")


def _is_piece(piece: Any) -> bool:
    return (
        isinstance(piece, list)
        and len(piece) == 2
        and isinstance(piece[0], str)
        and type(piece[1]) in (int, float)
        and abs(piece[1]) < 1e6
        and math.isfinite(piece[1])
    )


def _known(step: Any, inside: bool = False) -> Any:
    """A step of normalising or splitting, if it is one of those that published files of T5 have; else ValueError."""
    if step is None:
        return None
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence" and not inside:
        parts = step.get("normalizers") or step.get("pretokenizers")
        good = isinstance(parts, list) and len(parts) <= 8 and all(_known(part, True) for part in parts)
    elif kind == "Replace":
        good = step.get("pattern") == {"Regex": " {2,}"} and step.get("content") in (" ", "▁")
    elif kind == "Precompiled":
        good = _charsmap_hash(step.get("precompiled_charsmap")) in CHARSMAPS
    else:
        good = kind in _PLAIN or (kind == "Metaspace" and step.get("replacement") == "▁")
    if not good:
        raise ValueError(f"it normalises or splits text by {_cut(step)}, which T5's do not")
    return step


def _charsmap_hash(text: Any) -> str:
    try:
        return hashlib.sha256(base64.b64decode(text)).hexdigest()
    except (TypeError, ValueError):
        return ""

"""Tokenizer files: huge, damaged, with patterns that run for ever, or with tokens the model has no rows for."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.carrier import HARMLESS, HEADER, Case, write
from tests.hostile.files import PAGE
from tests.hostile.folders import ESCAPES, OBJECTS, folder, instead, to_device

Values = dict[str, Any]
NEEDED = "is needed|is not readable JSON|expected a JSON object|over 8 MB"


def changed(told: str, name: str, alter: Callable[[Values], object], refused: str = HEADER) -> Case:
    """The demo's tokenizer.json, changed."""

    def rewrite(model: Path) -> None:
        file = model / name / "tokenizer.json"
        values = json.loads(file.read_text("utf-8"))
        alter(values)
        write(file, values)

    return folder(told, rewrite, refused)


def step(told: str, name: str, key: str, value: Any, refused: str = HEADER) -> Case:
    """One part of it replaced."""
    return changed(told, name, lambda values: values.update({key: value}), refused)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**8)


def beyond(values: Values) -> None:
    """More tokens than the model has rows for."""
    vocab = values["model"]["vocab"]
    if isinstance(vocab, list):
        values["model"]["vocab"] = [*vocab[:3], *[[f"~{i}", -9.0] for i in range(9000)], *vocab[3:]]
    else:
        values["model"]["vocab"] = {token: i if i > 710 else i + 10**5 for token, i in vocab.items()}


def nothing(values: Values) -> None:
    values["model"].update(vocab=type(values["model"]["vocab"])(), merges=[])


def token(content: str, number: int = 3) -> Values:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True} | flags


def adding(*tokens: Values) -> Callable[[Values], object]:
    return lambda values: values["added_tokens"].extend(tokens)


def replace(pattern: Any, content: str) -> Values:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def charsmap(raw: bytes) -> Values:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def sequence(*steps: Values) -> Values:
    return {"type": "Sequence", "normalizers": list(steps)}


PADDING = {
    "strategy": {"Fixed": 2**31},
    "direction": "Right",
    "pad_to_multiple_of": 0,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
TRUNCATION = {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}
SPLIT = {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}
STEPS: dict[str, Any] = {
    "amplifier": sequence(*[replace(".", "." * 8)] * 12),
    "pattern that runs for ever": replace("(a|a|aa)+$b(.*)*(.*)*x", ""),
    "pattern that is none": replace("(", ""),
    "sequences in sequences": json.loads('{"type":"Sequence","normalizers":[' * 40 + '{"type":"NFC"}' + "]}" * 40),
    "an endless sequence": sequence(*[{"type": "NFC"}] * 10**5),
    "a charsmap of nothing": charsmap(bytes(4)),
    "a charsmap of noise": charsmap(np.random.default_rng(4).bytes(99)),
    "a charsmap that is no base64": {"type": "Precompiled", "precompiled_charsmap": "ä"},
    "a step we do not know": {"type": ESCAPES},
    "a step that is a list": [1],
    "prepending": {"type": "Prepend", "prepend": "x" * 10**6},
}


def both(name: str) -> dict[str, Case]:
    """What either tokenizer.json may suffer. Of CLIP's nothing but the vocabulary is used."""
    file = f"{name}/tokenizer.json"
    unused = HEADER if name == "tokenizer_2" else HARMLESS
    return {
        "empty": instead(NEEDED, file, b""),
        "web page": instead(NEEDED, file, PAGE),
        "list": instead(NEEDED, file, []),
        "no model": instead(NEEDED, file, {"version": "1.0"}),
        "deep": instead(NEEDED, file, b"[" * 10**6),
        "noise": instead(NEEDED, file, np.random.default_rng(3).bytes(9999)),
        "a million objects": instead(NEEDED, file, OBJECTS),
        "100 MB": instead(NEEDED, file, sparse),
        "pipe": instead(NEEDED, file, os.mkfifo),
        "device": instead(NEEDED, file, to_device),
        "folder": instead(NEEDED, file, Path.mkdir),
        "nothing": instead(NEEDED, file, None),
        **{f"normalises by {what}": step("which T5's do not", name, "normalizer", x, unused) for what, x in STEPS.items()},
        "splits everywhere": step("which T5's do not", name, "pre_tokenizer", SPLIT, unused),
        "padding of 2^31": step("", name, "padding", PADDING, HARMLESS),
        "truncation to 0": step("", name, "truncation", TRUNCATION, HARMLESS),
        "a decoder of noise": step("", name, "decoder", [1], HARMLESS),
        "model of an unknown type": step("is of type", name, "model", {"type": ESCAPES}),
        "model that is a list": step(NEEDED, name, "model", []),
        "no tokens": changed("has no|is needed", name, nothing),
        "ids beyond the model": changed("tokens up to|no object of tokens", name, beyond),
        "vocabulary of numbers": changed(NEEDED, name, lambda v: v["model"].update(vocab=[1, 2])),
        "no added tokens": step("", name, "added_tokens", [], HARMLESS),
        "added tokens are numbers": step(NEEDED, name, "added_tokens", [1], unused),
        "empty added token": changed("", name, adding(token("")), HARMLESS),
        "added token of a megabyte": changed("over 256 letters", name, adding(token("a" * 10**6)), unused),
        "added token 2^32 - 1": changed("tokens up to", name, adding(token("reddish", 2**32 - 1)), unused),
        "added token 2^64": changed(NEEDED, name, adding(token("reddish", 2**64)), unused),
        "10,000 added tokens": changed(NEEDED, name, adding(*(token(f"t{i}", 300 + i) for i in range(10_000))), unused),
    }  # fmt: skip


def clip(told: str, alter: Callable[[Values], object], refused: str = HEADER) -> Case:
    return changed(told, "tokenizer", lambda values: alter(values["model"]), refused)


def t5(told: str, alter: Callable[[Values], object], refused: str = HEADER) -> Case:
    return changed(told, "tokenizer_2", lambda values: alter(values["model"]), refused)


def scored(score: Any) -> Callable[[Values], object]:
    return lambda model: model.update(vocab=[[piece, score] for piece, _ in model["vocab"]])


def old(told: str, vocab: Any = None, merges: Any = b"a b\n", spiece: Any = None) -> Case:
    """Files of the years before tokenizer.json, in its place."""
    files = (
        {"tokenizer_2/spiece.model": spiece}
        if vocab is None
        else {"tokenizer/vocab.json": vocab, "tokenizer/merges.txt": merges}
    )

    def alter(model: Path) -> None:
        for name, content in files.items():
            (model / name).with_name("tokenizer.json").unlink(missing_ok=True)
            if callable(content):
                content(model / name)
            else:
                write(model / name, content)

    return folder(told, alter)


def swap(model: Path) -> None:
    os.replace(model / "tokenizer_2/tokenizer.json", model / "tokenizer/tokenizer.json")


A, NO_IDS, NO_PAIR = {"a": 0}, "no object of tokens and their ids", "no pair of tokens"
CASES: dict[str, Case] = {
    **{f"CLIP: {what}": case for what, case in both("tokenizer").items()},
    **{f"T5: {what}": case for what, case in both("tokenizer_2").items()},
    "CLIP: merge of unknown tokens": clip(NEEDED, lambda m: m["merges"].append(["zz", "qq"])),
    "CLIP: merges are numbers": clip(NO_PAIR, lambda m: m.update(merges=[1, 2])),
    "CLIP: merges of three": clip(NO_PAIR, lambda m: m["merges"].append("a b c")),
    "CLIP: merges missing": clip("merges", lambda m: m.update(merges=[])),
    "CLIP: merge of a megabyte": clip("over 256 letters", lambda m: m["merges"].append(["a", "a" * 10**6])),
    "CLIP: token of a megabyte": clip("over 256 letters", lambda m: m["vocab"].update({"a" * 10**6: 1})),
    "CLIP: two tokens of one id": clip("", lambda m: m["vocab"].update(a=0, b=0), HARMLESS),
    **{f"CLIP: id {x!r}": clip(NO_IDS, lambda m, x=x: m["vocab"].update(a=x)) for x in (2**32, -1, 1.0, "1", None, True)},
    "CLIP: dropout": clip("", lambda m: m.update(dropout=0.5), HARMLESS),
    "CLIP: end of word of a megabyte": clip("", lambda m: m.update(end_of_word_suffix="w" * 10**6), HARMLESS),
    "CLIP: T5's tokenizer": folder("swapped", swap),
    **{f"T5: scores {x!r:.8}": t5(NEEDED, scored(x)) for x in (None, "0", float("nan"), -1e999, 1e308, 10**400, True)},
    "T5: unknown token beyond": t5(NEEDED, lambda m: m.update(unk_id=10**6)),
    "T5: unknown token is a text": t5(NEEDED, lambda m: m.update(unk_id="2")),
    "T5: no unknown token": t5(NEEDED, lambda m: m.update(unk_id=None)),
    "T5: an empty piece": t5("tokens up to 297", lambda m: m["vocab"].append(["", 0.0])),
    "T5: piece of a megabyte": t5("over 256 letters", lambda m: m["vocab"].append(["a" * 10**6, 0.0])),
    "T5: all pieces one letter": t5("", lambda m: m.update(vocab=[["a", 0.0]] * 290), HARMLESS),
    "vocab.json is a list": old("expected a JSON object", []),
    "vocab.json of texts": old(NO_IDS, {"a": "b"}),
    "vocab.json is a pipe": old(NEEDED, os.mkfifo),
    "vocab.json is a device": old(NEEDED, to_device),
    "vocab.json of a million objects": old(NEEDED, OBJECTS),
    "vocab.json of 100 MB": old(NEEDED, sparse),
    "merges.txt is a pipe": old("no such file", A, os.mkfifo),
    "merges.txt is a device": old("no such file", A, to_device),
    "merges.txt of noise": old(NEEDED, A, bytes(range(256))),
    "merges.txt of 100 MB": old("over 8 MB", A, sparse),
    "merges.txt of three words": old(NO_PAIR, A, b"one two three\n"),
    "spiece.model is empty": old(NEEDED, spiece=b""),
    "spiece.model of noise": old(NEEDED, spiece=np.random.default_rng(5).bytes(10**5)),
    "spiece.model is a pipe": old(NEEDED, spiece=os.mkfifo),
    "spiece.model is a device": old(NEEDED, spiece=to_device),
    "spiece.model is a web page": old(NEEDED, spiece=PAGE),
    "spiece.model of 100 MB": old(NEEDED, spiece=sparse),
}  # fmt: skip

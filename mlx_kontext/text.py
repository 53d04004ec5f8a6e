"""From a prompt to what the transformer reads: T5 states and a pooled CLIP vector, remembered per prompt."""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .backend import mx
from .vocabulary import check_ids, clip_vocabulary, spiece_model, swapped, t5_contents, unusable
from .weights.load import read_json

_CLIP_LENGTH = 77
_CLIP_UNMERGED = 514  # entries of vocab.json that no merge makes: bytes, bytes that end a word, start and end token
_REMEMBERED = 32  # prompts; 4 MB each at full size in bf16
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Conditioning:
    """txt: [1, L, 4096] T5 states, vec: [1, 768] pooled CLIP, tokens: T5 tokens the whole prompt has, end included."""

    txt: mx.array
    vec: mx.array
    tokens: int


class TextEncoders:
    """CLIP and T5 with their tokenizers; the models are fetched when a prompt is new and may be let go in between.

    clip_ids, t5_ids: as `clip_tokenizer` and `t5_tokenizer` give them.
    load: gives the model of a part ("text_encoder" is CLIP, "text_encoder_2" is T5).
    """

    def __init__(
        self,
        clip_ids: Callable[[str], list[int]],
        t5_ids: Callable[[str, int], tuple[list[int], int]],
        load: Callable[[str], Any],
        dtype: mx.Dtype,
    ):
        self.clip_ids, self.t5_ids = clip_ids, t5_ids
        self._load, self._dtype = load, dtype
        self._memory: OrderedDict[tuple[str, int], Conditioning] = OrderedDict()

    def encode(self, prompt: str, max_sequence_length: int) -> Conditioning:
        """Read a prompt. T5 is padded or cut to `max_sequence_length` tokens, CLIP cut to 77, each keeping its end token."""
        key = (prompt, max_sequence_length)
        if key not in self._memory:
            ids, tokens = self.t5_ids(prompt, max_sequence_length)
            txt = self._load("text_encoder_2")(mx.array([ids])).astype(self._dtype)
            vec = self._load("text_encoder")(mx.array([self.clip_ids(prompt)])).astype(self._dtype)
            mx.eval(txt, vec)
            self._memory[key] = Conditioning(txt, vec, tokens)
            if len(self._memory) > _REMEMBERED:
                self._memory.popitem(last=False)
        self._memory.move_to_end(key)
        return self._memory[key]

    def knows(self, prompt: str, max_sequence_length: int) -> bool:
        """Whether this prompt can be had without the models."""
        return (prompt, max_sequence_length) in self._memory


def clip_tokenizer(folder: Path, vocab_size: int | None = None) -> Callable[[str], list[int]]:
    """CLIP's byte-level BPE from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    The function returned gives start token, at most 75 tokens, and the first end token; padding cannot matter to CLIP.
    vocab_size: rows of the model's table. Raises CheckpointError if the files are missing, unusable or of another model.
    """
    tokenizer = _clip(folder)
    start, end = (_special(tokenizer, token, folder) for token in ("<|startoftext|>", "<|endoftext|>"))
    check_ids(max(tokenizer.get_vocab().values()), vocab_size, folder)

    def ids(text: str) -> list[int]:
        body = tokenizer.encode(text, add_special_tokens=False).ids[: _CLIP_LENGTH - 2]
        if end in body:  # the user wrote the end token out: CLIP is read at the first one
            body = body[: body.index(end)]
        return [start, *body, end]

    return ids


def _clip(folder: Path) -> Tokenizer:
    vocab, merges = clip_vocabulary(folder)
    try:
        if len(merges) < len(vocab) - _CLIP_UNMERGED:  # a download that stopped would give other tokens, silently
            raise ValueError(f"merges.txt has {len(merges)} merges, vocab.json needs {len(vocab) - _CLIP_UNMERGED}")
        bpe = models.BPE(
            vocab, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    except Exception as error:  # tokenizers raises plain Exception
        raise unusable(folder, "tokenizer.json, or vocab.json with merges.txt", error) from None
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # one that is missing would be given a new number, beyond what the model knows; _special tells instead
    tokenizer.add_special_tokens([token for token in ("<|startoftext|>", "<|endoftext|>") if token in vocab])
    return tokenizer


def t5_tokenizer(
    folder: Path, contents: dict[str, Any] | None = None, vocab_size: int | None = None
) -> Callable[[str, int], tuple[list[int], int]]:
    """T5's unigram model from `tokenizer.json`, or from `spiece.model`; `contents` are the former's, in place of a file.

    The function returned gives exactly `length` ids (end token kept, zeros after it) and how many the whole text has.
    vocab_size: rows of the model's table. Raises CheckpointError if the files are missing, unusable or of another model.
    """
    if contents or (folder / "tokenizer.json").is_file():
        tokenizer = _t5(t5_contents(contents or read_json(folder / "tokenizer.json"), folder), folder)
        # Some published files turn a trailing space into a token. The normaliser makes spaces of zero-width ones, so after it.
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*own, normalizers.Strip(left=False)])
        end, pad = (_special(tokenizer, token, folder) for token in ("</s>", "<pad>"))
        check_ids(max(tokenizer.get_vocab().values()), vocab_size, folder)

        def pieces(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        return _fixed_length(pieces, end, pad)
    return _fixed_length(*_t5_from_sentencepiece(folder, vocab_size))


def _t5(contents: dict[str, Any], folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(contents))
    except Exception as error:  # tokenizers raises plain Exception
        raise unusable(folder, "a usable vocabulary", error) from None


def _fixed_length(
    pieces: Callable[[str], list[int]], end: int, pad: int
) -> Callable[[str, int], tuple[list[int], int]]:
    def ids(text: str, length: int) -> tuple[list[int], int]:
        body = pieces(text)
        kept = [*body[: length - 1], end]
        return kept + [pad] * (length - len(kept)), len(body) + 1

    return ids


def _t5_from_sentencepiece(folder: Path, vocab_size: int | None) -> tuple[Callable[[str], list[int]], int, int]:
    from sentencepiece import SentencePieceProcessor

    raw = spiece_model(folder)  # read by us: sentencepiece reports a missing file on stderr from C++
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(raw)
    except Exception as error:
        raise unusable(folder, "tokenizer.json or spiece.model", error) from None
    if processor.eos_id() < 0:
        raise swapped(folder, "has no end token")
    check_ids(processor.vocab_size() - 1, vocab_size, folder)
    return processor.encode, processor.eos_id(), max(processor.pad_id(), 0)


def _special(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise swapped(folder, f"has no {token}")
    return number

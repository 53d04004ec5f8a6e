"""README tells the truth: every block runs, and what cannot run here says what it would."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "sh"]
PYTHON = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Somewhere to run a block, with the sample picture where the README says it is."""
    (tmp_path / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "sample.png", tmp_path / "assets")
    return tmp_path


def execute(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_commands_at_the_top() -> None:
    """The installation and the tests; `.ci/run` runs exactly these two, in a fresh clone and environment."""
    first, second, *_ = BLOCKS
    assert first[0] == second[0] == "sh"
    assert "pip install" in first[1] and "--model demo" in first[1]
    assert 'pip install --quiet -e ".[test]"' in second[1] and second[1].rstrip().endswith("-m pytest")
    assert len(README.splitlines()) <= 200


def test_the_first_command_edits(folder: Path) -> None:
    """What follows the installation in the first command, with this environment's program."""
    edit = SHELL[0].split("&&")[-1].strip().removeprefix(".venv/bin/")
    assert execute(["bash", "-euc", edit], folder) == "edited.png\n"


@pytest.mark.parametrize("text", SHELL[2:])
def test_shell_blocks(text: str, folder: Path) -> None:
    execute(["bash", "-euo", "pipefail", "-c", text], folder)


@pytest.mark.parametrize("text", PYTHON)
def test_python_blocks(text: str, folder: Path) -> None:
    execute([sys.executable, "-W", "error", "-c", text], folder)


def test_the_download_takes_one_copy_of_everything() -> None:
    """It needs an account and 34 GB, so only its patterns are checked: every part, never the single-file copies."""
    (text,) = [text for language, text in BLOCKS if language == "text" and "hf download" in text]
    command = next(line for line in text.replace("\\\n", " ").splitlines() if line.startswith("hf download"))
    words = shlex.split(command)
    patterns = [words[i + 1] for i, word in enumerate(words) if word == "--include"]
    wanted = [
        "model_index.json",
        "transformer/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "LICENSE.md",
    ]
    wanted += [
        "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/x.json",
    ]
    for path in wanted:
        assert any(fnmatch(path, pattern) for pattern in patterns), path
    for path in ("flux1-kontext-dev.safetensors", "ae.safetensors"):
        assert not any(fnmatch(path, pattern) for pattern in patterns), path
    execute(["hf", *words[1:], "--help"], ROOT)  # its options exist

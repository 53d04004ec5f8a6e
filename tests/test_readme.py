"""README tells the truth: every block runs, and what cannot run here says what it would."""

import os
import re
import shutil
import subprocess
import sys
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


def test_the_download_is_a_command_that_exists() -> None:
    """It needs an account and 34 GB, so it is only asked for its help; what it takes is tested with a hub of our own."""
    (text,) = [text for language, text in BLOCKS if language == "text" and "models pull" in text]
    assert text.splitlines()[:2] == ["hf auth login", "mlx-kontext models pull"]
    assert "34 GB" in execute(["mlx-kontext", "models", "pull", "--help"], ROOT)
    execute(["hf", "auth", "login", "--help"], ROOT)

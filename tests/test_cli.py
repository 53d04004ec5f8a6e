"""The command line as people meet it: results on stdout, everything else on stderr, one line for every mistake."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_kontext import cli
from mlx_kontext.hub import demo_folder

SAMPLE = str(Path(__file__).parent.parent / "assets" / "sample.png")
EDIT = ["edit", SAMPLE, "make the circle green", "--model", "demo", "-o", "out.png"]


@dataclass
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `mlx-kontext ARGUMENTS` in this process, in an empty folder without settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("mlx_kontext.config.user_file", lambda: tmp_path / "config.toml")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str | Path) -> Ran:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(exited.value.code, captured.out, captured.err)

    return call


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_kontext", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_edit_writes_a_picture_and_says_where(run: Run) -> None:
    ran = run(*EDIT, "--seed", "7")
    assert (ran.code, ran.out) == (0, "out.png\n")
    assert "seed 7" in ran.err and "edited at 96x96" in ran.err
    assert pixels("out.png").shape == (96, 96, 3)


def test_show_and_from_repeat(run: Run) -> None:
    run(*EDIT, "--seed", "7", "--steps", "3", "--guidance", "2")
    shown = run("show", "out.png")
    assert shown.code == 0
    for row in (
        "prompt +make the circle green",
        "seed +7",
        "num_inference_steps +3",
        "guidance_scale +2.0",
        "image +sample.png",
    ):
        assert re.search(row, shown.out)
    assert json.loads(run("show", "out.png", "--json").out)["request"]["seed"] == 7

    again = run("edit", "--from", "out.png", SAMPLE, "-o", "again.png")  # the demo is remembered too
    assert again.code == 0 and np.array_equal(pixels("again.png"), pixels("out.png"))
    other = run("edit", "--from", "out.png", SAMPLE, "remove the circle", "--steps", "2", "-o", "other.png")
    assert other.code == 0
    record = json.loads(run("show", "other.png", "--json").out)["request"]
    assert (record["prompt"], record["num_inference_steps"], record["seed"]) == ("remove the circle", 2, 7)
    Image.fromarray(pixels("out.png")).save("plain.png")
    assert run("edit", "--from", "plain.png", SAMPLE, "-o", "x.png").code == 5


STRANGE = [
    '"x"',
    '{"prompt": 3}',
    '{"prompt": "x", "seed": 1.5}',
    '{"prompt": "x", "seed": "ab"}',
    '{"prompt": "x", "num_inference_steps": 1e9}',
    '{"prompt": "x", "latents": [1]}',
    '{"prompt": "x", "zoom": 2}',
    '{"prompt": "x", "width": true, "height": true}',
]


@pytest.mark.parametrize("request_", STRANGE)
def test_records_of_strangers_are_not_trusted(run: Run, request_: str) -> None:
    picture = PngInfo()
    picture.add_itxt("mlx_kontext", f'{{"request": {request_}, "model": [1], "width": {{}}}}')
    Image.new("RGB", (64, 64)).save("strange.png", pnginfo=picture)
    assert run("show", "strange.png").code in (0, 5)
    ran = run("edit", "--from", "strange.png", SAMPLE, "-o", "out.png", "--model", "demo")
    assert (
        ran.code in (2, 5) and ran.err.strip().splitlines()[-1].startswith("error: ") and not Path("out.png").exists()
    )


def test_json_is_one_object_a_result(run: Run) -> None:
    ran = run(*EDIT[:-1], "out-{seed}.png", "--seed", "1", "--seed", "2", "--json")
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [(row["path"], row["request"]["seed"]) for row in rows] == [("out-1.png", 1), ("out-2.png", 2)]
    assert all(row["width"] == 96 and row["seconds"] > 0 and row["notices"] for row in rows)
    assert Path("out-1.png").exists() and Path("out-2.png").exists()


def test_generate_and_sizes(run: Run) -> None:
    assert run("generate", "a red circle", "--model", "demo", "-o", "a.webp", "--steps", "1").code == 0
    assert pixels("a.webp").shape == (96, 96, 3)
    assert (
        run("generate", "a red circle", "--model", "demo", "-o", "b.jpg", "--steps", "1", "--size", "96x32").code == 0
    )
    assert pixels("b.jpg").shape == (32, 96, 3)
    assert run("generate", "a red circle", "--model", "demo", "-o", "c.png", "--steps", "1", "--size", "16:9").code == 0
    assert pixels("c.png").shape == (64, 96, 3)  # the widest this model knows
    assert run("generate", "a red circle", "--model", "demo", "-o", "d.png", "--size", "match").code == 2


def test_diffusers_spellings(run: Run) -> None:
    ran = run(*EDIT, "--num-inference-steps", "2", "--guidance-scale", "3", "--seed", "1", "--json")
    request = json.loads(ran.out)["request"]
    assert (request["num_inference_steps"], request["guidance_scale"]) == (2, 3.0)


def test_draft_and_true_cfg(run: Run) -> None:
    record = json.loads(run(*EDIT, "--draft", "--json").out)
    assert record["draft"] and record["request"]["num_inference_steps"] == 4
    assert "draft, a preview" in record["notices"][-1]
    ran = run(*EDIT[:-1], "b.png", "--negative-prompt", "make the circle red", "--true-cfg", "2", "--json")
    assert json.loads(ran.out)["request"]["true_cfg_scale"] == 2.0


def test_stdin_and_stdout() -> None:
    arguments = ["edit", SAMPLE, "-", "--model", "demo", "--seed", "7", "-o", "-"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_kontext", *arguments],
        input=b"make the circle green",
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"\x89PNG")
    assert b"seed 7" in done.stderr


def test_inspect(run: Run) -> None:
    page = run("inspect", "demo").out
    assert "mlx_kontext folder" in page and "3,446,336 parameters" in page and "it fits" in page
    report = json.loads(run("inspect", demo_folder(), "--json").out)
    assert report["parts"]["vae"]["tensors"] == 180 and report["memory"]["fits"] is True


def test_inspect_counts_for_the_dtype_of_the_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_KONTEXT_DTYPE", "bfloat16")
    assert json.loads(run("inspect", "demo", "--json").out)["edit"]["dtype"] == "bfloat16"
    assert json.loads(run("inspect", "demo", "--dtype", "float32", "--json").out)["edit"]["dtype"] == "float32"


def test_notices_come_once_and_before_the_result(run: Run) -> None:
    ran = run(*EDIT[:-1], "out-{seed}.png", "--seed", "1", "--seed", "2")
    assert ran.err.count("edited at 96x96") == 1 and ran.err.index("edited at") < ran.err.index("seed 1,")


def test_config_names_origins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_KONTEXT_MODEL", "demo")
    assert re.search(r"model +demo +from MLX_KONTEXT_MODEL", run("config").out)
    assert json.loads(run("config", "--json").out)["model"] == {"value": "demo", "origin": "MLX_KONTEXT_MODEL"}
    assert run(*[a for a in EDIT if a not in ("--model", "demo")]).code == 0


def test_help_and_version(run: Run) -> None:
    assert run().out == run("--help").out and "edit" in run("--help").out
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").out)
    for command in ("edit", "generate", "show", "inspect", "models", "config", "doctor"):
        assert run(command, "-h").code == 0


# --- bad input: arguments, exit code, what the one line says ---


def damaged_model(path: Path) -> Path:
    shutil.copytree(demo_folder(), path)
    (path / "transformer" / "model-00001-of-00002.safetensors").unlink()
    return path


def bad_files(folder: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    Image.radial_gradient("L").save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("1", (20000, 10)).save(folder / "strip.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    damaged_model(folder / "broken")
    (folder / "here.png").write_bytes(b"precious")


BAD: dict[str, tuple[list[str], int, str]] = {
    "prompt not text": (["edit", SAMPLE, "red \udcff"], 2, "not valid UTF-8"),
    "home of nobody": (["edit", SAMPLE, "x", "--model", "~nosuch/x"], 3, "expected demo"),
    "missing file": (["edit", "nosuch.png", "x"], 5, "nosuch.png"),
    "folder as picture": (["edit", ".", "x"], 5, "folder"),
    "empty file": (["edit", "empty.png", "x"], 5, "empty"),
    "text renamed": (["edit", "text.png", "x"], 5, "text.png"),
    "truncated": (["edit", "cut.jpg", "x"], 5, "cut.jpg"),
    "1x1": (["edit", "one.png", "x"], 5, "1x1"),
    "20000x10": (["edit", "strip.png", "x"], 5, "20000x10"),
    "bomb": (["edit", "bomb.png", "x"], 5, "bomb.png"),
    "empty prompt": (["edit", SAMPLE, ""], 2, "prompt is empty"),
    "blank prompt": (["generate", " \n "], 2, "prompt is empty"),
    "no prompt": (["edit", SAMPLE], 2, "PROMPT"),
    "odd size": (["edit", SAMPLE, "x", "--size", "100x64"], 2, "multiples of 16"),
    "word for size": (["edit", SAMPLE, "x", "--size", "big"], 2, "expected WxH"),
    "zero size": (["edit", SAMPLE, "x", "--size", "0x0"], 2, "width"),
    "zero aspect": (["edit", SAMPLE, "x", "--size", "0:1"], 2, "size"),
    "steps 0": (["edit", SAMPLE, "x", "--steps", "0"], 2, "num_inference_steps is 0"),
    "steps word": (["edit", SAMPLE, "x", "--steps", "many"], 2, "--steps"),
    "NaN guidance": (["edit", SAMPLE, "x", "--guidance", "nan"], 2, "guidance_scale is nan"),
    "negative guidance": (["edit", SAMPLE, "x", "--guidance", "-1"], 2, "guidance_scale"),
    "infinite cfg": (["edit", SAMPLE, "x", "--true-cfg", "inf", "--negative-prompt", "y"], 2, "true_cfg_scale"),
    "cfg alone": (["edit", SAMPLE, "x", "--true-cfg", "2"], 2, "only together"),
    "negative seed": (["edit", SAMPLE, "x", "--seed", "-1"], 2, "seed"),
    "seed twice": (
        ["edit", SAMPLE, "x", "--seed", "1", "--seed", "1", "-o", "{seed}.png"],
        2,
        "each seed may appear once",
    ),
    "seeds, one name": (["edit", SAMPLE, "x", "--seed", "1", "--seed", "2"], 2, "{seed}"),
    "long T5": (["edit", SAMPLE, "x", "--max-sequence-length", "1000"], 2, "max_sequence_length"),
    "unknown dtype": (["edit", SAMPLE, "x", "--dtype", "int3"], 2, "float32, float16, bfloat16"),
    "unknown model": (["edit", SAMPLE, "x", "--model", "nosuch"], 3, "expected demo"),
    "model not here": (
        ["edit", SAMPLE, "x", "--model", "black-forest-labs/FLUX.1-Kontext-dev"],
        3,
        "mlx-kontext models pull",
    ),
    "shard missing": (["edit", SAMPLE, "x", "--model", "broken"], 1, "model-00001-of-00002"),
    "output taken": (["edit", SAMPLE, "x", "-o", "here.png"], 2, "--overwrite"),
    "output suffix": (["edit", SAMPLE, "x", "-o", "out.gif"], 2, ".png"),
    "output nowhere": (["edit", SAMPLE, "x", "-o", "no/such/out.png"], 2, "not a folder"),
    "stdout and JSON": (["edit", SAMPLE, "x", "-o", "-", "--json"], 2, "no --json"),
    "unknown option": (["edit", SAMPLE, "x", "--stepz", "3"], 2, "--stepz"),
    "unknown command": (["edti"], 2, "edti"),
    "show a plain picture": (["show", "whole.jpg"], 5, "no mlx_kontext record"),
    "show nothing": (["show", "nosuch.png"], 5, "nosuch.png"),
    "from nothing": (["edit", "--from", "nosuch.png", SAMPLE], 5, "nosuch.png"),
    "inspect nothing": (["inspect", "nosuch"], 3, "nosuch"),
    "inspect broken": (["inspect", "broken"], 1, "model-00001-of-00002"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run: Run, tmp_path: Path, name: str) -> None:
    arguments, code, told = BAD[name]
    bad_files(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    if arguments[0] in ("edit", "generate"):
        arguments = [*arguments, *([] if "-o" in arguments else ["-o", "out.png"])]
        arguments += [] if "--model" in arguments else ["--model", "demo"]
    ran = run(*arguments)
    assert ran.code == code and ran.out == ""
    *_, last = ran.err.strip().splitlines()
    assert told in last and "Traceback" not in ran.err and last.lower().startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "here.png").read_bytes() == b"precious"


def test_a_very_long_prompt_is_cut_and_told(run: Run) -> None:
    ran = run("edit", SAMPLE, "word " * 10_000, "--model", "demo", "-o", "out.png", "--steps", "1")
    assert ran.code == 0 and "its end is cut off" in ran.err


def test_existing_files_are_replaced_only_on_request(run: Run) -> None:
    Path("out.png").write_bytes(b"precious")
    assert run(*EDIT).code == 2 and Path("out.png").read_bytes() == b"precious"
    assert run(*EDIT, "--overwrite").code == 0 and pixels("out.png").shape == (96, 96, 3)


def test_hostile_words_do_not_reach_the_terminal(run: Run) -> None:
    ran = run("edit", "\x1b]52;c;aGk=\x07.png", "x", "-o", "out.png", "--model", "demo")
    assert "\x1b" not in ran.err + ran.out and ran.code == 5
    run("edit", SAMPLE, "evil \x1b]52;c;aGk=\x07\u202e prompt", "-o", "out.png", "--model", "demo")
    shown = run("show", "out.png")
    assert "\x1b" not in shown.out and "\u202e" not in shown.out and "evil" in shown.out


def start(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_kontext", *arguments], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_ctrl_c_stops_at_the_next_step_and_leaves_no_file(tmp_path: Path) -> None:
    edit = start(*EDIT, "--steps", "1000", "--size", "256x256", folder=tmp_path)
    time.sleep(3)
    edit.send_signal(signal.SIGINT)
    _, err = edit.communicate(timeout=20)
    assert edit.returncode == 130 and b"stopping after this step" in err and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    edit = start(*EDIT, "--steps", "1", "--size", "2048x2048", folder=tmp_path)  # a step of minutes
    time.sleep(4)
    edit.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert edit.poll() is None
    edit.send_signal(signal.SIGINT)
    assert edit.wait(timeout=3) == 130
    edit.communicate()
    assert list(tmp_path.iterdir()) == []


def test_progress_only_on_a_terminal(tmp_path: Path) -> None:
    """A bar on a real terminal, none in a log."""
    assert "step" not in process(*EDIT, cwd=tmp_path).stderr
    leader, follower = pty.openpty()
    fcntl.ioctl(
        follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0)
    )  # a new one is 0x0: too small for a bar
    edit = subprocess.Popen(
        [sys.executable, "-m", "mlx_kontext", *EDIT, "--steps", "60", "--overwrite"],
        cwd=tmp_path,
        stderr=follower,
        stdout=subprocess.DEVNULL,
    )
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 4096):
            seen += chunk
    except OSError:  # Linux says so when the other end closes
        pass
    assert edit.wait() == 0 and re.search(rb"\d+/60 .*step/s", seen)
    os.close(leader)


def test_a_closed_pipe_is_no_crash(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mlx_kontext show {tmp_path / 'a.png'} | true"
    process(*EDIT[:-1], str(tmp_path / "a.png"))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr

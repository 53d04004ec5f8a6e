"""Sessions on the command line: `edit --session`, `sessions ...`, `run`, and everything a hand may get wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from power import made, picture

from mlx_kontext import EditSession, cli
from mlx_kontext.recipes import Recipe

SAMPLE = str(Path(__file__).parent.parent / "assets" / "sample.png")
DEMO = ["--model", "demo", "--steps", "2"]
OSC = "\x1b]52;c;aGk=\x07"


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        return self.err.strip().splitlines()[-1]


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `mlx-kontext ARGUMENTS` in this process, in an empty folder, with settings and sessions of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_kontext.config.user_file", lambda: tmp_path / "config.toml")
    monkeypatch.setattr("mlx_kontext.sessions.sessions_folder", lambda: tmp_path / "data" / "sessions")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str | Path) -> Ran:
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        for text in (captured.out, captured.err):
            assert "\x1b" not in text and "\x07" not in text
        return Ran(exited.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def session(run: Run) -> Path:
    """Without a model: sample.png, edits 1 and 2 in a row, 3 beside 2; hostile words in it; one edit queued."""
    with EditSession.create("s", SAMPLE) as session:
        for number, parent in ((1, 0), (2, 1), (3, 1)):
            session.append(made(number), parent=parent)
        session.star(1)
        session.note(2, f"note\n{OSC}")
        session.enqueue(f"queued {OSC}\nand more")
        session.checkout(2)
    return Path("s")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def test_a_session_from_the_first_edit_to_the_last(run: Run) -> None:
    first = run("edit", SAMPLE, "make the circle green", "--session", "s", "--seed", "1", *DEMO)
    assert first.code == 0 and first.out.startswith(os.path.realpath("s") + "/objects/")
    assert "editing picture 0 of" in first.err and "\npicture 1\n" in first.err
    assert pixels(first.out.strip()).shape == (96, 96, 3)

    second = run("edit", "make the background black", "--session", "s", "--seed", "2", "--steps", "2", "--json")
    record = json.loads(second.out)  # with the model of before, and IMAGE left out
    assert second.code == 0 and record["picture"] == 2 and record["request"]["seed"] == 2
    assert record["session"] == os.path.realpath("s") and Path(record["path"]).is_file()
    assert "editing picture 1 of" in second.err and "make the circle green" in second.err

    third = run("edit", SAMPLE, "remove the circle", "--session", "s", "-o", "out.png", "--at", "0", *DEMO)
    assert third.code == 0 and third.out == "out.png\n"
    with EditSession.open("s") as session:
        assert [node.parent for node in session.nodes.values()] == [None, 0, 1, 0]
        assert np.array_equal(pixels("out.png"), np.array(session.picture(3)))

    fourth = run("edit", "make it night", "--session", "s", "--seed", "5", "--seed", "6", *DEMO)
    assert fourth.code == 0 and len(fourth.out.splitlines()) == 2
    fifth = run("edit", SAMPLE, "make it day", "--session", "s", *DEMO)  # IMAGE named again: goes on, not back
    assert "editing picture 5 of" in fifth.err
    run("sessions", "export", "s", "2", "-o", "2.png")
    sixth = run("edit", "2.png", "make it red", "--session", "s", *DEMO)  # a result named: goes on from there
    assert "editing picture 2 of" in sixth.err
    with EditSession.open("s") as session:
        assert [session.node(i).parent for i in (4, 5, 6, 7)] == [3, 3, 5, 2] and session.check().sound


def test_from_a_record_in_a_session(run: Run) -> None:
    run("edit", SAMPLE, "make the circle green", "-o", "a.png", "--seed", "9", *DEMO)
    assert run("edit", SAMPLE, "--from", "a.png", "--session", "s").code == 0
    assert run("edit", "--from", "a.png", "--session", "s").code == 0
    with EditSession.open("s") as session:
        assert [(node.prompt, node.seed) for node in session.path()][1:] == [("make the circle green", 9)] * 2
        assert np.array_equal(pixels("a.png"), np.array(session.picture(1)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "make it red", "--session", "new"], "new holds no session yet; begin it with a picture"),
        (["edit", SAMPLE, "--session", "new"], "new holds no session yet; begin it with a picture"),
        (["edit", SAMPLE, "x", "--session", "new", "--at", "1"], "begin it with a picture and without --at"),
        (["edit", SAMPLE, "--session", "s"], "sample.png is a picture, say what to change as well"),
        (["edit", "--session", "s"], "Missing argument 'PROMPT'"),
        (["edit", SAMPLE, "x", "--at", "1", "-o", "o.png"], "--at needs --session"),
        (["edit", SAMPLE, "x"], "Missing option '-o' / '--output'"),
        (["edit"], "Missing argument 'IMAGE'"),
        (["generate", "x"], "Missing option '-o' / '--output'"),
        (
            ["edit", "other.png", "x", "--session", "s"],
            "began with (sample.png, 96x96), nor one of its results; leave IMAGE",
        ),
        (["edit", "other.png", "x", "--session", "s", "--at", "1"], "other.png is not the picture that"),
        (["edit", " ", "--session", "s"], "the prompt is empty"),
    ],
)
def test_usage_mistakes(run: Run, session: Path, arguments: list[str], words: str) -> None:
    picture(77).save("other.png")
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "") and words in ran.error
    assert not Path("new").exists() and len(EditSession.open("s", readonly=True).nodes) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "x", "--session", "s", "--at", "9"], "has no picture 9; it has 0, 1, 2, 3"),
        (["sessions", "show", "none"], "none is no edit session, here or in"),
        (["sessions", "export", "s", "9", "-o", "x.png"], "has no picture 9"),
    ],
)
def test_session_mistakes(run: Run, session: Path, arguments: list[str], words: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (1, "") and words in ran.error


def test_long_words_are_prompts_and_no_files(run: Run, session: Path) -> None:
    ran = run("edit", "make it red " * 100, "--session", "s", "-o", "out.txt")
    assert ran.code == 2 and "ends in none of .png" in ran.error
    ran = run("edit", SAMPLE, "x", "--session", "n" * 300)
    assert ran.code == 1 and "File name too long" in ran.error


def test_a_full_disk_is_told_before_any_work(run: Run, session: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_kontext.disk.Files.free", lambda *_: 10**6)
    ran = run("edit", "make it red", "--session", "s", *DEMO)
    assert ran.code == 4 and "1 MB are free on its disk" in ran.error and "opening" not in ran.err


def test_lost_latents_are_told(run: Run, session: Path) -> None:
    with EditSession.open("s", readonly=True) as opened:
        (session / "objects" / f"{opened.current.latents}.safetensors").unlink()
    ran = run("edit", "make it red", "--session", "s", *DEMO)
    assert ran.code == 0 and "note: started from pixels instead of latents" in ran.err
    with EditSession.open("s", readonly=True) as opened:
        assert any("started from pixels" in notice for notice in opened.current.notices)


def test_a_session_in_use(run: Run, session: Path) -> None:
    with EditSession.open(session):
        ran = run("edit", "make it red", "--session", "s", *DEMO)
        assert ran.code == 1 and f"cannot be added to: process {os.getpid()} has it open" in ran.error
        assert run("sessions", "show", "s").code == 0
        assert "so nothing is set aside" in run("sessions", "check", "s").err
        assert "open for reading only" in run("sessions", "gc", "s").error
        assert run("sessions", "gc", "s", "--dry-run").code == 0


def test_list(run: Run, session: Path) -> None:
    assert (run("sessions", "list").code, run("sessions", "list").out) == (0, "")
    for name in ("b", "a"):
        EditSession.create(Path("data/sessions") / name, SAMPLE).close()
    Path("data/sessions/no-session").mkdir()
    Path("data/sessions/link").symlink_to(Path("s").absolute())
    lines = run("sessions", "list").out.splitlines()
    assert len(lines) == 2 and "sessions/a  1 pictures  20" in lines[0] and lines[0].endswith("  sample.png")
    (one,) = map(json.loads, run("sessions", "list", "s", "--json").out.splitlines())
    assert (one["pictures"], one["queued"], one["began_with"], one["damaged_turns"]) == (4, 1, "sample.png", 0)
    assert run("sessions", "show", "a").out.startswith("   0 < sample.png  96x96")  # by its name
    ran = run("sessions", "list", "nowhere")
    assert ran.code == 2 and "nowhere is no folder" in ran.error


def test_show(run: Run, session: Path) -> None:
    ran = run("sessions", "show", "s")
    assert ran.code == 0 and ran.out.splitlines() == [
        "   0   sample.png  96x96",
        "   1*  make it snow  seed 1",
        "   2 <   make it snow  seed 2  (note··]52;c;aGk=·)",
        "   3     make it snow  seed 3",
    ]
    assert ran.err == "queued: queued ·]52;c;aGk=··and more\n"
    nodes = [json.loads(line) for line in run("sessions", "show", "s", "--json").out.splitlines()]
    assert [node["picture"] for node in nodes] == [0, 1, 2, 3] and nodes[2]["current"] and nodes[1]["starred"]
    assert all(Path(node["path"]).is_file() for node in nodes)
    Path("r.toml").write_text(run("sessions", "show", "s", "--recipe").out)
    assert [step["seed"] for step in Recipe.read("r.toml").steps] == [1, 2]
    assert "seed = 3" in run("sessions", "show", "s", "--recipe", "--at", "3").out
    assert run("sessions", "show", "s", "--at", "3").code == 2


def test_show_of_a_long_chain_and_many_branches(run: Run) -> None:
    with EditSession.create("s", SAMPLE) as session:
        for i in range(30):
            session.append(made(i))
    assert max(len(line) for line in run("sessions", "show", "s").out.splitlines()) < 40  # a chain runs straight down


def test_export(run: Run, session: Path) -> None:
    ran = run("sessions", "export", "s", "-o", "{name}-{node}.png")
    assert (ran.code, ran.out) == (0, "sample-2.png\n")
    assert run("sessions", "export", "s", "1", "3", "1", "-o", "{node}.png").out == "1.png\n3.png\n"
    assert np.array_equal(pixels("3.png"), np.array(picture(3)))
    assert "seed +3" and "make it snow" in run("show", "3.png").out
    ran = run("sessions", "export", "s", "1", "2", "-o", "x.png")
    assert ran.code == 2 and "2 pictures need {node} in the name" in ran.error and not Path("x.png").exists()
    ran = run("sessions", "export", "s", "1", "-o", "1.png")
    assert ran.code == 2 and "1.png exists" in ran.error
    assert run("sessions", "export", "s", "1", "-o", "1.png", "--overwrite").code == 0
    one = json.loads(run("sessions", "export", "s", "3", "-o", "{name}.toml", "--json").out)
    assert one["path"] == "sample.toml" and len(Recipe.read("sample.toml").steps) == 2
    assert run("sessions", "export", "s", "0", "-o", "x.png").code == 2


def test_check_and_gc(run: Run, session: Path) -> None:
    ran = run("sessions", "check", "s")
    assert (ran.code, ran.out) == (0, "") and "8 turns, 7 objects: all sound" in ran.err
    (session / "objects" / f".x{OSC}.tmp").write_bytes(b"x")
    ran = run("sessions", "check", "s")
    assert ran.code == 0 and "leftover, a write that was cut short; it is now damaged/" in ran.out
    turn = session / "turns" / "000003.json"
    turn.write_bytes(turn.read_bytes()[:-9])
    assert "1 turns cannot be read" in run("sessions", "list", "s").out
    shown = run("sessions", "show", "s")
    assert "note: " in shown.err and "turns/000003.json: its checksum does not fit" in shown.err and shown.code == 0
    ran = run("sessions", "check", "s", "--json")
    (finding,) = map(json.loads, ran.out.splitlines())
    assert ran.code == 1 and (finding["kind"], finding["aside"]) == ("damaged", "damaged/000003.json")
    assert "error: damaged, the rest works" in ran.err and "2 unused (gc removes them)" in ran.err
    ran = run("sessions", "gc", "s")
    assert ran.code == 1 and "so nothing was removed" in ran.error
    ran = run("sessions", "gc", "s", "--damaged", "--dry-run", "--json")
    assert json.loads(ran.out)["files"] == 4 and turn.parent.parent.joinpath("damaged", "000003.json").exists()
    assert ": 4 files, 0.0 MB" in run("sessions", "gc", "s", "--damaged").out
    assert run("sessions", "check", "s").code == 0 and run("sessions", "check").code == 0


def test_run_a_recipe_on_photos(run: Run) -> None:
    run("edit", SAMPLE, "make the circle green", "--session", "s", "--seed", "1", *DEMO)
    run("edit", "make the background black", "--session", "s", "--seed", "2", *DEMO)
    run("sessions", "export", "s", "-o", "r.toml")
    Path("photos").mkdir()
    with Image.open(SAMPLE) as image:
        image.save("photos/same.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("photos/other.png")
    ran = run("run", "r.toml", "photos/same.png", "photos/other.png", "-o", "out/deep")  # with the recipe's model
    assert (ran.code, ran.out) == (
        0,
        "out/deep/same.png\nout/deep/other.png\n",
    ) and "photos/other.png: 2 edits" in ran.err
    with EditSession.open("s") as session:
        assert np.array_equal(pixels("out/deep/same.png"), np.array(session.picture(2)))
    assert (
        json.loads(run("show", "out/deep/other.png", "--json").out)["request"]["prompt"] == "make the background black"
    )
    ran = run("run", "r.toml", "photos/same.png", "-o", "out/deep")
    assert ran.code == 2 and "exists" in ran.error
    one = json.loads(run("run", "r.toml", "photos/same.png", "-o", "out/deep", "--overwrite", "--json").out)
    assert (one["photo"], one["path"]) == ("photos/same.png", "out/deep/same.png")


def test_run_mistakes_are_told_before_any_work(run: Run) -> None:
    Recipe(({"prompt": f"x {OSC}"},), "demo").write("r.toml")
    picture(1).save("a.png")
    Path("bad.png").write_bytes(b"no picture")
    Path("file").write_text("")
    for arguments, code, words in (
        (["r.toml", "a.png", "none.png"], 5, "none.png does not exist"),
        (["r.toml", "a.png", "bad.png"], 5, "bad.png is no PNG"),
        (["r.toml", "a.png", "./a.png"], 2, "two photos would both become out/a.png"),
        (["none.toml", "a.png"], 2, "none.toml cannot be read"),
        (["bad.png", "a.png"], 2, "bad.png is no readable TOML"),
        (["r.toml"], 2, "Missing argument 'PHOTO...'"),
    ):
        ran = run("run", *arguments, "-o", "out")
        assert ran.code == code and words in ran.error and not Path("out").exists(), ran
    ran = run("run", "r.toml", "a.png", "-o", "file/out")
    assert ran.code == 2 and "file/out cannot be made" in ran.error


def test_interrupted_the_session_keeps_what_is_done(tmp_path: Path) -> None:
    """Ctrl-C in the third of many seeds: the first ones are in the session, which is not left locked."""
    seeds = [word for seed in range(40) for word in ("--seed", str(seed))]
    command = [sys.executable, "-m", "mlx_kontext", "edit", SAMPLE, "make it red", "--session", str(tmp_path / "s")]
    with subprocess.Popen([*command, *DEMO, *seeds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as edit:
        for _ in range(2):
            assert edit.stdout.readline()
        edit.send_signal(signal.SIGINT)
        _, err = edit.communicate(timeout=60)
    assert edit.returncode == 130 and "stopping after this step" in err
    with EditSession.open(tmp_path / "s") as session:
        assert session.lock.held and 3 <= len(session.nodes) < 41 and session.check().sound

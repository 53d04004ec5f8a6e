"""The tree of edits: undo, branches, queue, two processes, and the same pictures again from what was kept."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from power import made, picture

from mlx_kontext import EditRequest, EditSession, turns
from mlx_kontext.edit import Step
from mlx_kontext.errors import ImageError, RequestError, ResourceError, SessionError
from mlx_kontext.provenance import read_record
from mlx_kontext.sessions import is_session, new_folder, sessions_folder

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"


class Fake:
    """A pipeline that draws a plain colour by the seed, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[EditRequest] = []

    def stream(self, image: Any = None, prompt: str | None = None, **options: Any) -> Iterator[Step]:
        request = EditRequest.of(image, prompt, **options)
        self.asked.append(request)
        for seed in request.seeds or (1000 + len(self.asked),):
            mine = dataclasses.replace(made(seed % 256), request=dataclasses.replace(request, seed=seed), seed=seed)
            yield Step(1, 2, seed, 0.1, 0.1, 0.5)
            yield Step(2, 2, seed, 0.1, 0.0, 0.0, result=mine)


@pytest.fixture
def pipe() -> Fake:
    return Fake()


@pytest.fixture
def session(tmp_path: Path) -> Iterator[EditSession]:
    with EditSession.create(tmp_path / "s", SAMPLE) as session:
        yield session


def again(session: EditSession) -> EditSession:
    """What another process would see."""
    return EditSession.open(session.folder, readonly=True)


def test_a_tree_of_edits(session: EditSession, pipe: Fake) -> None:
    assert session.current.kind == "source" and session.current.id == 0 and session.current.name == "sample.png"
    session.edit(pipe, "make it red", seed=1)
    session.edit(pipe, "make it blue", seed=2)
    session.undo()
    session.edit(pipe, "make it green", seed=3)
    session.undo()
    session.undo()
    with pytest.raises(SessionError, match="nothing to undo"):
        session.undo()
    for s in (session, again(session)):
        assert [(node.id, node.parent, node.prompt) for node in s.nodes.values()] == [
            (0, None, ""),
            (1, 0, "make it red"),
            (2, 1, "make it blue"),
            (3, 1, "make it green"),
        ]
        assert s.current.id == 0 and s.children(1) == (2, 3) and [node.id for node in s.path(3)] == [0, 1, 3]
    assert session.redo().id == 1 and session.redo().id == 3  # where we came from
    with pytest.raises(SessionError, match="nothing to redo"):
        session.redo()
    assert session.sibling(-1).id == 2 and session.undo().id == 1 and session.redo().id == 2
    with pytest.raises(SessionError, match="no earlier edit"):
        session.sibling(-1)
    assert session.checkout(0).id == 0 and session.redo().id == 1 and session.redo().id == 2
    session.edit(pipe, "from the first", parent=0, seed=4)
    assert session.current.id == 4 and session.current.parent == 0 and pipe.asked[-1].image.size == (96, 96)
    with pytest.raises(SessionError, match=r"no picture 9; it has 0, 1, 2, 3, 4"):
        session.checkout(9)


def test_redo_leads_back_along_the_path_last_visited(session: EditSession) -> None:
    """Against a slow model of the rule, on random walks."""
    draw = np.random.default_rng(0)
    visited: dict[int, int] = {}

    def visit() -> None:
        for node in session.path():
            if node.parent is not None:
                visited[node.parent] = node.id

    for i in range(150):
        choice = draw.random()
        if choice < 0.4:
            session.append(made(i % 256), parent=int(draw.integers(len(session.nodes))))
        elif choice < 0.7 and session.current.parent is not None:
            session.undo()
        elif choice < 0.9 and session.children(session.current.id):
            children = session.children(session.current.id)
            assert visited.get(session.current.id, children[-1]) == session.redo().id
        else:
            session.checkout(int(draw.integers(len(session.nodes))))
        visit()


def test_several_seeds_are_siblings(session: EditSession, pipe: Fake) -> None:
    results = session.edit(pipe, "make it red", seed=[5, 6])
    assert [result.seed for result in results] == [5, 6]
    assert session.children(0) == (1, 2) and session.current.id == 2
    assert session.node(1).request["seed"] == 5 and len(pipe.asked) == 1


def test_stars_and_notes(session: EditSession, pipe: Fake) -> None:
    session.edit(pipe, "make it red", seed=1)
    session.star(1)
    session.note(0, 'so "far"\n🙂')
    session.star(0)
    session.star(0, on=False)
    for s in (session, again(session)):
        assert [node.starred for node in s.nodes.values()] == [False, True]
        assert s.node(0).note == 'so "far"\n🙂'
    with pytest.raises(RequestError, match="a note is int; expected text"):
        session.note(0, 5)
    with pytest.raises(RequestError, match="make its prompt or note shorter"):
        session.note(0, "x" * 2**20)
    assert session.edit(pipe, "make it blue", seed=2) and session.current.id == 2  # the refusal left nothing behind


def test_the_queue_survives_and_empties_itself(session: EditSession, pipe: Fake) -> None:
    first = session.enqueue("make it red", seed=[1, 2], num_inference_steps=3)
    second = session.enqueue("make it blue", parent=0, seed=3)
    third = session.enqueue("make it green")
    session.reorder([third.id])
    assert [item.id for item in again(session).queue] == [third.id, first.id, second.id]
    session.reorder([first.id, second.id, third.id])
    session.dequeue(third.id)
    with pytest.raises(SessionError, match=f"no edit {third.id} is queued; queued are {first.id}, {second.id}"):
        session.dequeue(third.id)

    steps = session.stream_queued(pipe)
    for step in steps:
        if step.result:  # stopped after the first seed, as by a crash
            break
    steps.close()
    other = again(session)
    assert other.queue[0].request["seed"] == [2] and other.queue[0].parent == 0
    assert list(session.stream_queued(pipe)) and list(session.stream_queued(pipe))
    assert session.queue == () == again(session).queue
    assert [(node.seed, node.parent) for node in session.nodes.values()] == [(None, None), (1, 0), (2, 0), (3, 0)]
    assert pipe.asked[1].seeds == (2,) and pipe.asked[1].num_inference_steps == 3
    with pytest.raises(SessionError, match="the queue is empty"):
        session.stream_queued(pipe)


def test_a_queued_edit_starts_from_what_is_current_then(session: EditSession, pipe: Fake) -> None:
    item = session.enqueue("make it red", seed=1)
    session.append(made(7))
    assert session.request(item.id).image.seed == 7
    list(session.stream_queued(pipe))
    assert session.current.parent == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "latents": np.zeros((1, 1, 64))}, "cannot hold latents"),
        ({"prompt": "x", "parent": 5}, "no picture 5"),
    ],
)
def test_what_could_not_work_later_is_not_queued(session: EditSession, options: dict, words: str) -> None:
    with pytest.raises((RequestError, SessionError), match=words):
        session.enqueue(**options)
    assert session.queue == ()


def test_results_of_another_process(session: EditSession) -> None:
    node = session.append(made(1), parent=0, timings={"encode": 0.1}, safety={"mode": "filters", "scores": [0.1]})
    other = session.append(made(2), parent=0, follow=False)
    assert session.current.id == node.id and other.id == 2
    kept = again(session).node(1)
    assert kept.timings == {"total": 0.5, "encode": 0.1} and kept.safety == {"mode": "filters", "scores": [0.1]}
    rgba = dataclasses.replace(made(3), image=picture(3).convert("RGBA"))
    with pytest.raises(RequestError, match="has mode RGBA; a session keeps RGB"):
        session.append(rgba)
    nan = dataclasses.replace(made(3), latents=np.full((1, 1, 64), np.nan))
    with pytest.raises(RequestError, match="expected finite packed latents"):
        session.append(nan)
    bare = session.append(dataclasses.replace(made(3), latents=None))
    assert bare.latents is None and session.result(bare.id).vae == ""


def test_pictures_made_from_nothing_are_roots(tmp_path: Path) -> None:
    nothing = dataclasses.replace(made(1), request=EditRequest("a red circle", seed=1))
    with EditSession.create(tmp_path / "s", nothing) as session:
        assert session.current.kind == "generate" and session.current.parent is None
        session.append(made(2))
        session.append(dataclasses.replace(nothing, image=picture(9)))
        assert session.children(None) == (0, 2) and session.current.id == 2
        with pytest.raises(SessionError, match="nothing to undo"):
            session.undo()


def test_a_session_of_a_result_holds_what_led_to_it(tmp_path: Path, pipe: Fake) -> None:
    first = [step.result for step in pipe.stream(SAMPLE, "make it red", seed=1)][-1]
    second = [step.result for step in pipe.stream(first, "make it blue", seed=2)][-1]
    with EditSession.create(tmp_path / "s", second) as session:
        assert [node.prompt for node in session.path()] == ["", "make it red", "make it blue"]
        assert session.node(0).name == "sample.png"


def test_a_bad_beginning_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        EditSession.create(tmp_path / "s", tmp_path / "none.png")
    assert not (tmp_path / "s").exists() and not is_session(tmp_path / "s")
    with pytest.raises(SessionError, match="holds no edit session"):
        EditSession.open(tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.txt").write_text("mine")
    with pytest.raises(SessionError, match=r"is not empty \('cat.txt'\); a session needs a folder of its own"):
        EditSession.create(tmp_path / "full", SAMPLE)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SessionError, match="cannot be made"):
        EditSession.create(tmp_path / "file", SAMPLE)
    EditSession.create(tmp_path / "a" / "b" / "s", SAMPLE).close()  # folders above are made
    with pytest.raises(SessionError, match="holds a session already"):
        EditSession.create(tmp_path / "a" / "b" / "s", SAMPLE)


def test_files_are_for_the_owner_only(session: EditSession) -> None:
    session.append(made(1))
    for path in (session.folder, *session.folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_equal_pictures_are_stored_once(session: EditSession) -> None:
    for _ in range(3):
        session.append(made(1), parent=0)
    assert len(list((session.folder / "objects").iterdir())) == 3  # source, picture, latents


def test_a_damaged_object_is_mended_by_the_same_result(session: EditSession) -> None:
    node = session.append(made(1))
    path = session.folder / "objects" / f"{node.image}.png"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SessionError, match=r"the picture of picture 1 cannot be used: its checksum .*sessions check"):
        session.picture()
    session.append(made(1), parent=0)
    assert session.picture(1).tobytes() == picture(1).tobytes() and session.check().sound


OPEN = """
import sys
from mlx_kontext import EditSession
session = EditSession.open(sys.argv[1])
print(session.lock.held, session.lock.reason, len(session.nodes), flush=True)
for line in sys.stdin:
    session.refresh()
    print(len(session.nodes), flush=True)
"""


def test_the_second_process_reads_along(session: EditSession) -> None:
    command = [sys.executable, "-c", OPEN, str(session.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == f"False process {os.getpid()} has it open 1\n"
        for count in (2, 3):
            session.append(made(count))
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == f"{count}\n"
        other.stdin.close()
    second = EditSession.open(session.folder)
    for write in (
        lambda: second.append(made(1)),
        second.undo,
        second.star,
        lambda: second.enqueue("make it snow"),
        lambda: second.edit(Fake(), "make it snow"),
        second.gc,
    ):
        with pytest.raises(SessionError, match=f"open for reading only: process {os.getpid()} has it open"):
            write()
    assert second.check().sound and len(second.nodes) == 3  # it may look, not touch
    session.close()
    with pytest.raises(SessionError, match="it was closed"):
        session.append(made(1))
    with EditSession.open(session.folder) as third:
        assert third.lock.held


def test_of_many_processes_one_writes(tmp_path: Path) -> None:
    EditSession.create(tmp_path / "s", SAMPLE).close()
    command = [sys.executable, "-c", OPEN, str(tmp_path / "s")]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(other.stdout.readline().split()[0] for other in others) == ["False"] * 3 + ["True"]
    for other in others:
        other.communicate("")


def test_threads_may_share_a_session(session: EditSession) -> None:
    def work(number: int) -> None:
        for i in range(5):
            session.append(made(10 * number + i), parent=0)
            session.star(0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(session.nodes) == 21 == len(again(session).nodes) and again(session).check().sound


def test_a_result_without_room_is_not_lost(session: EditSession, pipe: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_kontext.disk.Files.free", lambda *_: 10**6)
    with pytest.raises(ResourceError, match="1 MB are free on its disk, an edit needs 67 MB; make room first"):
        session.edit(pipe, "make it red")
    assert not pipe.asked  # told before the work
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_kontext.disk.Files.write", full)
    with pytest.raises(ResourceError, match="the disk is full; nothing was added"):
        session.edit(pipe, "make it red", seed=4)
    monkeypatch.undo()
    assert session.unsaved.seed == 4 and session.append(session.unsaved).id == 1


def test_a_thousand_pictures_open_at_once(tmp_path: Path) -> None:
    """A chain of a thousand, and its memory: no picture is read."""
    with EditSession.create(tmp_path / "s", SAMPLE) as session:
        session.append(made(1))
        template = json.loads((session.folder / "turns" / "000002.json").read_bytes())["body"]
    for i in range(2, 1001):
        body = template | {"turn": i + 1, "node": i, "parent": i - 1}
        (tmp_path / "s" / "turns" / f"{i + 1:06}.json").write_bytes(turns.encode(body))
    code = (
        "import sys, time, tracemalloc, resource; from mlx_kontext import EditSession; tracemalloc.start()\n"
        "session = EditSession.open(sys.argv[1]); memory = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()\n"
        "session.close(); started = time.perf_counter(); session = EditSession.open(sys.argv[1])\n"
        "print(len(session.nodes), len(session.path()), time.perf_counter() - started, memory)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, check=True)
    nodes, depth, seconds, memory = done.stdout.split()
    assert (int(nodes), int(depth)) == (1001, 1001)
    assert float(seconds) <= 1 and int(memory) <= 20e6, done.stdout
    print(done.stdout)


def test_thumbnails_are_rebuilt(session: EditSession) -> None:
    wide = dataclasses.replace(made(1), image=Image.new("RGB", (600, 300), "red"))
    session.append(wide)
    assert session.thumbnail().size == (256, 128)
    (path,) = (session.folder / "thumbs").iterdir()
    path.write_bytes(b"nonsense")
    assert session.thumbnail().size == (256, 128) and session.check().sound
    assert again(session).thumbnail(0).size == (96, 96)
    assert len(list((session.folder / "thumbs").iterdir())) == 1  # a reader writes nothing
    shutil.rmtree(session.folder / "thumbs")
    assert session.thumbnail().size == (256, 128)


def test_export(session: EditSession, pipe: Fake, tmp_path: Path) -> None:
    session.edit(pipe, "../../make it/red\x1b[31m!", seed=7)
    path = session.export(None, tmp_path / "{name}-{node}-{seed}-{prompt}.png")
    assert path == tmp_path / "sample-1-7-make-it-red-31m.png"
    with Image.open(path) as image:
        assert image.convert("RGB").tobytes() == session.picture().tobytes()
    record = read_record(path)
    assert record["request"]["prompt"] == "../../make it/red\x1b[31m!"
    assert record["request"]["image_sha256"] == session.node(0).pixels and record["model"] == {"name": "none"}
    with pytest.raises(RequestError, match="exists; choose another name"):
        session.export(1, path)
    session.export(1, path, overwrite=True)
    with pytest.raises(RequestError, match=r"\{colour\} is no field of a name; known are \{name\}, \{node\}"):
        session.export(1, tmp_path / "{colour}.png")
    with pytest.raises(RequestError, match="picture 0 is the one the session began with"):
        session.export(0, tmp_path / "x.png")
    with pytest.raises(RequestError, match=r"ends in none of \.png"):
        session.export(1, tmp_path / "x.txt")


def test_gc_removes_what_no_turn_names(session: EditSession) -> None:
    session.append(made(1))
    session.thumbnail()
    orphan = session.folder / "objects" / ("0" * 64 + ".png")
    for path in (orphan, session.folder / "objects" / ".x.tmp", session.folder / "thumbs" / ("0" * 64 + ".png")):
        path.write_bytes(b"12345")
    before = sorted(session.folder.rglob("*"))
    room = session.gc(dry_run=True)
    assert (room.files, room.bytes) == (3, 15) and sorted(session.folder.rglob("*")) == before
    assert session.gc() == room and session.gc().files == 0
    assert session.picture().size == (16, 16) and session.check().sound


def test_where_sessions_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / name))
    assert sessions_folder() == tmp_path / "mlx-kontext" / "sessions"
    folder = new_folder("/home/ann/My Cat.JPG")
    assert folder.parent == sessions_folder() and folder.name.endswith("-My-Cat")
    folder.mkdir(parents=True)
    assert new_folder("My Cat.jpg") != folder

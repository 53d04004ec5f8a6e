"""Damaged and hostile files in a session: told, set aside, never lost, and the rest still works."""

import hashlib
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from power import made, picture

from mlx_kontext import EditSession, turns
from mlx_kontext.errors import SessionError

HASH = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Source 0, edits 1 and 2 in a row, 3 beside 2, a star: turns 1 to 5."""
    with EditSession.create(tmp_path / "s", picture(0)) as session:
        for number, parent in ((1, 0), (2, 1), (3, 1)):
            session.append(made(number), parent=parent)
        session.star(1)
    return tmp_path / "s"


def turn(folder: Path, number: int) -> Path:
    return folder / "turns" / f"{number:06}.json"


def body(folder: Path, number: int) -> dict:
    return json.loads(turn(folder, number).read_bytes())["body"]


def rewrite(folder: Path, number: int, **changes: object) -> None:
    """A turn that a stranger made: sound by its checksum."""
    turn(folder, number).write_bytes(turns.encode(body(folder, number) | changes))


def objects(folder: Path, number: int, suffix: str) -> Path:
    values = body(folder, number)
    return folder / "objects" / f"{values['image' if suffix == 'png' else 'latents']}.{suffix}"


def everything(folder: Path) -> list[bytes]:
    """Contents of all ordinary files but the lock, wherever they lie."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.name != "lock"]
    return sorted(path.read_bytes() for path in files)


def flip(path: Path, where: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1
    path.write_bytes(data)


TURNS: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit": flip,
    "another's number": lambda path: shutil.copy(path.with_name("000002.json"), path),
    "no JSON": lambda path: path.write_bytes(signed(b"{")),
    "deep JSON": lambda path: path.write_bytes(signed(b"[" * 100_000 + b"]" * 100_000)),
    "NaN": lambda path: path.write_bytes(signed(b'{"schema": NaN}')),
    "a list": lambda path: path.write_bytes(signed(b"[1]")),
    "huge number": lambda path: path.write_bytes(signed(b'{"schema": ' + b"9" * 10_000 + b"}")),
    "huge file": lambda path: path.write_bytes(b" " * (2**20 + 1)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link": lambda path: (path.rename(path.parent.parent / "x"), path.symlink_to(path.parent.parent / "x")),
    "an old schema": lambda path: rewrite(path.parent.parent, 3, schema=0),
    "another kind": lambda path: rewrite(path.parent.parent, 3, kind="delete"),
    "path for a hash": lambda path: rewrite(path.parent.parent, 3, image="../../../../etc/passwd"),
    "long hash": lambda path: rewrite(path.parent.parent, 3, image="0" * 65),
    "hash with a newline": lambda path: rewrite(path.parent.parent, 3, latents="0" * 64 + "\n"),
    "capital hash": lambda path: rewrite(path.parent.parent, 3, latents="A" * 64),
    "its own parent": lambda path: rewrite(path.parent.parent, 3, parent=2),
    "a later parent": lambda path: rewrite(path.parent.parent, 3, parent=3),
    "a picture's number again": lambda path: rewrite(path.parent.parent, 3, node=1, parent=0),
    "no prompt": lambda path: rewrite(path.parent.parent, 3, request={}),
    "a number for text": lambda path: rewrite(path.parent.parent, 3, name=5),
    "a huge size": lambda path: rewrite(path.parent.parent, 3, width=2**40),
    "yes for 1": lambda path: rewrite(path.parent.parent, 3, turn=True),
}


def signed(text: bytes) -> bytes:
    return b'{"body": ' + text + b',\n"sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


@pytest.mark.parametrize("name", TURNS)
def test_a_damaged_turn_is_set_aside(folder: Path, name: str) -> None:
    """Turn 3, picture 2."""
    TURNS[name](turn(folder, 3))
    before = everything(folder)
    with EditSession.open(folder) as session:
        assert [finding.name for finding in session.damage] == ["turns/000003.json"]
        assert list(session.nodes) == [0, 1, 3] and session.node(1).starred and session.current.id == 3
        report = session.check()
        assert not report.sound and report.turns == 4
        (finding,) = [f for f in report.findings if f.kind == "damaged"]
        assert finding.name == "turns/000003.json" and finding.aside == "damaged/000003.json" and finding.trouble
        assert everything(folder) == before  # moved, not lost
        assert not session.damage and list(session.nodes) == [0, 1, 3]
        with pytest.raises(SessionError, match="so nothing was removed"):
            session.gc()  # what it named is not known
        # Neither the turn's number nor the picture's is given away.
        node = session.append(made(4))
        assert (node.turn, node.id) == (6, 4)
        assert session.append(made(5)).id == 5
        assert [f for f in session.check().findings if f.kind != "foreign"] == []
        room = session.gc(damaged=True) if name not in ("a folder",) else None
        assert room is None or room.files >= 1


def test_a_damaged_last_turn_gives_no_number_away(folder: Path) -> None:
    turn(folder, 5).unlink()
    flip(turn(folder, 4))  # picture 3, the newest
    with EditSession.open(folder) as session:
        node = session.append(made(9))
        assert (node.turn, node.id) == (5, 4)
        session.check()
        assert session.append(made(8)).id == 5


def test_a_child_of_a_lost_picture_stands_on_its_own(folder: Path) -> None:
    flip(turn(folder, 2))
    with EditSession.open(folder) as session:
        assert [(node.id, node.parent) for node in session.nodes.values()] == [(0, None), (2, None), (3, None)]
        assert session.children(None) == (0, 2, 3)
        for report in (session.check(), session.check()):
            lost = [f for f in report.findings if f.kind == "missing"]
            assert [f.trouble for f in lost] == ["the picture 1 that it was made from is lost"] * 2
            assert not report.sound
        assert session.result(2).latents.size and session.export(2, folder.parent / "x.png")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", colour: int = 2, more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list[int], size: int, name: str = "latents") -> dict:
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def as_jpeg() -> bytes:
    out = BytesIO()
    picture(1).save(out, "JPEG")
    return out.getvalue()


def greyscale() -> bytes:
    out = BytesIO()
    picture(1).convert("L").save(out, "PNG")
    return out.getvalue()


HOSTILE = {
    "png": {
        "nothing": b"",
        "a bomb": png(30_000, 30_000),
        "no pixels": png(16, 16),
        "a text bomb": png(16, 16, bytes(49 * 16), more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "no size": png(0, 0),
        "grey": greyscale(),
        "JPEG": as_jpeg(),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
        "JSON": b"{}",
    },
    "safetensors": {
        "nothing": b"",
        "a pickle": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x05posix\x94.",
        "a long header": struct.pack("<Q", 2**62) + b"{}",
        "no header": struct.pack("<Q", 2) + b"[]",
        "sizes that wrap": safetensors(tensor("F32", [1048576, 304384145, 14449], 4194304), bytes(4194304)),
        "cut short": safetensors(tensor("F32", [1, 1, 64], 256), bytes(100)),
        "bf16": safetensors(tensor("BF16", [1, 1, 64], 128), bytes(128)),
        "integers": safetensors(tensor("I32", [1, 1, 64], 256), bytes(256)),
        "another name": safetensors(tensor("F32", [1, 1, 64], 256, "weights"), bytes(256)),
        "another shape": safetensors(tensor("F32", [64], 256), bytes(256)),
        "empty": safetensors(tensor("F32", [1, 0, 64], 0)),
        "NaN": safetensors(tensor("F32", [1, 1, 64], 256), np.full(64, np.nan, np.float32).tobytes()),
        "deep": safetensors(b"[" * 100_000),
    },
}


@pytest.mark.parametrize(("suffix", "name"), [(suffix, name) for suffix, files in HOSTILE.items() for name in files])
def test_a_hostile_object_is_set_aside(folder: Path, suffix: str, name: str) -> None:
    """Of picture 2, with turn and file name that a stranger made to fit."""
    data = HOSTILE[suffix][name]
    sha = hashlib.sha256(data).hexdigest()
    rewrite(folder, 3, **{"image" if suffix == "png" else "latents": sha})
    (folder / "objects" / f"{sha}.{suffix}").write_bytes(data)
    with EditSession.open(folder) as session:
        assert not session.damage and len(session.nodes) == 4  # pictures are read when they are asked for
        with pytest.raises(SessionError, match=r"of picture 2 cannot be used: .*sessions check"):
            session.result(2)
        report = session.check()
        kinds = {(f.kind, f.name, f.aside) for f in report.findings}
        assert ("damaged", f"objects/{sha}.{suffix}", f"damaged/{sha}.{suffix}") in kinds
        assert ("missing", f"objects/{sha}.{suffix}", "") in kinds and not report.sound
        assert session.result(3).latents.size and session.append(made(4)).id == 4


OBJECTS: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing": lambda path: path.unlink(),
    "a link": lambda path: (path.rename(path.parent.parent / "x"), path.symlink_to(path.parent.parent / "x")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another's": lambda path: shutil.copy(objects(path.parent.parent, 2, path.suffix[1:]), path),
}


@pytest.mark.parametrize("suffix", ["png", "safetensors"])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_damaged_object_is_set_aside(folder: Path, name: str, suffix: str) -> None:
    OBJECTS[name](objects(folder, 3, suffix))
    before = everything(folder)
    with EditSession.open(folder) as session:
        what = "picture" if suffix == "png" else "latents"
        with pytest.raises(SessionError, match=f"the {what} of picture 2 cannot be used"):
            session.result(2)
        if suffix == "safetensors":
            assert session.start(2)[0].size == (16, 16)  # from the pixels, then
        report = session.check()
        kinds = sorted(f.kind for f in report.findings if f.kind != "foreign")
        assert kinds == (["missing"] if name == "missing" else ["damaged", "missing"]) and not report.sound
        assert everything(folder) == before and list(session.nodes) == [0, 1, 2, 3]  # its prompt and children stay
        assert [f.kind for f in session.check().findings if f.kind != "foreign"] == ["missing"]
        assert session.node(2).prompt == "make it snow" and session.picture(3).size == (16, 16)
        session.append(made(2), parent=1)  # the same edit again brings it back
        assert session.check().sound and session.result(2).latents.size


def test_strange_files_are_set_aside_and_told(folder: Path) -> None:
    names = {
        "turns/.000009.json-12ab.tmp": "leftover",
        "objects/.x.png-12ab.tmp": "leftover",
        "turns/notes.txt": "foreign",
        "turns/7.json": "foreign",
        "turns/0000007.json": "foreign",  # another way to write 7
        "objects/cat.png": "foreign",
        f"objects/{HASH}.exe": "foreign",
        f"objects/{HASH}.png\n": "foreign",
        "objects/\x1b]52;c;aGk=\x07": "foreign",
        "cat.jpg": "foreign",
    }
    for name in names:
        (folder / name).write_bytes(name.encode())
    (folder / "objects" / "folder").mkdir()
    (folder / "objects" / "link").symlink_to("/etc/passwd")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "objects" / ".DS_Store").write_bytes(b"x")
    before = everything(folder)
    with EditSession.open(folder) as session:
        assert not session.damage
        report = session.check()
        assert {f.name: f.kind for f in report.findings} == names | {
            "objects/folder": "foreign",
            "objects/link": "foreign",
        }
        assert report.sound and everything(folder) == before
        for finding in report.findings:
            assert bool(finding.aside) == (finding.name != "cat.jpg")
            assert finding.aside.isprintable() and "/" not in finding.aside.removeprefix("damaged/")
        assert (folder / "cat.jpg").exists() and os.readlink(folder / "damaged" / "link") == "/etc/passwd"
        assert [f.name for f in session.check().findings] == ["cat.jpg"]


@pytest.mark.parametrize("name", ["turns", "objects", "thumbs", "damaged"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_that_is_none(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link could lead a writer out of the session; nothing is read or written through it."""
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.mkdir()
        (outside / "keep.txt").write_text("mine")
    if kind == "link":
        (folder / name).symlink_to(outside)
    else:
        (folder / name).write_text("a file")
    before = everything(outside)
    with EditSession.open(folder) as session:
        if name == "turns":
            assert session.nodes == {}
            with pytest.raises(SessionError, match=r"no picture can be read; .*sessions check"):
                _ = session.current
        elif name == "objects":
            with pytest.raises(SessionError, match="the picture of picture 3 cannot be used"):
                session.picture()
            with pytest.raises(SessionError):
                session.append(made(9))
        else:
            session.thumbnail()
        report = session.check()
        assert any(f.name == name and f.trouble == "it is no folder" for f in report.findings)
        assert (folder / "damaged" / name).is_symlink() == (kind == "link")
        if name == "objects":
            session.append(made(9))
        assert everything(outside) == before


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_none(folder: Path, kind: str) -> None:
    lock = folder / "lock"
    lock.unlink()
    {"link": lambda: lock.symlink_to("/etc/passwd"), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[kind]()
    with EditSession.open(folder) as session:
        assert not session.lock.held and session.lock.reason.startswith("its lock cannot be taken")
        assert len(session.nodes) == 4 and session.check().turns == 5


def test_a_request_of_a_stranger_is_checked_when_it_is_used(folder: Path) -> None:
    rewrite(folder, 3, request={"prompt": "x", "zebra": [1], "num_inference_steps": -1})
    with EditSession.open(folder) as session:
        assert session.node(2).prompt == "x"
        with pytest.raises(SessionError, match=r"the request of picture 2 is none .unknown keys"):
            session.result(2)
        assert session.start(2)[0].size == (16, 16)
        with pytest.raises(SessionError, match="the request of picture 2 is none"):
            session.export(2, folder.parent / "x.png")


def test_a_session_that_may_not_be_written_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the refusal is played."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mlx_kontext.disk.Files.lock", refuse)
    with EditSession.open(folder) as session:
        assert session.lock.reason == "its lock cannot be taken (Permission denied)" and len(session.nodes) == 4


def mutants(data: bytes, draw: random.Random) -> Iterator[bytes]:
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(changed))
            match draw.randrange(4):
                case 0:
                    changed[at] = draw.randrange(256)
                case 1:
                    del changed[at : at + draw.randint(1, 40)]
                case 2:
                    changed[at:at] = changed[: draw.randint(1, 60)]
                case 3:
                    changed[at : at + 1] = draw.choice([b"null", b"-1", b"1e999", b"[]", b'"', b"{}", b"\xff"])
        yield bytes(changed)


def test_mutants_of_turns_never_raise(folder: Path) -> None:
    """Their checksums are mended most of the time, so that what is behind them is reached."""
    draw = random.Random(1)
    for number in (1, 2, 3, 5):
        path = turn(folder, number)
        data = path.read_bytes()
        for mutant in mutants(data, draw):
            text = mutant[len(b'{"body": ') : -len(b',\n"sha256": ""}\n') - 64]
            path.write_bytes(signed(text) if draw.random() < 0.8 else mutant)
            with EditSession.open(folder, readonly=True) as session:
                session.check()
                for node in session.nodes.values():
                    assert isinstance(node.prompt, str) and session.path(node.id)
                    with suppress(SessionError):
                        session.start(node.id)
        path.write_bytes(data)


def test_check_while_another_process_writes_only_tells(folder: Path) -> None:
    with EditSession.open(folder):
        reader = EditSession.open(folder)
        flip(turn(folder, 3))
        report = reader.check()
        assert [(f.kind, f.aside) for f in report.findings] == [("damaged", "")] and turn(folder, 3).exists()
        assert not (folder / "damaged").exists()


def test_what_cannot_be_moved_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(turn(folder, 3))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with EditSession.open(folder) as session:
        monkeypatch.setattr("mlx_kontext.disk.Files.rename", refuse)
        (finding,) = session.check().findings
        assert finding.trouble == "its checksum does not fit; it cannot be moved (Permission denied)"


def test_pictures_are_compared_byte_for_byte(folder: Path) -> None:
    """The damage of one bit anywhere in a picture's file is seen."""
    path = objects(folder, 2, "png")
    data = path.read_bytes()
    with EditSession.open(folder, readonly=True) as session:
        for where in range(0, len(data), 7):
            flip(path, where)
            with pytest.raises(SessionError):
                session.picture(1)
            path.write_bytes(data)
        assert isinstance(session.picture(1), Image.Image)

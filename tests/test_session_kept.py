"""What was kept gives the same results again: in memory and from the disk, this schema and others, on other photos."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from power import made, picture

from mlx_kontext import EditRequest, EditResult, EditSession, KontextPipeline, turns
from mlx_kontext.edit import pixels_sha256
from mlx_kontext.errors import SessionError

SAMPLE = Path(__file__).parent.parent / "assets" / "sample.png"
GOLDEN = Path(__file__).parent / "data" / "session-1"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[EditSession]:
    with EditSession.create(tmp_path / "s", SAMPLE) as session:
        yield session


def test_a_result_is_the_same_again(session: EditSession) -> None:
    noise = np.arange(64, dtype=np.float32).reshape(1, 1, 64)
    request = EditRequest(
        'say "hi"\n🙂', image=picture(0), seed=5, guidance_scale=0.1, auto_resize=False, latents=noise, draft=True
    )
    model = {"name": "a", "dtype": "b", "transformer": "c"}
    result = EditResult(
        picture(4), request, 5, 1.25, model, noise + 0.1, ("as told",), "vae", pixels_sha256(picture(4))
    )
    session.append(result)
    back = EditSession.open(session.folder, readonly=True).result()
    assert back.image.tobytes() == result.image.tobytes() and np.array_equal(back.latents, result.latents)
    assert np.array_equal(back.request.latents, noise)
    assert dataclasses.replace(back.request, image=None, auto_resize=True) == dataclasses.replace(
        request, image=None, auto_resize=True
    )
    assert Path(back.request.image).is_file()
    for name in ("seed", "seconds", "model", "notices", "vae", "pixels"):
        assert getattr(back, name) == getattr(result, name)
    with pytest.raises(SessionError, match="picture 0 is the one the session began with"):
        session.result(0)


# --- schema ---


def test_the_golden_session_of_schema_1_opens(tmp_path: Path) -> None:
    """Written once, kept for ever: what people have on their disks."""
    shutil.copytree(GOLDEN, tmp_path / "s")
    with EditSession.open(tmp_path / "s") as session:
        assert session.lock.held and not session.damage
        assert [(node.id, node.parent, node.prompt, node.starred, node.note) for node in session.nodes.values()] == [
            (0, None, "", False, ""),
            (1, 0, "make the circle green", True, ""),
            (2, 1, "make the background black", False, "too dark"),
            (3, 1, "remove the square", False, ""),
        ]
        assert session.current.id == 2 and [item.request["prompt"] for item in session.queue] == ["make it snow"]
        assert session.result(3).latents.shape == (1, 36, 64) and session.check().sound
        session.append(made(1))


def test_a_newer_session_is_read_only(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.append(made(1))
    monkeypatch.setattr("mlx_kontext.log.SCHEMA", 2)
    session._log.store.append(3, {"schema": 2, "turn": 3, "kind": "unheard of"}, {})
    session.close()
    (session.folder / "objects" / "unheard.of").write_bytes(b"x")
    newer = EditSession.open(session.folder)
    assert not newer.lock.held and "written by a newer version" in newer.lock.reason
    assert [finding.kind for finding in newer.damage] == ["newer"] and len(newer.nodes) == 2
    with pytest.raises(SessionError, match=r"open for reading only: turn 3: .* update mlx_kontext"):
        newer.append(made(2))
    with pytest.raises(SessionError, match="so nothing was removed"):
        newer.gc(dry_run=True)
    report = newer.check()
    assert not report.sound and (session.folder / "objects" / "unheard.of").exists()  # perhaps the newer version's own
    assert (session.folder / "turns" / "000003.json").exists()


def test_the_schema_before_is_read_and_left_as_it_is(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal: a schema 2 that calls the parent `from`."""
    node = session.append(made(1))
    before = (session.folder / "turns" / "000002.json").read_bytes()
    session.close()
    monkeypatch.setattr("mlx_kontext.turns.SCHEMA", 2)
    with EditSession.open(session.folder, readonly=True) as stranded:
        assert "its schema 1 is too old" in stranded.damage[0].trouble
    monkeypatch.setitem(turns.UPGRADES, 1, lambda body: body | {"notices": ["upgraded"]})
    monkeypatch.setattr("mlx_kontext.log.SCHEMA", 2)
    with EditSession.open(session.folder) as upgraded:
        assert upgraded.node(node.id).notices == ("upgraded",)
        upgraded.append(made(2))
        assert json.loads((session.folder / "turns" / "000003.json").read_bytes())["body"]["schema"] == 2
    assert (session.folder / "turns" / "000002.json").read_bytes() == before
    with EditSession.open(session.folder) as again:
        assert len(again.nodes) == 3 and again.check().sound


# --- with the demo model ---

STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def demo() -> KontextPipeline:
    return KontextPipeline.from_pretrained("demo")


def test_a_session_continues_bit_for_bit(tmp_path: Path, demo: KontextPipeline) -> None:
    """Three edits in memory, and in a session that is closed and opened between them."""
    prompts = ["make the circle green", "make the background black", "remove the circle"]
    result: Any = SAMPLE
    EditSession.create(tmp_path / "s", SAMPLE).close()
    for seed, prompt in enumerate(prompts):
        result = demo(image=result, prompt=prompt, seed=seed, **STEPS)
        with EditSession.open(tmp_path / "s") as session:
            session.edit(demo, prompt, seed=seed, **STEPS)
            kept = session.result()
        assert np.array_equal(kept.latents, result.latents) and kept.pixels == result.pixels
        assert kept.image.tobytes() == result.image.tobytes() and kept.model == result.model
    through_png = demo(image=kept.image, prompt=prompts[0], seed=9, **STEPS)
    from_latents = demo(image=kept, prompt=prompts[0], seed=9, **STEPS)
    assert not np.array_equal(through_png.latents, from_latents.latents)  # else the test would prove nothing


def test_replay(tmp_path: Path, demo: KontextPipeline) -> None:
    other = Image.open(SAMPLE).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with EditSession.create(tmp_path / "s", SAMPLE) as session:
        session.edit(demo, "make the circle green", seed=1, **STEPS)
        session.edit(demo, "make the background black", seed=2, **STEPS)
        same, mirrored = session.replay(demo, SAMPLE), session.replay(demo, other)
        assert same.pixels == session.current.pixels  # the same photo, the same picture
        assert mirrored.pixels != same.pixels and len(session.nodes) == 3
        first = demo(image=other, prompt="make the circle green", seed=1, **STEPS)
        second = demo(image=first, prompt="make the background black", seed=2, **STEPS)
        assert mirrored.pixels == second.pixels
    with EditSession.create(tmp_path / "t", mirrored) as replayed:
        assert [node.prompt for node in replayed.path()] == ["", "make the circle green", "make the background black"]
        assert replayed.node(0).pixels == pixels_sha256(other)


def test_lost_latents_are_told(tmp_path: Path, demo: KontextPipeline) -> None:
    with EditSession.create(tmp_path / "s", SAMPLE) as session:
        session.edit(demo, "make the circle green", seed=1, **STEPS)
        (session.folder / "objects" / f"{session.current.latents}.safetensors").unlink()
        with pytest.raises(SessionError, match="the latents of picture 1 cannot be used: it is missing"):
            session.result()
        result = session.edit(demo, "make the background black", seed=2, **STEPS)
        assert any("started from pixels instead of latents" in notice for notice in result.notices)
        assert session.current.notices == result.notices
        expected = demo(image=session.picture(1), prompt="make the background black", seed=2, **STEPS)
        assert expected.pixels == result.pixels

"""Files are written whole or not at all, and failures are one line."""

import errno
import os
import threading
from pathlib import Path

import pytest

from mlx_kontext import disk
from mlx_kontext.errors import RequestError, ResourceError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_the_bytes_and_leaves_nothing_else(tmp_path):
    disk.write_atomic(tmp_path / "a.png", b"one", overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == b"one"
    disk.write_atomic(tmp_path / "a.png", b"two", overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == b"two"
    assert names(tmp_path) == ["a.png"]


def test_a_relative_name_lands_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disk.write_atomic(Path("a.png"), b"one", overwrite=False)
    assert names(tmp_path) == ["a.png"]


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(RequestError, match=r"a\.png exists; choose another name or pass --overwrite"):
        disk.write_atomic(tmp_path / "a.png", b"yours", overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["a.png"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"yours")
        (tmp_path / "a.png").write_bytes(b"mine")

    with pytest.raises(RequestError, match="appeared while we worked"):
        disk.replace_atomic(tmp_path / "a.png", write, overwrite=False)
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["a.png"]


def test_the_temporary_file_has_the_suffix_and_goes_when_the_writer_fails(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"old")
    seen = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk.replace_atomic(tmp_path / "a.safetensors", write, overwrite=True)
    assert seen[0].suffix == ".safetensors" and seen[0].parent == tmp_path
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, ResourceError, "the disk is full; nothing was written"),
        (errno.EDQUOT, ResourceError, "the disk is full; nothing was written"),
        (errno.EACCES, RequestError, "cannot be written .* choose another place"),
        (errno.EIO, RequestError, "cannot be written"),
    ],
)
@pytest.mark.parametrize(("module", "call"), [(os, "open"), (disk, "sync"), (os, "replace")])
def test_each_failing_call_is_one_line_and_leaves_the_old_file(
    tmp_path, monkeypatch, number, kind, words, module, call
):
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module, call, fail)
        with pytest.raises(kind, match=words) as caught:
            disk.write_atomic(tmp_path / "a.png", b"new", overwrite=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize(("number", "works"), [(errno.EPERM, True), (errno.ENOTSUP, True), (errno.ENOSPC, False)])
def test_without_hard_links_the_file_is_renamed(tmp_path, monkeypatch, number, works):
    def no_links(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    if works:
        disk.write_atomic(tmp_path / "a.png", b"one", overwrite=False)
        assert (tmp_path / "a.png").read_bytes() == b"one"
    else:
        with pytest.raises(ResourceError):
            disk.write_atomic(tmp_path / "a.png", b"one", overwrite=False)
    assert names(tmp_path) == (["a.png"] if works else [])


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    """The file has its name by then; to report a failure would be wrong."""
    real_open = os.open

    def no_folders(path, flags, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", no_folders)
    disk.write_atomic(tmp_path / "a.png", b"one", overwrite=True)
    assert (tmp_path / "a.png").read_bytes() == b"one"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/a.png", "missing is not a folder; create it first"),
        ("file/a.png", "file is not a folder; create it first"),
        ("folder", "is a folder; name a file"),
        ("n" * 300 + ".png", "cannot be written"),
        ("n" * 300 + "/a.png", "is not a folder"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_impossible_places(tmp_path, name, words, overwrite):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestError, match=words):
        disk.write_atomic(tmp_path / name, b"one", overwrite=overwrite)
    assert names(tmp_path) == ["file", "folder"]


def test_rights_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        disk.write_atomic(tmp_path / "a.png", b"one", overwrite=False)
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


def test_of_many_writers_one_wins_whole(tmp_path):
    path = tmp_path / "a.png"
    outcomes = []

    def race(i: int) -> None:
        try:
            disk.write_atomic(path, bytes([i]) * 100_000, overwrite=False)
            outcomes.append(i)
        except RequestError:
            pass

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert path.read_bytes() == bytes(outcomes) * 100_000
    assert names(tmp_path) == ["a.png"]

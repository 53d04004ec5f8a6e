"""A disk in memory that loses power: every state it may be in afterwards, and a judge of what a session makes of it.

Until a file is synced its bytes may be lost, cut short or zeros; until a folder is synced each of its new names, renames and
removals may or may not have happened, whatever came before or after. Harsher than any file system we know of.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from mlx_kontext.disk import Files
from mlx_kontext.edit import EditRequest, EditResult, pixels_sha256
from mlx_kontext.sessions import EditSession
from mlx_kontext.store import Store

FOLDER = Path("/disk/session")
_MANY = 5  # unsynced names up to which every subset is tried


class Killed(BaseException):
    """kill -9: nothing runs any more, but what was written stays in the machine's memory."""


@dataclass(eq=False)
class Content:
    """A file's bytes now, and after the last sync."""

    data: bytes
    synced: bytes | None = None


@dataclass
class Memory(Files):
    """Names and contents as programs see them, as the disk has them, and the changes of names in between."""

    seen: dict[Path, Content] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=lambda: {Path("/"), Path("/disk")})
    kept: dict[Path, Content] = field(default_factory=dict)
    kept_folders: set[Path] = field(default_factory=lambda: {Path("/"), Path("/disk")})
    pending: list[tuple[str, Path, Path, Content | None]] = field(default_factory=list)
    """(what, folder, path, content): "folder", "name" or "gone"."""
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    """Called around every change; what they raise is what the change raises."""

    def names(self, folder: Path) -> list[str]:
        if folder not in self.folders:
            raise FileNotFoundError(2, "No such file or directory")
        return sorted({path.name for path in (*self.seen, *self.folders) if path.parent == folder and path != folder})

    def kind(self, path: Path) -> str:
        return "folder" if path in self.folders else "file" if path in self.seen else ""

    def size(self, path: Path) -> int:
        return len(self.seen[path].data)

    def read(self, path: Path, limit: int) -> bytes:
        if path not in self.seen:
            raise FileNotFoundError(2, "No such file or directory")
        if len(self.seen[path].data) > limit:
            raise OSError(27, "it is too large")
        return self.seen[path].data

    def make_folder(self, path: Path) -> None:
        self.before()
        assert path.parent in self.folders and self.kind(path) == ""
        self.folders.add(path)
        self.pending.append(("folder", path.parent, path, None))
        self.after()

    def write(self, path: Path, data: bytes) -> None:
        self.before()
        assert path.parent in self.folders and self.kind(path) == ""
        self.seen[path] = Content(data)
        self.pending.append(("name", path.parent, path, self.seen[path]))
        self.after()

    def sync(self, path: Path) -> None:
        self.before()
        self.seen[path].synced = self.seen[path].data
        self.after()

    def sync_folder(self, folder: Path) -> None:
        self.before()
        for change in [change for change in self.pending if change[1] == folder]:
            self.pending.remove(change)
            _apply(change, self.kept, self.kept_folders)
        self.after()

    def rename(self, source: Path, target: Path) -> None:
        self.before()
        content = self.seen.pop(source)
        self.seen[target] = content
        # One change, not two: a rename is never half done.
        self.pending.append((f"rename {source}", target.parent, target, content))
        self.after()

    def remove(self, path: Path) -> None:
        self.before()
        if path not in self.seen:
            raise FileNotFoundError(2, "No such file or directory")
        content = self.seen.pop(path)
        self.pending.append(("gone", path.parent, path, content))
        self.after()

    def lock(self, path: Path) -> IO[bytes]:
        return BytesIO()

    def free(self, folder: Path) -> int:
        return 2**40

    def states(self) -> Iterator["Memory"]:
        """The disk after a loss of power now: which changes of names were done x what became of unsynced bytes."""
        for done in _subsets(self.pending):
            names, folders = dict(self.kept), set(self.kept_folders)
            for change in done:
                _apply(change, names, folders)
            names = {path: content for path, content in names.items() if _reachable(path, folders)}
            for fate in (_lost, _short, _zeroed, _whole):
                files = {path: Content(data := fate(content), data) for path, content in names.items()}
                reachable = {folder for folder in folders if _reachable(folder, folders)}
                yield Memory(dict(files), set(reachable), dict(files), set(reachable))

    def fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for path, content in sorted(self.seen.items()):
            name = "temporary" if path.suffix == ".tmp" else str(path)  # their names are drawn
            digest.update(f"{name} {len(content.data)} ".encode() + content.data)
        for folder in sorted(self.folders):
            digest.update(f"{folder}/".encode())
        return digest.digest()


def _apply(change: tuple[str, Path, Path, Content | None], names: dict[Path, Content], folders: set[Path]) -> None:
    what, _, path, content = change
    if what == "folder":
        folders.add(path)
    elif what == "gone":
        names.pop(path, None)
    else:
        names[path] = content
        if what.startswith("rename "):
            names.pop(Path(what.removeprefix("rename ")), None)


def _subsets(changes: list[Any]) -> Iterator[tuple[Any, ...]]:
    if len(changes) <= _MANY:
        for count in range(len(changes) + 1):
            yield from itertools.combinations(changes, count)
        return
    yield from (tuple(changes[:end]) for end in range(len(changes) + 1))
    yield from (tuple(changes[:i] + changes[i + 1 :]) for i in range(len(changes)))


def _reachable(path: Path, folders: set[Path]) -> bool:
    return all(parent in folders for parent in path.parents)


def _lost(content: Content) -> bytes:
    return content.synced if content.synced is not None else b""


def _short(content: Content) -> bytes:
    return content.synced if content.synced is not None else content.data[: len(content.data) // 2]


def _zeroed(content: Content) -> bytes:
    return content.synced if content.synced is not None else bytes(len(content.data))


def _whole(content: Content) -> bytes:
    return content.data


@dataclass
class Trial:
    """Histories on a disk that may lose power at any moment: states seen, and what was wrong in them."""

    disk: type[Memory] = Memory
    states: set[bytes] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def history(self, seed: int, actions: int = 12) -> None:
        """A session of random actions, with a kill -9 now and then; after each change of the disk every state is judged."""
        draw = random.Random(seed)
        disk = self.disk()
        told: dict[int, bytes] = {}  # acknowledged turns: what their files hold
        left: float = 0  # changes until the process is killed

        def before() -> None:
            if left <= 0:
                raise Killed  # not even tidying up

        def after() -> None:
            nonlocal left
            if not self.wrong:  # one is enough
                for state in disk.states():
                    self.judge(state, told)
            left -= 1
            before()

        disk.before, disk.after = before, after
        session = None
        for _ in range(actions):
            left = draw.randint(1, 30) if draw.random() < 0.4 else math.inf
            try:
                if session is None:
                    begun = Store(FOLDER, disk).numbers()
                    session = EditSession.open(FOLDER, files=disk) if begun else begin(disk)
                else:
                    act(session, draw)
            except Killed:
                session = None
            else:
                for number in Store(
                    FOLDER, disk
                ).numbers():  # also one that was cut short, now that somebody has seen it
                    told[number] = disk.read(Store(FOLDER, disk).turn_path(number), 2**20)

    def judge(self, state: Memory, told: dict[int, bytes]) -> None:
        key = state.fingerprint() + len(told).to_bytes(4, "little")
        if key in self.states:
            return
        self.states.add(key)
        try:
            self._judge(state, told)
        except Exception as error:  # what a session must never do on a damaged disk
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _judge(self, state: Memory, told: dict[int, bytes]) -> None:
        store = Store(FOLDER, state)
        numbers = store.numbers()
        for number, data in told.items():
            if number not in numbers or state.read(store.turn_path(number), 2**20) != data:
                self.wrong.append(f"acknowledged turn {number} is lost")
                return
        if len(numbers) > len(told) + 1:
            self.wrong.append(f"{len(numbers)} turns, {len(told)} acknowledged")
        if not numbers:  # nothing was acknowledged: it must be possible to begin again
            assert list(begin(state).nodes) == [0]
            return
        session = EditSession.open(FOLDER, files=state)
        if session.damage:
            self.wrong.append(f"damaged: {session.damage[0].trouble}")
        for node in session.nodes.values():
            session.picture(node.id)
        report = session.check()
        if not report.sound or report.turns != len(numbers):
            self.wrong.append(f"check: {[f'{f.name} {f.trouble}' for f in report.findings if f.kind != 'leftover']}")
        if session.check().findings:
            self.wrong.append("a second check finds what the first left")
        session.append(made(99), parent=0)
        session.gc(damaged=True)
        if not session.check().sound:
            self.wrong.append("gc removed what was needed")


def begin(disk: Memory) -> EditSession:
    return EditSession.create(FOLDER, picture(0), files=disk)


def act(session: EditSession, draw: random.Random) -> None:
    """One turn: mostly an edit, of few enough pictures that some come twice."""
    choice = draw.random()
    if choice < 0.6:
        session.append(made(draw.randrange(3)), parent=draw.choice(list(session.nodes)))
    elif choice < 0.7:
        session.star(draw.choice(list(session.nodes)))
    elif choice < 0.8:
        session.enqueue("make it snow")
    else:
        session.checkout(draw.choice(list(session.nodes)))


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (number, 20, 30))


def made(number: int) -> EditResult:
    """A result such as an edit gives; equal numbers, equal files."""
    image = picture(number)
    latents = np.full((1, 1, 64), number, np.float32)
    request = EditRequest("make it snow", image=picture(0), seed=number, num_inference_steps=1)
    return EditResult(image, request, number, 0.5, {"name": "none"}, latents, (), "vae", pixels_sha256(image))

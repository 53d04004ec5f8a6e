"""An edit session: a tree of edits in a folder, of which nothing is ever overwritten. No MLX here.

    session = EditSession.create("cats", "cat.jpg")
    session.edit(pipe, "give it a red scarf", seed=7)
    session.edit(pipe, "make it snow")
    session.undo()
    session.edit(pipe, "make it night")      # a branch

Undo, stars, notes and the queue are turns of their own, so that a session is whole at every moment (`store.py` says how).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from PIL import Image

from .disk import Files
from .edit import EditRequest, EditResult, Step
from .errors import KontextError, RequestError, SessionError
from .kept import keep_result, keep_source, lost, picture, record, result_again, stored
from .log import Log
from .recipes import Recipe, fill, slug
from .store import FOLDERS, IGNORED, Lock, Store
from .turns import Damaged, Node, Queued
from .upkeep import Finding, Report, Room, collect


class Editor(Protocol):
    """What makes the edits: a KontextPipeline."""

    def stream(self, image: Any = None, prompt: str | None = None, **options: Any) -> Iterator[Step]: ...


class EditSession:
    """A session that is open: one opening of a folder writes, others read along (`lock` tells, `refresh` looks for news).

    Pictures are read when they are asked for. Node 0 is the picture that the session began with.
    Methods that write raise SessionError if this opening only reads, ResourceError on a full disk.
    """

    def __init__(self, store: Store, lock: Lock):
        """Use `create` or `open`."""
        self._store, self._log = store, Log(store, lock)
        self.unsaved: EditResult | None = None
        """The last result that `stream` could not keep, say on a full disk; `append` it when there is room."""

    @classmethod
    def create(cls, folder: str | os.PathLike[str], image: Any, *, files: Files | None = None) -> EditSession:
        """Begin a session in a new or empty folder with whatever `image=` of an edit takes.

        An EditResult brings the edits that led to it, as far back as they are in memory. Raises SessionError if the folder
        holds anything, ImageError for a bad picture.
        """
        store = Store(folder, files)
        chain: list[EditResult] = []
        while isinstance(image, EditResult):
            chain.append(image)
            image = image.request.image
        source = keep_source(image) if image is not None else None  # before anything is made on the disk
        cls._check_empty(store)
        store.prepare()
        session = cls(store, store.take_lock())
        try:
            session._log.check_writable()
            cls._check_empty(store)  # again: somebody may have been quicker than our lock
            if source is not None:
                session._log.write(source.body, source.objects)
            for result in reversed(chain):
                session.append(result)
        except BaseException:
            session.close()
            raise
        return session

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, readonly: bool = False, files: Files | None = None) -> EditSession:
        """Open a session for writing, or for reading where another process has it open (see `lock`) or if `readonly`.

        Damaged turns are told in `damage` and left out. Raises SessionError if the folder holds no session.
        """
        store = Store(folder, files)
        try:
            begun = store.files.kind(store.turns)
        except OSError as error:
            raise store.explain(error, "cannot be read") from error
        if not begun:
            raise SessionError(f"{store.folder} holds no edit session; name another folder, or create one there")
        session = cls(store, Lock(False, "it was opened for reading") if readonly else store.take_lock())
        try:
            session.refresh()
        except BaseException:
            session.close()
            raise
        return session

    @staticmethod
    def _check_empty(store: Store) -> None:
        try:
            if store.files.kind(store.folder) != "folder":
                return
            if store.numbers():
                raise SessionError(f"{store.folder} holds a session already; open it, or name another folder")
            # What a creation that was cut short leaves is no obstacle.
            ours = {*FOLDERS, "lock", *IGNORED}
            others = [name for name in store.files.names(store.folder) if name not in ours]
        except OSError as error:
            raise store.explain(error, "cannot be read") from error
        if others:
            raise SessionError(f"{store.folder} is not empty ({others[0]!r}); a session needs a folder of its own")

    # --- what is there ---

    @property
    def folder(self) -> Path:
        return self._store.folder

    @property
    def lock(self) -> Lock:
        """`held`: this opening may write; else `reason`."""
        return self._log.lock

    @property
    def damage(self) -> tuple[Finding, ...]:
        """Turns that could not be read; `check` looks at every file and sets bad ones aside."""
        return self._log.damage

    @property
    def nodes(self) -> dict[int, Node]:
        """Every picture in the order it was made: a copy, by number."""
        return dict(self._log.history.nodes)

    @property
    def current(self) -> Node:
        """The node that the next edit starts from. Raises SessionError if no picture is left."""
        if self._log.history.current is None:
            raise SessionError(f"{self.folder}: no picture can be read; `mlx-kontext sessions check` tells why")
        return self._log.history.nodes[self._log.history.current]

    @property
    def queue(self) -> tuple[Queued, ...]:
        """Edits that wait, in order."""
        return tuple(self._log.history.queue)

    def node(self, id: int | None = None) -> Node:
        """By number, the current one by default. Raises SessionError if there is none."""
        if id is None:
            return self.current
        if id not in self._log.history.nodes:
            raise SessionError(f"{self.folder} has no picture {id}; it has {_told(list(self._log.history.nodes))}")
        return self._log.history.nodes[id]

    def children(self, id: int | None) -> tuple[int, ...]:
        """Numbers of the nodes made from a node, oldest first; of None: the roots."""
        return self._log.history.children(id)

    def path(self, id: int | None = None) -> tuple[Node, ...]:
        """The nodes from the root to a node."""
        return self._log.history.path(self.node(id).id)

    def picture(self, id: int | None = None) -> Image.Image:
        """The picture of a node, RGB. Raises SessionError if its file is damaged or gone."""
        return picture(self._store, self.node(id))

    def thumbnail(self, id: int | None = None) -> Image.Image:
        """At most 256 pixels a side. Raises as `picture`."""
        node = self.node(id)
        try:
            return self._store.thumbnail(node.image, keep=self.lock.held)
        except Damaged as trouble:
            raise lost(self._store, node, "picture", trouble) from None

    def result(self, id: int | None = None) -> EditResult:
        """A node as the result it was: an edit of it goes on from its latents, bit for bit as in the process that made it.

        `request.image` is the path of the picture it was made from. Raises SessionError for a source, and if a file is
        damaged or gone.
        """
        return result_again(self._store, self.node(id))

    def start(self, id: int | None = None) -> tuple[EditResult | Image.Image, tuple[str, ...]]:
        """What `image=` of an edit of this node should be, and what the user should know about it.

        A result with its latents, or the picture of a source. Raises SessionError if the picture is damaged or gone.
        """
        node = self.node(id)
        if node.kind == "source":
            return self.picture(node.id), ()
        try:
            return self.result(node.id), ()
        except SessionError as error:
            # Not the picture's file, or this raises as well: an edit from the pixels is worse, but it is one.
            return self.picture(node.id), (f"started from pixels instead of latents: {error}",)

    def file(self, id: int | None = None) -> Path:
        """The PNG of a node; it is the session's own, so copy it rather than change it."""
        return self._store.object_path(f"{self.node(id).image}.png")

    # --- edits ---

    def check_writable(self) -> None:
        """Raises now what `append` would raise after minutes of work: SessionError, or ResourceError on a full disk."""
        self._log.check_writable()
        self._store.check_room()

    def edit(
        self, pipe: Editor, prompt: str, *, parent: int | None = None, **options: Any
    ) -> EditResult | list[EditResult]:
        """Edit the current node, or the node `parent`; the result is kept and becomes the current node.

        options: as in EditRequest. Returns one result, or a list of results if `seed` is a list.
        """
        results = [step.result for step in self.stream(pipe, prompt, parent=parent, **options) if step.result]
        return results if isinstance(options.get("seed"), Sequence) else results[0]

    def stream(self, pipe: Editor, prompt: str, *, parent: int | None = None, **options: Any) -> Iterator[Step]:
        """`edit` as a generator of Steps; a Step arrives with its result only when the result is on the disk."""
        node = self.node(parent)
        start, notices = self.start(node.id)
        return self._carry_out(pipe, EditRequest.of(start, prompt, **options), node, None, notices)

    def stream_queued(self, pipe: Editor) -> Iterator[Step]:
        """As `stream`, for the first edit of the queue, which leaves the queue with its last result."""
        if not self.queue:
            raise SessionError("the queue is empty")
        first = self.queue[0]
        node = self.node(first.parent)
        start, notices = self.start(node.id)
        return self._carry_out(pipe, self._filled(first, start), node, first.id, notices)

    def _carry_out(
        self, pipe: Editor, request: EditRequest, node: Node, item: int | None, notices: tuple[str, ...]
    ) -> Iterator[Step]:
        self.check_writable()
        steps = pipe.stream(request)

        def kept() -> Iterator[Step]:
            for step in steps:
                if step.result is not None:
                    result = dataclasses.replace(step.result, notices=step.result.notices + notices)
                    try:
                        self.append(result, parent=node.id, item=item)
                    except KontextError:
                        self.unsaved = result
                        raise
                    step = dataclasses.replace(step, result=result)
                yield step

        return kept()

    def append(
        self,
        result: EditResult,
        *,
        parent: int | None = None,
        item: int | None = None,
        follow: bool = True,
        timings: Mapping[str, float] | None = None,
        safety: Mapping[str, Any] | None = None,
    ) -> Node:
        """Keep a result, of this process or another one; when this returns it is on the disk.

        parent: the node that was edited; by default the current one, or none if the result began with no picture. item: the
        queued edit it carries out. follow: whether it becomes the current node. timings: seconds by phase. safety: the
        record of the checks it passed.
        """
        self._log.check_writable()
        if parent is None and result.request.image is not None:
            parent = self.current.id
        before = self.node(parent) if parent is not None else None
        kept = keep_result(result, before, item=item, follow=follow, timings=timings, safety=safety)
        number = self._log.write(kept.body, kept.objects)
        return next(node for node in reversed(self._log.history.nodes.values()) if node.turn == number)

    # --- moving about ---

    def undo(self) -> Node:
        """To the parent of the current node."""
        node = self.current
        if node.parent is None:
            raise SessionError("nothing to undo: this is the picture it began with")
        return self._go("undo", node.parent)

    def redo(self) -> Node:
        """To the child one came from, else the newest."""
        child = self._log.history.next(self.current.id)
        if child is None:
            raise SessionError("nothing to redo: no edit of this picture yet")
        return self._go("redo", child)

    def checkout(self, id: int) -> Node:
        """Make any node the current one."""
        return self._go("checkout", self.node(id).id)

    def sibling(self, step: int) -> Node:
        """To the next (1) or previous (-1) edit of the same picture."""
        siblings = self._log.history.siblings(self.current.id)
        place = siblings.index(self.current.id) + step
        if not 0 <= place < len(siblings):
            raise SessionError(f"no {'later' if step > 0 else 'earlier'} edit of the same picture")
        return self._go("checkout", siblings[place])

    def _go(self, kind: str, id: int) -> Node:
        if id != self.current.id:
            self._log.write({"kind": kind, "node": id})
        return self.current

    def star(self, id: int | None = None, on: bool = True) -> Node:
        """Mark a node as a favourite, or no longer."""
        node = self.node(id)
        self._log.write({"kind": "star", "node": node.id, "on": on})
        return self.node(node.id)

    def note(self, id: int, text: str) -> Node:
        """Write a note on a node, in place of the one it has."""
        if not isinstance(text, str):
            raise RequestError(f"a note is {type(text).__name__}; expected text")
        self._log.write({"kind": "note", "node": self.node(id).id, "text": text})
        return self.node(id)

    # --- edits that wait ---

    def enqueue(self, prompt: str, *, parent: int | None = None, **options: Any) -> Queued:
        """Put an edit at the end of the queue, which survives. parent: the node to edit; by default the one current then.

        Raises RequestError now for what could not work then.
        """
        if parent is not None:
            self.node(parent)
        if options.get("latents") is not None:
            raise RequestError("a queued edit cannot hold latents; edit at once, or give a seed")
        request = EditRequest.of(_ANY, prompt, **options)
        number = self._log.write({"kind": "queue", "request": stored(request), "parent": parent})
        return next(item for item in self.queue if item.id == number)

    def request(self, item: int) -> EditRequest:
        """What a queued edit asks for, its picture filled in: for `pipe.stream(...)` here or in another process."""
        queued = self._queued(item)
        return self._filled(queued, self.start(queued.parent)[0])

    def _filled(self, queued: Queued, start: EditResult | Image.Image) -> EditRequest:
        try:
            return EditRequest.from_json(queued.request, image=start)
        except RequestError as error:
            raise SessionError(f"{self.folder}: queued edit {queued.id} cannot be carried out ({error})") from None

    def dequeue(self, item: int, why: str = "removed") -> None:
        """Take an edit out of the queue; a result that was appended with `item` has done so already."""
        self._log.write({"kind": "unqueue", "item": self._queued(item).id, "why": why})

    def reorder(self, items: Sequence[int]) -> None:
        """These first, in this order; the rest of the queue after them."""
        for item in items:
            self._queued(item)
        self._log.write({"kind": "reorder", "items": list(items)})

    def _queued(self, item: int) -> Queued:
        for queued in self.queue:
            if queued.id == item:
                return queued
        raise SessionError(f"no edit {item} is queued; queued are {_told([queued.id for queued in self.queue])}")

    # --- out of the session ---

    def recipe(self, id: int | None = None) -> Recipe:
        """The edits that led to a node, to repeat on other photos."""
        return Recipe.of_path(self.path(id))

    def replay(self, pipe: Editor, image: Any, id: int | None = None) -> EditResult:
        """The edits that led to a node, carried out on another photo; the session stays as it is.

        `EditSession.create(folder, result)` makes a session of what comes back, every edit of it.
        """
        return self.recipe(id).run(pipe, image)

    def export(self, id: int | None, template: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save a node's picture as PNG, JPEG or WebP, with what made it inside; returns the path.

        template: as in `named`. Raises RequestError for a source, a name that is taken (unless `overwrite`), an unwritable
        place.
        """
        from .provenance import save_image

        node = self.node(id)
        if node.kind == "source":
            raise RequestError(f"picture {node.id} is the one the session began with; nothing was made yet to export")
        path, image = self.named(node.id, template), self.picture(node.id)
        return save_image(image, path, record(self._store, node, image), overwrite=overwrite)

    def named(self, id: int | None, template: str | os.PathLike[str]) -> Path:
        """A path with {name} (of the source), {node}, {seed}, {prompt}, {date} filled in. Raises RequestError for others."""
        node = self.node(id)
        sources = [each.name for each in self.path(node.id) if each.name]
        return Path(fill(os.fspath(template), node, sources[0] if sources else self.folder.name)).expanduser()

    # --- upkeep ---

    def check(self) -> Report:
        """Look at every file; what is damaged or foreign is set aside in damaged/ (only told, if we may not write).

        Never raises on damage, and nothing is lost.
        """
        return self._log.check()

    def gc(self, *, damaged: bool = False, dry_run: bool = False) -> Room:
        """Remove what no turn names: objects and temporary files of writes cut short, old thumbnails.

        damaged: also all that was set aside. Raises SessionError while a turn is damaged, since it may name anything.
        """
        if not dry_run:
            self._log.check_writable()
        return collect(self._store, damaged=damaged, dry_run=dry_run)

    def refresh(self) -> bool:
        """Read turns that another process has added; returns whether there were any."""
        return self._log.refresh()

    def close(self) -> None:
        """Give the lock back; the session can still be read."""
        self._log.close()

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_ANY = Image.new("RGB", (16, 16))  # stands for the picture that a queued edit will have


def sessions_folder() -> Path:
    """Where sessions live unless the user names another place; it may not exist yet."""
    from platformdirs import user_data_dir

    return Path(user_data_dir("mlx-kontext")) / "sessions"


def new_folder(name: str) -> Path:
    """A folder for a session of the picture `name` that is not taken yet: sessions/20261125-141824-img_2041."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{slug(Path(name).stem) or 'session'}"
    tries = (sessions_folder() / (stem + more) for more in ("", *(f"-{i}" for i in range(2, 100))))
    return next(folder for folder in tries if not os.path.lexists(folder))


def is_session(folder: str | os.PathLike[str]) -> bool:
    """Whether a session was begun there: it has a turn, readable or not."""
    try:
        return bool(Store(folder).numbers())
    except OSError:
        return False


def _told(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" ... {numbers[-1]}" if len(numbers) > 8 else "") or "none"

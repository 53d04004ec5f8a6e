"""Looking after a session's files: find damage and set it aside, remove what nothing needs. No MLX here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import SessionError
from .history import History
from .store import FOLDERS, IGNORED, OBJECT, TEMPORARY, Store, read_latents, read_png
from .turns import NAME, Damaged, Newer, Turn

_OWN = {*FOLDERS, *IGNORED, "lock", "thumbs", "damaged"}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    name: str
    """Of the file, relative to the session; a stranger may have chosen it, so print it with `safe_text`."""
    kind: str
    """damaged, missing (a turn names it), leftover (a write that was cut short), foreign (not ours), newer."""
    trouble: str
    aside: str = ""
    """Where it was moved to, relative to the session."""


@dataclass(frozen=True)
class Report:
    """What `check` saw."""

    findings: tuple[Finding, ...]
    turns: int
    """Sound ones."""
    objects: int
    """Sound ones."""
    unused: int
    """Sound objects that no turn names; `gc` removes them."""

    @property
    def sound(self) -> bool:
        """Nothing was lost: whatever was found is a leftover or not ours."""
        return all(finding.kind in ("leftover", "foreign") for finding in self.findings)


@dataclass(frozen=True)
class Room:
    """What `collect` removed, or would."""

    files: int
    bytes: int


def check(store: Store, *, mend: bool) -> Report:
    """Read and verify every file; with `mend`, move damaged and foreign ones into damaged/. Never raises on damage.

    A turn whose picture is lost stays: its prompt and seed may make the picture again, and its children keep their place.
    """
    folders = [_Found(folder, "damaged", "it is no folder") for folder in _not_folders(store)]
    turns, bad_turns = _read_turns(store)
    sound, bad_objects = _read_objects(store)
    strangers = [
        _Found(store.folder / name, "foreign", "it is not part of a session; left where it is", movable=False)
        for name in _names(store, store.folder)
        if name not in _OWN
    ]
    # A newer version may have files of kinds that we would take for foreign.
    mend = mend and not any(found.kind == "newer" for found in bad_turns)
    findings = [found.settle(store, mend) for found in (*folders, *bad_turns, *bad_objects, *strangers)]
    if mend and folders:
        with suppress(SessionError):
            store.prepare()
    needed = {name: turn.id for turn in turns.values() for name in turn.objects}
    for name, number in needed.items():
        if name not in sound:
            trouble = f"turn {number} needs it"
            findings.append(Finding(f"objects/{name}", "missing", trouble))
    nodes = {turn.node.id for turn in turns.values() if turn.node}
    for turn in turns.values():
        if turn.node and turn.node.parent is not None and turn.node.parent not in nodes:
            name = f"turns/{store.turn_path(turn.id).name}"
            findings.append(Finding(name, "missing", f"the picture {turn.node.parent} that it was made from is lost"))
    return Report(tuple(findings), len(turns), len(sound), len(sound - set(needed)))


def collect(store: Store, *, damaged: bool, dry_run: bool) -> Room:
    """Remove unused objects, temporary files, thumbnails without a picture and, if asked, what was set aside.

    Raises SessionError while a turn is damaged or set aside and kept: it may name any of the objects.
    """
    turns, bad = _read_turns(store)
    broken = [found.path.name for found in bad if found.kind in ("damaged", "newer")]
    if not damaged:
        broken += [name for name in _names(store, store.damaged) if NAME.match(name)]
    if broken:
        raise SessionError(
            f"{store.folder}: turn {broken[0]} cannot be read and may name any object, so nothing was removed; type: "
            "mlx-kontext sessions check, and gc with --damaged to give up what was set aside"
        )
    needed = {name for turn in turns.values() for name in turn.objects}
    pictures = {name.partition(".")[0] for name in needed}
    removable: list[tuple[Path, Callable[[str], bool]]] = [
        (store.turns, lambda name: TEMPORARY.fullmatch(name) is not None),
        (store.objects, lambda name: name not in needed and bool(OBJECT.fullmatch(name) or TEMPORARY.fullmatch(name))),
        (store.thumbs, lambda name: name.partition(".")[0] not in pictures),
        (store.damaged, lambda name: damaged),
    ]
    files = size = 0
    for folder, goes in removable:
        for name in _names(store, folder):
            path = folder / name
            if not goes(name) or store.files.kind(path) == "folder":  # a folder somebody put here is not ours to empty
                continue
            try:
                freed = store.files.size(path)
                if not dry_run:
                    store.files.remove(path)
            except OSError as error:
                raise store.explain(error, "cannot be tidied") from error
            files, size = files + 1, size + freed
    return Room(files, size)


@dataclass(frozen=True)
class _Found:
    path: Path
    kind: str
    trouble: str
    movable: bool = True

    def settle(self, store: Store, mend: bool) -> Finding:
        """Set it aside if we may."""
        finding = Finding(str(self.path.relative_to(store.folder)), self.kind, self.trouble)
        if not (mend and self.movable):
            return finding
        try:
            return replace(finding, aside=store.set_aside(self.path))
        except OSError as error:
            return replace(finding, trouble=f"{self.trouble}; it cannot be moved ({error.strerror})")


def _not_folders(store: Store) -> Iterator[Path]:
    for folder in (store.turns, store.objects, store.thumbs, store.damaged):
        if store.files.kind(folder) not in ("folder", ""):
            yield folder


def _read_turns(store: Store) -> tuple[dict[int, Turn], list[_Found]]:
    turns: dict[int, Turn] = {}
    bad: list[_Found] = []
    history = History()  # which finds what only shows between turns
    for name in _names(store, store.turns):
        path = store.turns / name
        if stray := _stray(path):
            bad.append(stray)
            continue
        number = NAME.fullmatch(name)
        if number is None:
            bad.append(_Found(path, "foreign", "it is no turn"))
            continue
        try:
            turn = store.turn(int(number[1]))
            history.apply(turn)
            turns[turn.id] = turn
        except Newer as trouble:
            bad.append(_Found(path, "newer", str(trouble), movable=False))
        except Damaged as trouble:
            bad.append(_Found(path, "damaged", str(trouble)))
    return turns, bad


def _read_objects(store: Store) -> tuple[set[str], list[_Found]]:
    sound, bad = set(), []
    for name in _names(store, store.objects):
        path = store.objects / name
        if stray := _stray(path):
            bad.append(stray)
        elif not OBJECT.fullmatch(name):
            bad.append(_Found(path, "foreign", "it is no object"))
        else:
            try:
                data = store.read_object(name)
                if path.suffix == ".png":
                    read_png(data)
                else:
                    read_latents(data)
                sound.add(name)
            except Damaged as trouble:
                bad.append(_Found(path, "damaged", str(trouble)))
    return sound, bad


def _stray(path: Path) -> _Found | None:
    cut_short = TEMPORARY.fullmatch(path.name)
    return _Found(path, "leftover", "a write that was cut short") if cut_short else None


def _names(store: Store, folder: Path) -> list[str]:
    """Empty for what is no folder, or cannot be read: what should be in it is then missing."""
    try:
        return [name for name in store.files.names(folder) if name not in IGNORED]
    except OSError:
        return []

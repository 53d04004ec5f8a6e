"""`mlx-kontext sessions`, and what `edit --session` and `run` need: sessions and recipes on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .disk import gigabytes
from .errors import RequestError, SessionError
from .terminal import safe_text, say

if TYPE_CHECKING:
    from .edit import EditResult
    from .sessions import EditSession
    from .turns import Node


@click.group()
def sessions() -> None:
    """List, show, export and check edit sessions: folders of `edit --session`, or names in the default folder."""


@sessions.command("list")
@click.argument("folder", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a session.")
def list_(folder: str | None, as_json: bool) -> None:
    """Print the sessions in FOLDER (default: the user's data folder): path, pictures, last change, what it began with."""
    from .sessions import EditSession

    for place in places(folder):
        with EditSession.open(place, readonly=True) as session:
            nodes = list(session.nodes.values())
            about = {
                "session": str(place),
                "pictures": len(nodes),
                "queued": len(session.queue),
                "changed": nodes[-1].at if nodes else "",
                "began_with": nodes[0].name if nodes else "",
                "damaged_turns": len(session.damage),
            }
        if as_json:
            click.echo(json.dumps(about))
            continue
        waiting = f", {about['queued']} queued" if about["queued"] else ""
        damage = f"  {about['damaged_turns']} turns cannot be read" if about["damaged_turns"] else ""
        line = f"{place}  {len(nodes)} pictures{waiting}  {about['changed']}  {about['began_with']}{damage}"
        click.echo(one_line(line))


@sessions.command()
@click.argument("session")
@click.option(
    "--at", type=int, metavar="N", help="With --recipe: the edits that led to picture N, not the current one."
)
@click.option("--recipe", is_flag=True, help="Print the edits as a recipe (TOML) for `mlx-kontext run`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a picture.")
def show(session: str, at: int | None, recipe: bool, as_json: bool) -> None:
    """Print the pictures of SESSION as a tree: number, prompt, seed; * is a star, < the current one."""
    from .sessions import EditSession

    if at is not None and not recipe:
        raise click.UsageError("--at needs --recipe.")
    with EditSession.open(find(session), readonly=True) as opened:
        tell(opened)
        if recipe:
            click.echo(opened.recipe(at).to_toml(), nl=False)
            return
        current = opened.current.id
        for node, depth in tree(opened):
            if as_json:
                click.echo(json.dumps(described(opened, node) | {"current": node.id == current}))
                continue
            marks = ("*" if node.starred else " ") + ("<" if node.id == current else " ")
            words = node.prompt or node.name or "picture"
            seed = f"  seed {node.seed}" if node.seed is not None else f"  {node.width}x{node.height}"
            note = f"  ({node.note})" if node.note else ""
            click.echo(one_line(f"{node.id:>4}{marks} {'  ' * depth}{words}{seed}{note}").rstrip())
        for item in opened.queue:
            say(one_line(f"queued: {item.request['prompt']}"))


@sessions.command()
@click.argument("session")
@click.argument("numbers", type=int, nargs=-1, metavar="[N]...")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="PNG, JPEG or WebP; {name}, {node}, {seed}, {prompt} and {date} are filled in. TOML: a recipe.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a file.")
def export(session: str, numbers: tuple[int, ...], output: str, overwrite: bool, as_json: bool) -> None:
    """Save pictures N of SESSION (default: the current one), or the edits that led there as a recipe, and print the paths."""
    from .sessions import EditSession

    if len(set(numbers)) > 1 and "{node}" not in output:
        raise RequestError(f"{len(set(numbers))} pictures need {{node}} in the name, for example -o out-{{node}}.png")
    with EditSession.open(find(session), readonly=True) as opened:
        tell(opened)
        for node in [opened.node(number) for number in dict.fromkeys(numbers)] or [opened.current]:
            if output.lower().endswith(".toml"):
                path = opened.recipe(node.id).write(opened.named(node.id, output), overwrite=overwrite)
            else:
                path = opened.export(node.id, output, overwrite=overwrite)
            about = {"session": str(opened.folder), "picture": node.id, "path": str(path)}
            click.echo(json.dumps(about) if as_json else one_line(str(path)))


@sessions.command()
@click.argument("session", nargs=-1, metavar="[SESSION]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a finding.")
def check(session: tuple[str, ...], as_json: bool) -> None:
    """Verify every file of SESSION (default: all in the default folder); print what is wrong, exit 1 if anything is lost.

    What is damaged or foreign is set aside in the session's folder damaged/, never deleted.
    """
    from .sessions import EditSession

    sound = True
    for place in [find(word) for word in session] or list(places(None)):
        with EditSession.open(place) as opened:
            if not opened.lock.held:
                say(f"note: {place}: {opened.lock.reason}, so nothing is set aside")
            report = opened.check()
        for finding in report.findings:
            if as_json:
                click.echo(json.dumps({"session": str(place), **vars(finding)}))
            else:
                aside = f"; it is now {finding.aside}" if finding.aside else ""
                click.echo(one_line(f"{place}/{finding.name}: {finding.kind}, {finding.trouble}{aside}"))
        sound = sound and report.sound
        state = "all sound" if report.sound else "error: damaged, the rest works"
        unused = f", {report.unused} unused (gc removes them)" if report.unused else ""
        say(f"{place}: {report.turns} turns, {report.objects} objects{unused}: {state}")
    if not sound:
        raise click.exceptions.Exit(1)


@sessions.command()
@click.argument("session", nargs=-1, metavar="[SESSION]...")
@click.option("--damaged", is_flag=True, help="Also delete what `check` has set aside.")
@click.option("--dry-run", is_flag=True, help="Delete nothing, only count.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a session.")
def gc(session: tuple[str, ...], damaged: bool, dry_run: bool, as_json: bool) -> None:
    """Delete what no turn of SESSION (default: all in the default folder) needs: no picture of a session ever is."""
    from .sessions import EditSession

    for place in [find(word) for word in session] or list(places(None)):
        with EditSession.open(place, readonly=dry_run) as opened:
            room = opened.gc(damaged=damaged, dry_run=dry_run)
        if as_json:
            click.echo(json.dumps({"session": str(place), "files": room.files, "bytes": room.bytes}))
        else:
            click.echo(one_line(f"{place}: {room.files} files, {gigabytes(room.bytes)}"))


def find(word: str) -> Path:
    """A session by its path, or by its name in the default folder."""
    from .sessions import sessions_folder

    for folder in (Path(word), sessions_folder() / word):
        if os.path.lexists(folder / "turns"):
            return folder
    raise SessionError(f"{word} is no edit session, here or in {sessions_folder()}; see mlx-kontext sessions list")


def places(folder: str | None) -> Iterator[Path]:
    """Every session in a folder, oldest name first; the folder itself if it is one."""
    from .sessions import sessions_folder

    root = Path(folder) if folder is not None else sessions_folder()
    if os.path.lexists(root / "turns"):
        yield root
        return
    if folder is not None and not root.is_dir():
        raise RequestError(f"{folder} is no folder; check the path")
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if not entry.is_symlink() and os.path.lexists(entry / "turns"):
            yield entry


def tree(session: EditSession) -> Iterator[tuple[Node, int]]:
    """Depth first, each with its depth: a step to the right where edits branch, not at each edit."""
    nodes = session.nodes
    todo = [(root, 0) for root in reversed(session.children(None))]
    while todo:
        number, depth = todo.pop()
        yield nodes[number], depth
        children = session.children(number)
        todo += [(child, depth + (len(children) > 1)) for child in reversed(children)]


def described(session: EditSession, node: Node) -> dict[str, Any]:
    return {
        "picture": node.id,
        "parent": node.parent,
        "kind": node.kind,
        "prompt": node.prompt,
        "seed": node.seed,
        "width": node.width,
        "height": node.height,
        "at": node.at,
        "starred": node.starred,
        "note": node.note,
        "path": str(session.file(node.id)),
    }


def tell(session: EditSession) -> None:
    """What a user of a damaged session should know before anything else."""
    for finding in session.damage:
        say(f"note: {session.folder}/{finding.name}: {finding.trouble}; type: mlx-kontext sessions check")


def one_line(text: str) -> str:
    """For stdout: whatever a name or prompt holds, it neither steers the terminal nor breaks the line."""
    return safe_text(text).replace("\n", "·")


# --- edit --session ---


@dataclass(frozen=True)
class Place:
    """Where an edit starts in a session, and how its results are kept."""

    start: Any
    """For `image=`."""
    prompt: str | None
    made_with: dict[str, str]
    """The model of the picture that is edited, empty for the first."""
    keep: Callable[[EditResult], dict[str, Any]] = field(repr=False)
    """Appends a result; returns where it is, for the JSON line: session, picture, path."""


@contextmanager
def session_edit(folder: str, at: int | None, image: str | None, prompt: str | None, repeats: bool) -> Iterator[Place]:
    """Open the session in `folder`, or begin it with `image`; one word alone is the prompt unless a record `repeats` has it.

    Raises SessionError if another process has it open, RequestError if `image` is none of its pictures.
    """
    from .sessions import EditSession, is_session

    begun = is_session(folder)
    if prompt is None and not repeats:
        if image is None:
            raise click.UsageError("Missing argument 'PROMPT'; say what to change.")
        if not begun:
            raise click.UsageError(
                f"{folder} holds no session yet; begin it with a picture: edit IMAGE PROMPT --session {folder}"
            )
        if os.path.isfile(image):
            raise click.UsageError(f"Missing argument 'PROMPT'; {image} is a picture, say what to change as well.")
        image, prompt = None, image
    if not begun and (image is None or at):
        raise click.UsageError(f"{folder} holds no session yet; begin it with a picture and without --at")
    with EditSession.open(folder) if begun else EditSession.create(folder, image) as session:
        if not session.lock.held:
            raise SessionError(f"{session.folder} cannot be added to: {session.lock.reason}")
        session.check_writable()
        tell(session)
        node = session.node(at)
        if begun and image is not None:
            node = matching(session, image, node, chosen=at is not None)
        start, notices = session.start(node.id)
        for notice in notices:
            say(f"note: {notice}")
        say(one_line(f"editing picture {node.id} of {session.folder}" + (f": {node.prompt}" if node.prompt else "")))

        def keep(result: EditResult) -> dict[str, Any]:
            made = session.append(replace(result, notices=result.notices + notices), parent=node.id)
            say(f"picture {made.id}")
            return {"session": str(session.folder), "picture": made.id, "path": str(session.file(made.id))}

        yield Place(start, prompt, dict(node.model), keep)


def matching(session: EditSession, image: str, node: Node, *, chosen: bool) -> Node:
    """The picture to edit where IMAGE is named again: the session goes on if it began with IMAGE, else from that result."""
    from .edit import pixels_sha256
    from .photo import read_photo

    pixels = pixels_sha256(read_photo(image).image)
    same = [each for each in session.nodes.values() if each.pixels == pixels]
    if any(each.parent is None for each in same) or (same and chosen):
        return node
    if same:
        return same[-1]
    first = next(iter(session.nodes.values()))
    raise RequestError(
        f"{image} is not the picture that {session.folder} began with ({first.name or 'unnamed'}, {first.width}x{first.height}), "
        "nor one of its results; leave IMAGE out to go on with the session, or name another folder for a new one"
    )


# --- run ---


def photo_paths(photos: tuple[str, ...], folder: str, overwrite: bool) -> dict[str, Path]:
    """Where the picture made of each photo goes: FOLDER/NAME.png; bad photos and taken names are told before any work."""
    from .photo import open_picture
    from .provenance import check_path

    paths = {photo: Path(folder) / f"{Path(photo).stem}.png" for photo in dict.fromkeys(photos)}
    taken: set[Path] = set()
    for photo, path in paths.items():
        if path in taken:
            raise RequestError(f"two photos would both become {path}; run them into two folders, or rename one")
        taken.add(path)
        with open_picture(Path(photo)):
            pass
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder} cannot be made ({error.strerror}); choose another place") from None
    for path in paths.values():
        check_path(path, overwrite=overwrite)
    return paths

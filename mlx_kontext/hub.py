"""From a model's name to a folder on this machine. The only module that may touch the network, and only when asked."""

import glob
import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import __version__
from .cached import HUB_ID, Cached, cache_folder, cached_models, digest, missing, repo_folder, snapshot, wanted
from .card import LICENCE, SOURCE, leaks, papers
from .disk import gigabytes, write_atomic
from .errors import CheckpointError, ModelNotFound, RequestError, ResourceError
from .hub_errors import explained

KONTEXT = SOURCE
Progress = Callable[[int], object]
_TRIES = 5


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; blob: its sha256 if it is a large one, else git's sha1; here: bytes that need no download."""

    path: str
    bytes: int
    blob: str
    here: int

    @property
    def large(self) -> bool:
        return len(self.blob) == 64


@dataclass(frozen=True)
class Listing:
    """What `pull` would fetch: one revision's files, without those we have no use for."""

    repo: str
    revision: str | None
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def here(self) -> int:
        return sum(file.here for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"files": [vars(file) for file in self.files], "bytes": self.bytes, "here": self.here}


def find_model(
    model: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of "demo", of a path, or of a hub id (downloaded unless `local_files_only`).

    Raises ModelNotFound, which says what to type, or CheckpointError for a path that is no folder.
    """
    name = os.fspath(model)
    if name == "demo":
        return demo_folder()
    path = local_path(name)
    if path is not None and path.is_dir():
        return path
    if path is not None:
        raise CheckpointError(f"{name} is a file; this version reads model folders (diffusers' layout or our own)")
    if not HUB_ID.fullmatch(name):
        raise ModelNotFound(
            f"no model {name[:200]!r}: expected demo, a folder that exists, or a hub id such as {KONTEXT}"
        )
    if local_files_only:
        return _local(name, revision)
    try:
        return pull(look_up(name, revision, token), token)
    except ModelNotFound:  # offline, a token that has run out: what is here whole will do
        with suppress(ModelNotFound):
            return _local(name, revision)
        raise


def local_path(name: str) -> Path | None:
    """The file or folder of that name, `~` expanded; None if there is none or no such name can be."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
        return None


def demo_folder() -> Path:
    """The small trained model that ships with the package."""
    spec = importlib.util.find_spec("mlx_kontext_demo")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    places.append(Path(__file__).parent.parent / "assets" / "demo" / "model")  # a clone that is not installed
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    raise ModelNotFound(
        "the demo model is missing from this installation; type: pip install --force-reinstall mlx-kontext"
    )


def local_models() -> list[Cached]:
    """The demo and every Kontext model in the hub's cache. Never goes online."""
    demo = demo_folder()
    size = sum(path.stat().st_size for path in demo.rglob("*") if path.is_file())
    return [Cached("demo", __version__, "", str(demo), size, tuple(missing(demo))), *cached_models()]


def look_up(repo: str, revision: str | None = None, token: str | bool | None = None) -> Listing:
    """Ask the hub which files of a repository make the model, how large they are, and see what is here of them.

    Either the folder layout or, where there is none, the single files; never both. Raises ModelNotFound.
    """
    from huggingface_hub import HfApi

    place = repo_folder(repo)
    with explained(repo, revision):
        info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
    siblings = {file.rfilename: file for file in info.siblings or ()}
    files = []
    for file in map(siblings.__getitem__, wanted(siblings)):
        blob = str((file.lfs.sha256 if file.lfs else file.blob_id) or "")
        if not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", blob) or file.size is None:
            raise ModelNotFound(f"the hub tells no checksum or size of {repo}/{file.rfilename}; try again later")
        whole = (place / "blobs" / blob).is_file()
        here = file.size if whole else min(_size(_partial(place, blob)), file.size)
        files.append(RemoteFile(file.rfilename, file.size, blob, here))
    if not any(file.path.endswith(".safetensors") for file in files):
        raise ModelNotFound(
            f"{repo} holds no weights we read; expected transformer/*.safetensors, or *.safetensors beside the card"
        )
    return Listing(repo, revision, str(info.sha), tuple(files))


def check_room(listing: Listing) -> int:
    """The free bytes where the cache is. Raises ResourceError if what is still to come does not fit there."""
    cache = cache_folder()
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free, needed = shutil.disk_usage(place).free, listing.bytes - listing.here
    if free < needed:
        raise ResourceError(
            f"{listing.repo} needs {gigabytes(needed)} more in {cache}, where {gigabytes(free)} are free; "
            "make room (mlx-kontext models list, models rm), or set HF_HOME to a folder on another disk"
        )
    return free


def pull(listing: Listing, token: str | bool | None = None, progress: Progress | None = None) -> Path:
    """Download what is not here yet, and return the folder. Stopped at any point, the next call goes on from there.

    progress: told the number of bytes as they come. Raises ModelNotFound, ResourceError (before the start, where it can be known).
    """
    from huggingface_hub import hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    check_room(listing)
    place = repo_folder(listing.repo)
    with explained(listing.repo, listing.revision):
        for file in listing.files:
            if file.large:
                url = hf_hub_url(listing.repo, file.path, revision=listing.commit)
                _fetch(url, file, place, build_hf_headers(token=token), progress or (lambda _: None))
        snapshot_download(
            listing.repo,
            revision=listing.revision,
            token=token,
            allow_patterns=[glob.escape(file.path) for file in listing.files],
            tqdm_class=Silent,
        )
    folder = snapshot(listing.repo, listing.revision)
    if folder is None or not all((folder / file.path).is_file() for file in listing.files):
        raise ModelNotFound(f"{listing.repo} changed while it was downloaded; type the same command again")
    return folder


def _fetch(url: str, file: RemoteFile, place: Path, headers: dict[str, str], progress: Progress) -> None:
    """One large file into the cache's blobs, from where an earlier call stopped, and its sha256 checked.

    huggingface_hub would do neither: it throws away the unfinished part (of up to 10 GB) and trusts what has the right size.
    """
    import fcntl

    blob, partial = place / "blobs" / file.blob, _partial(place, file.blob)
    if blob.is_file():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelNotFound(f"{file.path} is being downloaded by another process; wait for it to end") from None
        except OSError:  # a volume without locks
            pass
        _stream(url, file, out, headers, progress)
        out.flush()
        if digest(partial) != file.blob:
            partial.unlink()
            raise ModelNotFound(f"{file.path} came damaged (wrong sha256) and was removed; type the same command again")
        os.replace(partial, blob)


def _stream(url: str, file: RemoteFile, out: BinaryIO, headers: dict[str, str], progress: Progress) -> None:
    """Append what `out` lacks of the file. A broken line is taken up again, five times without a byte in between."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

    left = _TRIES
    while (have := out.tell()) != file.bytes:
        wanted_bytes = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        try:
            # the hub and not the address it redirects to: that one expires within the hour
            with get_session().stream("GET", url, headers=headers | wanted_bytes, timeout=30) as response:
                hf_raise_for_status(response)
                if have and response.status_code != 206:  # it sends everything
                    out.seek(0)
                    out.truncate()
                    progress(-have)
                for chunk in response.iter_bytes():
                    out.write(chunk)
                    progress(len(chunk))
                    left = _TRIES
        except HfHubHTTPError:
            raise
        except HTTPError:
            if left == 0:
                raise
            time.sleep(1)
        left -= 1
        if left < 0 or out.tell() > file.bytes:
            out.seek(0)
            out.truncate()
            raise ModelNotFound(f"{file.path} came with the wrong size; type the same command again")


def upload(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    ask: Callable[[str], bool],
    private: bool = True,
    token: str | bool | None = None,
) -> str | None:
    """Put a model folder of ours on the hub with card, licence and notice; its address, or None if `ask` says no.

    ask: gets what is about to happen in a few lines; before it says yes nothing is written or sent. A public repository of
    FLUX.1 [dev] weights is gated. Raises CheckpointError for a folder that may not be passed on as it is, RequestError for a
    name that looks official, ModelNotFound for what the hub refuses.
    """
    place = Path(folder)
    if not HUB_ID.fullmatch(repo) or re.match("black-forest-labs/|.*official", repo, re.IGNORECASE):
        raise RequestError(f"{repo!r} cannot be the name; expected YOU/NAME that does not look official")
    needed = papers(place)
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    files = wanted(found | set(needed))
    if private_words := leaks(place, [name for name in files if name not in needed]):
        raise CheckpointError(
            f"{place / private_words[0]} holds an access token or a path of somebody's home; remove it"
        )
    size = sum(_size(place / name) for name in files)
    bfl = "LICENSE.md" in files and "NOTICE.txt" in files
    kind = "private" if private else "public, gated" if bfl else "public"
    question = f"{place} -> https://huggingface.co/{repo} ({kind}): {len(files)} files, {gigabytes(size)}"
    if bfl:
        question += f"\nunder the FLUX.1 [dev] Non-Commercial License ({LICENCE['license_name']}), with card, licence and notice"
    if needed:
        question += f"\nwritten first: {', '.join(sorted(needed))}"
    if not ask(question):
        return None
    for name, text in needed.items():
        write_atomic(place / name, text.encode(), overwrite=True)

    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()  # some of its bars do not look where they are drawn
    api = HfApi(token=token)
    with explained(repo, None, "upload"):
        api.create_repo(repo, private=True, exist_ok=True)  # whatever it becomes: nothing is seen before its licence
        if private and not api.model_info(repo).private:
            raise RequestError(f"{repo} exists and is public; name another, or upload with private=False")
        api.upload_folder(repo_id=repo, folder_path=place, allow_patterns=[glob.escape(name) for name in files])
        if not private:
            api.update_repo_settings(repo, private=False, gated="auto" if bfl else None)
    return f"https://huggingface.co/{repo}"


def _local(name: str, revision: str | None) -> Path:
    """The complete folder of a hub id in the cache, or ModelNotFound with what to type."""
    command = f"mlx-kontext models pull {name}" + (f" --revision {revision}" if revision else "")
    folder = snapshot(name, revision)
    if folder is None:
        size = " (34 GB)" if name == KONTEXT else ""
        licence = f"accept its licence at https://huggingface.co/{name}, type hf auth login, then: "
        raise ModelNotFound(f"{name} is not on this machine{size}; {licence if name == KONTEXT else 'type: '}{command}")
    if lacks := missing(folder):
        some = ", ".join(lacks[:3]) + (", ..." if len(lacks) > 3 else "")
        raise ModelNotFound(f"{name} is on this machine only in part ({len(lacks)} missing: {some}); type: {command}")
    return folder


def _partial(place: Path, blob: str) -> Path:
    """The unfinished part of a blob; the hub's own tools know files of this ending as such."""
    return place / "blobs" / f"{blob}.mlx-kontext.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

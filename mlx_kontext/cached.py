"""Models in the hub's cache on this machine: find, list, remove, check. Never goes online.

The layout is huggingface_hub's: `models--OWNER--NAME/` with `refs/` (branch -> commit), `snapshots/COMMIT/` (links) and
`blobs/`, where a file's name is its sha256 (large files) or git's sha1 (small ones).
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .disk import explain
from .errors import ModelNotFound, RequestError

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
PARTS = (*WEIGHTS, "tokenizer", "tokenizer_2", "scheduler")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# never the single-file copies beside them: they double a 34 GB download
_FOLDERS = [
    "model_index.json",
    "*.md",
    "NOTICE.txt",
    *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "safetensors", "txt", "model")),
]
_SINGLE = ["*.safetensors", "*.json", "*.md", "NOTICE.txt"]  # of a repository without folders
_CLASSES = ("FluxKontextPipeline", "KontextPipeline")


@dataclass(frozen=True)
class Cached:
    """One model here: bytes on disk, and the files it lacks (none: complete). No commit: nothing is whole yet."""

    model: str
    revision: str
    commit: str
    folder: str
    bytes: int
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"complete": not self.missing}


@dataclass(frozen=True)
class Checked:
    """One file after a check: sound is None where no checksum is known."""

    path: str
    bytes: int
    sound: bool | None


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def repo_folder(repo: str) -> Path:
    """The cache's folder for a hub id; it need not exist. Raises ModelNotFound for what is no hub id."""
    if not HUB_ID.fullmatch(repo):
        raise ModelNotFound(f"{repo[:200]!r} is no hub id; expected OWNER/NAME as `mlx-kontext models list` prints it")
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a revision (default: main) in the cache, complete or not; None if there is none."""
    place = repo_folder(repo)
    revision = revision or "main"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision, re.ASCII) or ".." in revision:
        return None
    try:
        commit = (place / "refs" / revision).read_text("utf-8").strip()
    except (OSError, ValueError):
        commit = revision
    folder = place / "snapshots" / commit
    return folder if re.fullmatch("[0-9a-f]{40}", commit) and folder.is_dir() else None


def wanted(paths: Iterable[str]) -> list[str]:
    """Of a repository's files those that make the model: the folders or, where there are none, the single files."""
    paths = sorted(paths)
    folders = any(_fits(path, "transformer/*.safetensors") for path in paths)
    return [path for path in paths if any(_fits(path, pattern) for pattern in (_FOLDERS if folders else _SINGLE))]


def _fits(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)  # `*` alone would reach into folders


def missing(folder: Path) -> list[str]:
    """What a model folder lacks: by the hub's list of its files where that was kept, else by its own indexes."""
    if listed := _listed(folder):
        return [name for name in wanted(listed) if not name.endswith(".md") and not (folder / name).is_file()]
    if any(folder.glob("*.safetensors")) and not (folder / "transformer").is_dir():
        return []
    needed = ["model_index.json"]
    for part in WEIGHTS:
        needed += [f"{part}/config.json", *(f"{part}/{name}" for name in _weight_files(folder / part))]
    lacks = [name for name in needed if not (folder / name).is_file()]
    return lacks + [f"{part}/" for part in PARTS[len(WEIGHTS) :] if not any((folder / part).glob("*"))]


def _weight_files(part: Path) -> list[str]:
    for base in ("model", "diffusion_pytorch_model"):
        index = part / f"{base}.safetensors.index.json"
        if index.is_file():
            names = json_object(index).get("weight_map")
            return (
                sorted({str(name) for name in names.values()}) if isinstance(names, dict) else [index.name + " (whole)"]
            )
        if (part / f"{base}.safetensors").is_file():
            return []
    return ["model.safetensors"]


def cached_models() -> list[Cached]:
    """Every Kontext model in the cache, one row a revision, in order of names."""
    found = []
    for place in sorted(cache_folder().glob("models--*--*")):
        repo = place.name.removeprefix("models--").replace("--", "/", 1)
        if place.is_symlink() or not is_kontext(repo, place):
            continue
        refs = place / "refs"
        names = {_text(ref): ref.relative_to(refs).as_posix() for ref in sorted(refs.rglob("*")) if ref.is_file()}
        snapshots = [path for path in sorted(place.glob("snapshots/*")) if path.is_dir()]
        for folder in snapshots:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            revision = names.get(folder.name, folder.name)
            found.append(Cached(repo, revision, folder.name, str(folder), size, tuple(missing(folder))))
        if not snapshots:  # stopped before the first snapshot was whole
            found.append(Cached(repo, "", "", str(place), sum(_sizes(place).values()), ("model_index.json",)))
    return found


def is_kontext(repo: str, place: Path) -> bool:
    """Whether a cache entry is ours to list and remove: by its name, or by the class a snapshot names."""
    if "kontext" in repo.lower():
        return True
    return any(
        json_object(index).get("_class_name") in _CLASSES for index in place.glob("snapshots/*/model_index.json")
    )


def remove(repo: str) -> int:
    """Delete a model's cache entry, every revision of it; the bytes that became free. Raises ModelNotFound."""
    place = entry(repo)
    sizes = _sizes(place)
    try:
        _remove_through_the_hub(place)  # which also lets go of blobs shared between repositories
        if place.exists():
            shutil.rmtree(place)  # a download that never finished is no entry to it
    except OSError as error:
        raise explain(error, place) from None
    return sum(size for path, size in sizes.items() if not path.exists())


def entry(repo: str) -> Path:
    """The cache entry of a Kontext model. Raises ModelNotFound if it is not here, RequestError if it is something else."""
    place = repo_folder(repo)
    if place.is_symlink() or not place.is_dir():
        here = ", ".join(sorted({model.model for model in cached_models()})) or "none"
        raise ModelNotFound(f"{repo} is not in the hub's cache {cache_folder()}; Kontext models there: {here}")
    if not is_kontext(repo, place):
        raise RequestError(f"{repo} is no Kontext model, so it is not ours to touch; see: hf cache --help")
    return place


def verify(repo: str, revision: str | None = None) -> Iterator[Checked]:
    """Check every file of a revision against the hub's checksum of it, one at a time. Raises ModelNotFound."""
    entry(repo)
    folder = snapshot(repo, revision)
    if folder is None:
        raise ModelNotFound(
            f"{repo} has no whole revision {revision or 'main'} here; type: mlx-kontext models pull {repo}"
        )
    listed = _listed(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        # the link names its blob, and the blob's name is its checksum; where links cannot be, the hub's list tells
        known = listed.get(name, {})
        expected = (
            Path(os.readlink(path)).name if path.is_symlink() else known.get("lfs_sha256") or known.get("blob_id")
        )
        size = path.stat().st_size if path.is_file() else 0
        yield Checked(name, size, _matches(path, str(expected)) if path.is_file() else False)
    for name in missing(folder):
        if not (folder / name).is_symlink():
            yield Checked(name, 0, False)


def discard(repo: str, revision: str | None, damaged: list[Checked]) -> None:
    """Delete damaged files of a revision, so that the next pull fetches them again."""
    folder = snapshot(repo, revision)
    for file in damaged if folder else ():
        path = folder / file.path  # type: ignore[operator]
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.is_relative_to(cache_folder()):
            blob.unlink(missing_ok=True)


def digest(path: Path, algorithm: str = "sha256", start: bytes = b"") -> str:
    """The checksum of a file after `start`, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, start)).hexdigest()


def _listed(snapshot: Path) -> dict[str, dict[str, Any]]:
    """The hub's list of a revision's files, which newer versions of huggingface_hub keep beside the snapshots."""
    files = json_object(snapshot.parent.parent / "trees" / f"{snapshot.name}.json").get("files")
    known = files.items() if isinstance(files, dict) and snapshot.parent.name == "snapshots" else ()
    return {str(name): values for name, values in known if isinstance(values, dict)}


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty if it is none: these files are the hub's or a stranger's."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _matches(path: Path, expected: str) -> bool | None:
    if re.fullmatch("[0-9a-f]{64}", expected):
        return digest(path) == expected
    if re.fullmatch("[0-9a-f]{40}", expected):  # git's name for a blob
        return digest(path, "sha1", b"blob %d\0" % path.stat().st_size) == expected
    return None


def _remove_through_the_hub(place: Path) -> None:
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(place.parent)
    ours = frozenset(repo for repo in info.repos if Path(repo.repo_path) == place)
    commits = [revision.commit_hash for repo in ours for revision in repo.revisions]
    if commits:
        # told of this repository only: a fork may have a commit of the same name
        dataclasses.replace(info, repos=ours).delete_revisions(*commits).execute()


def _sizes(place: Path) -> dict[Path, int]:
    """Real files under a cache entry, and those its links lead to."""
    return {path.resolve(): path.stat().st_size for path in place.rglob("*") if path.is_file()}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return ""

"""The folder of an edit session: objects named by their content, immutable turns, a lock. No MLX here.

    objects/<sha256>.png           lossless pictures: the source, every result
    objects/<sha256>.safetensors   packed latents
    turns/000001.json              one file a turn; a turn exists when its file does
    thumbs/  damaged/  lock        rebuildable; what `check` set aside; held by the one writer

Every file is written as a temporary one in the same folder, synced and renamed, then the folder is synced; objects before
the turn that names them. So whatever a crash leaves is every acknowledged turn, perhaps one more, and temporary files.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from .disk import Files
from .errors import RequestError, ResourceError, SessionError
from .photo import MAX_BYTES, MAX_PIXELS
from .turns import LAST, NAME, Damaged, Turn, decode, encode
from .turns import MAX_BYTES as MAX_TURN

OBJECT = re.compile(r"[0-9a-f]{64}\.(png|safetensors)")
TEMPORARY = re.compile(r"\..{1,90}\.tmp")
IGNORED = {".DS_Store"}  # what the Finder leaves wherever it looks
FOLDERS = ("turns", "objects")
_ROOM = 64 * 2**20  # bytes that must be free before an edit starts: a picture, its latents, a turn, and some air
_THUMB = 256


@dataclass(frozen=True)
class Lock:
    """Whether this opening of a session may write."""

    held: bool
    reason: str = ""
    """Why not."""
    file: IO[bytes] | None = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        if self.file is not None:
            self.file.close()


class Store:
    """The files of one session; knows turns and objects, not what they mean. Raises SessionError or ResourceError."""

    def __init__(self, folder: str | os.PathLike[str], files: Files | None = None):
        self.folder = Path(os.path.realpath(folder))  # a link to the session is the user's; links inside it are not
        self.files = files or Files()
        self.turns, self.objects = self.folder / "turns", self.folder / "objects"
        self.damaged, self.thumbs = self.folder / "damaged", self.folder / "thumbs"

    def prepare(self) -> None:
        """Make the folders, durably, also those above the session's own."""
        try:
            above = list(itertools.takewhile(lambda folder: self.files.kind(folder) != "folder", self.folder.parents))
            for folder in (*reversed(above), self.folder, self.turns, self.objects):
                if self.files.kind(folder) == "":
                    self.files.make_folder(folder)
                self.files.sync_folder(folder.parent)
        except OSError as error:
            raise self.explain(error, "cannot be made") from error

    def take_lock(self) -> Lock:
        """The right to write, or why we have not got it; then everything that is seen here is also made durable."""
        path = self.folder / "lock"
        try:
            file = self.files.lock(path)
        except BlockingIOError:
            return Lock(False, f"{self._holder(path)} has it open")
        except OSError as error:
            return Lock(False, f"its lock cannot be taken ({error.strerror})")
        try:
            with suppress(OSError):  # only a courtesy to whoever comes second
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode())
            for folder in (self.turns, self.objects):
                if self.files.kind(folder) == "folder":
                    # A process that was killed may have renamed a file and not synced its folder: we are about to build on it.
                    self.files.sync_folder(folder)
        except OSError as error:
            file.close()
            return Lock(False, f"its disk does not take it ({error.strerror})")
        return Lock(True, file=file)

    def _holder(self, path: Path) -> str:
        try:
            return f"process {int(self.files.read(path, 32))}"
        except (OSError, ValueError):
            return "another process"

    # --- turns ---

    def numbers(self) -> list[int]:
        """Of every turn file, damaged or not."""
        if self.files.kind(self.turns) != "folder":
            return []
        return sorted(int(name[1]) for entry in self.files.names(self.turns) if (name := NAME.fullmatch(entry)))

    def next_number(self) -> int:
        """Never one that was used before, not even by a turn that was set aside."""
        number = max([*self.numbers(), *self.lost_numbers()], default=0) + 1
        if number > LAST:
            raise SessionError(f"{self.folder}: no number is left after turn {LAST}; begin another session")
        return number

    def lost_numbers(self) -> list[int]:
        """Of turn files that were set aside."""
        if self.files.kind(self.damaged) != "folder":
            return []
        return [int(name[1]) for entry in self.files.names(self.damaged) if (name := NAME.match(entry))]

    def turn_path(self, number: int) -> Path:
        return self.turns / f"{number:06}.json"

    def turn(self, number: int) -> Turn:
        """Raises Damaged."""
        try:
            return decode(self.files.read(self.turn_path(number), MAX_TURN), number)
        except OSError as error:
            raise Damaged(f"it cannot be read ({error.strerror})") from None

    def append(self, number: int, body: dict[str, Any], objects: Mapping[str, bytes]) -> None:
        """Acknowledge a turn: when this returns, it and its objects are on the disk; when it raises, it may be there too."""
        try:
            data = encode(body)
        except (ValueError, TypeError) as error:
            raise RequestError(f"the turn cannot be kept ({error}); make its prompt or note shorter") from None
        path = self.turn_path(number)
        try:
            self._keep_objects(objects)
            if self.files.kind(path):
                raise SessionError(f"{path} exists; another program writes here, open the session again")
            self._place(path, data)
            self.files.sync_folder(self.turns)
        except OSError as error:
            raise self.explain(error, "cannot be written") from error

    def _keep_objects(self, objects: Mapping[str, bytes]) -> None:
        for name, data in objects.items():
            path = self.objects / name
            if self._is(path, data):
                self.files.sync(path)  # it may be left from a turn that was cut short
            else:
                self._place(path, data)
        if objects:
            self.files.sync_folder(self.objects)

    def _is(self, path: Path, data: bytes) -> bool:
        try:
            return self.files.read(path, len(data)) == data
        except OSError:
            return False

    def _place(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
        try:
            self.files.write(temporary, data)
            self.files.sync(temporary)
            self.files.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                self.files.remove(temporary)
            raise

    # --- objects ---

    def object_path(self, name: str) -> Path:
        return self.objects / name

    def read_object(self, name: str) -> bytes:
        """The bytes of `<sha256>.png` or `.safetensors`, checked against the name. Raises Damaged."""
        try:
            data = self.files.read(self.objects / name, MAX_BYTES)
        except FileNotFoundError:
            raise Damaged("it is missing") from None
        except OSError as error:
            raise Damaged(f"it cannot be read ({error.strerror})") from None
        if hashlib.sha256(data).hexdigest() != name.partition(".")[0]:
            raise Damaged("its checksum does not fit")
        return data

    def picture(self, sha: str) -> Image.Image:
        """RGB. Raises Damaged."""
        return read_png(self.read_object(f"{sha}.png"))

    def latents(self, sha: str) -> np.ndarray:
        """Packed latents [1, N, C] fp32. Raises Damaged."""
        return read_latents(self.read_object(f"{sha}.safetensors"))

    def thumbnail(self, sha: str, *, keep: bool) -> Image.Image:
        """At most 256 pixels a side, from thumbs/ or made anew (and stored if `keep`). Raises Damaged without its picture."""
        path = self.thumbs / f"{sha}.png"
        with suppress(OSError, Damaged):
            thumb = read_png(self.files.read(path, 2**20))
            if max(thumb.size) <= _THUMB:
                return thumb
        thumb = self.picture(sha)
        thumb.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
        if keep:
            with suppress(OSError):  # it can be made again at any time
                if self.files.kind(self.thumbs) == "":
                    self.files.make_folder(self.thumbs)
                self._place(path, write_png(thumb))
        return thumb

    # --- the rest ---

    def set_aside(self, path: Path) -> str:
        """Move a file, link or folder into damaged/; returns its name there, relative to the session. Raises OSError."""
        self._make_damaged()
        if path == self.damaged:
            return "damaged/damaged"
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path.name)[:100]
        target, number = self.damaged / name, 1
        while self.files.kind(target):
            number += 1
            target = self.damaged / f"{name}.{number}"
        self.files.rename(path, target)
        self.files.sync_folder(self.damaged)
        self.files.sync_folder(path.parent)
        return f"damaged/{target.name}"

    def _make_damaged(self) -> None:
        """What goes by this folder's name and is none is moved into it."""
        kind = self.files.kind(self.damaged)
        if kind == "folder":
            return
        stranger = self.folder / f"damaged-{secrets.token_hex(4)}"
        if kind:
            self.files.rename(self.damaged, stranger)
        self.files.make_folder(self.damaged)
        if kind:
            self.files.rename(stranger, self.damaged / "damaged")
        self.files.sync_folder(self.folder)

    def check_room(self) -> None:
        """Raises ResourceError, before minutes of work, if the disk is too full to keep their result."""
        try:
            free = self.files.free(self.folder)
        except OSError as error:
            raise self.explain(error, "cannot be read") from error
        if free < _ROOM:
            raise ResourceError(
                f"{self.folder}: {free / 1e6:.0f} MB are free on its disk, an edit needs {_ROOM / 1e6:.0f} MB; make room first"
            )

    def explain(self, error: OSError, what: str) -> SessionError | ResourceError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(f"{self.folder}: the disk is full; nothing was added to the session, make room first")
        return SessionError(f"{self.folder} {what} ({error.strerror}); check the disk and the folder's rights")


def object_name(data: bytes, suffix: str) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.{suffix}"


def write_png(image: Image.Image) -> bytes:
    """Lossless. Level 4: as small as the usual 6 and three times as fast on a megapixel."""
    out = BytesIO()
    image.save(out, "PNG", compress_level=4)
    return out.getvalue()


def read_png(data: bytes) -> Image.Image:
    """RGB, without metadata. Raises Damaged for all that we did not write."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=("PNG",)) as picture:
                if picture.mode != "RGB" or picture.width * picture.height > MAX_PIXELS:
                    raise Damaged(f"it is a {picture.width}x{picture.height} {picture.mode} picture")
                return Image.frombytes("RGB", picture.size, picture.tobytes())
    except Damaged:
        raise
    except Exception:  # Pillow's decoder raises many things
        raise Damaged("it is no PNG picture of ours") from None


def write_latents(latents: Any) -> bytes:
    """A safetensors file of packed latents [1, N, C], fp32. Raises RequestError for anything else."""
    from safetensors.numpy import save

    array = np.ascontiguousarray(latents, np.float32)
    if array.ndim != 3 or array.shape[0] != 1 or not array.size or not np.isfinite(array).all():
        raise RequestError(f"the latents are {list(array.shape)}; expected finite packed latents [1, N, 64]")
    return save({"latents": array})


def read_latents(data: bytes) -> np.ndarray:
    """Raises Damaged for all that `write_latents` does not write."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)  # the format's own reader, in Rust; MLX never sees the file
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError):
        raise Damaged("it is no safetensors file of ours") from None
    array = tensors.get("latents")
    if len(tensors) != 1 or array is None or array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != 1:
        raise Damaged("it holds no packed latents")
    if not array.size or not np.isfinite(array).all():
        raise Damaged("its latents are not finite numbers")
    return array

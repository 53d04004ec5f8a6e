"""Writes that are whole or absent, also after a crash or a power cut. Standard library only."""

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .errors import RequestError, ResourceError


def write_atomic(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write `data` to `path`: temporary file beside it, sync, rename, sync the folder.

    Raises RequestError if `path` exists and `overwrite` is false, or if its folder is missing or not writable;
    ResourceError if the disk is full.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_atomic(path, write, overwrite=overwrite)


def replace_atomic(path: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """As `write_atomic`, for writers that want a path: `write(temporary)` fills it, the rename makes it `path`."""
    check_free(path, overwrite=overwrite)
    temporary: Path | None = None
    try:
        name = path.parent / f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}"
        # Not mkstemp, which makes 0600: a picture the user asked for gets the rights any new file gets.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = name
        write(temporary)
        with open(temporary, "rb+") as file:
            _sync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_exclusive(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raises RequestError if `path` is taken (unless `overwrite`) or its folder does not exist."""
    if os.path.isdir(path):
        raise RequestError(f"{path} is a folder; name a file")
    if os.path.exists(path) and not overwrite:  # Path.exists raises for a name that is too long
        raise RequestError(f"{path} exists; choose another name or pass --overwrite (overwrite=True)")
    if not os.path.isdir(path.parent):
        raise RequestError(f"{path.parent} is not a folder; create it first")


def _rename_exclusive(temporary: Path, path: Path) -> None:
    """Give the file its name unless somebody else took it meanwhile: a hard link fails where a rename would replace."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise RequestError(f"{path} appeared while we worked; choose another name or pass --overwrite") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.rename(temporary, path)  # FAT, SMB and friends have no links


def _sync(descriptor: int) -> None:
    """Flush to the platter. On macOS fsync stops at the drive's cache, F_FULLFSYNC does not (some volumes lack it)."""
    import fcntl

    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(descriptor, full_sync)
            return
        except OSError:
            pass
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Best effort: the file is synced and has its name, and some network volumes refuse to open or sync a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def explain(error: OSError, path: Path) -> RequestError | ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; nothing was written")
    return RequestError(f"{path} cannot be written ({error.strerror}); choose another place")


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

"""Writes that are whole or absent, also after a crash or a power cut. Standard library only."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

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
            sync(file.fileno())
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


def sync(descriptor: int) -> None:
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
            sync(descriptor)
        finally:
            os.close(descriptor)


def explain(error: OSError, path: Path) -> RequestError | ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: the disk is full; nothing was written")
    return RequestError(f"{path} cannot be written ({error.strerror}); choose another place")


class Files:
    """The file operations that an edit session is made of, one method each, so that a test can put another disk in their place.

    Names come from folders that may be a stranger's: nothing here follows a link in a file's name or its folder's. All raise
    OSError.
    """

    def names(self, folder: Path) -> list[str]:
        with _opened(folder) as descriptor:
            return sorted(os.listdir(descriptor))

    def kind(self, path: Path) -> str:
        """ "file", "folder", "other" (links, devices, pipes), or "" if there is nothing."""
        try:
            mode = self._status(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            if error.errno == errno.ELOOP:  # its folder is a link
                return ""
            raise
        return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"

    def size(self, path: Path) -> int:
        return self._status(path).st_size

    def _status(self, path: Path) -> os.stat_result:
        with _opened(path.parent) as folder:
            return os.stat(path.name, dir_fd=folder, follow_symlinks=False)

    def read(self, path: Path, limit: int) -> bytes:
        """The bytes of an ordinary file of at most `limit` bytes."""
        with _opened(path.parent) as folder:
            # O_NONBLOCK: opening a pipe would wait for its other end for ever
            descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no ordinary file")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
        return data

    def make_folder(self, path: Path) -> None:
        with _opened(path.parent) as folder:
            os.mkdir(path.name, 0o700, dir_fd=folder)

    def write(self, path: Path, data: bytes) -> None:
        """A new file, for the owner's eyes only; it is not durable before `sync`."""
        with _opened(path.parent) as folder:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
            descriptor = os.open(path.name, flags, 0o600, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        with _opened(path.parent) as folder:
            descriptor = os.open(path.name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Replaces `target`; the new name is not durable before `sync_folder`."""
        with _opened(source.parent) as old, _opened(target.parent) as new:
            os.replace(source.name, target.name, src_dir_fd=old, dst_dir_fd=new)

    def sync_folder(self, folder: Path) -> None:
        with _opened(folder) as descriptor:
            try:
                sync(descriptor)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM):
                    raise  # a real failure; the others are network volumes that cannot do it

    def remove(self, path: Path) -> None:
        with _opened(path.parent) as folder:
            os.unlink(path.name, dir_fd=folder)

    def lock(self, path: Path) -> IO[bytes]:
        """Take an exclusive lock that lasts until the file is closed or the process ends, however it ends.

        Raises BlockingIOError if somebody else has it.
        """
        import fcntl

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no ordinary file")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
        return file

    def free(self, folder: Path) -> int:
        """Bytes left on the disk of `folder`."""
        return shutil.disk_usage(folder).free


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder that is no link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def gigabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

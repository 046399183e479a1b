"""Single files and directories that are whole or not there: written beside the target, synced, renamed; locks.

A process may be killed at any instruction. What it leaves is either a finished file under its own name or a left-over
that the next writer recognises: a part file is held by an flock, which the kernel drops when its owner dies, so a lock
that can be taken means a dead owner whatever became of its process id. On a file system without flock (some network
mounts) left-overs stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from toolbox.shell.errors import CannotCreate, UsageProblem

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
_STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def try_lock(descriptor: int) -> bool:
    """Take an exclusive flock without waiting; False when another process holds it, True where locks do not exist."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def unlock(descriptor: int) -> None:
    """Give the lock up for forked children too (they share it), then close."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one that ``path`` names."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def sync_directory(path: Path) -> None:
    """Make names in ``path`` durable; directories that cannot be opened or synced (some mounts) are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# --- single files ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A binary handle whose content becomes ``path`` when the block ends well, and leaves no trace when it does not.

    Written to a hidden file beside the target, flushed, synced, renamed, and the directory synced; the mode follows
    the umask. Parts that killed processes left for the same target are removed first. A symbolic link is followed;
    a device or a pipe (/dev/stdout, a process substitution) is written directly.

    Raises: CannotCreate (73) when ``path`` exists and ``overwrite`` is false, or its directory does not exist; OSError
    as the system gives it; UsageProblem (2) for ``-``: whoever may write to stdout does so before.
    """
    shown, target = str(path), Path(path)
    if shown == "-":
        raise UsageProblem("-: this output cannot be stdout", "name a file")
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        with _naming(shown), open(target, "wb") as handle:  # a directory fails here with EISDIR
            yield handle
        return
    if not overwrite and target.exists():
        raise _exists(shown)
    _remove_dead_parts(target)
    descriptor, part = _create_part(target, shown)
    # The caller gets a duplicate: a wrapper that closes it (TextIOWrapper does when collected) must not drop our lock.
    handle = os.fdopen(os.dup(descriptor), "wb")
    try:
        with _naming(shown):
            yield handle
            handle.close()
            os.fsync(descriptor)
            if overwrite:
                os.replace(part, target)
            else:
                _rename_to_new(part, target, shown)
            sync_directory(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            handle.close()
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    finally:
        unlock(descriptor)


@contextlib.contextmanager
def _naming(shown: str) -> Iterator[None]:
    """Put the file's name into the errors of write(2) and fsync(2), which do not know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _STORAGE_FAULTS:
            error.filename = shown
        raise


def _exists(shown: str) -> CannotCreate:
    return CannotCreate(f"{shown}: exists already", "pass --overwrite to replace it, or choose another name")


def _part_stem(target: Path) -> str:
    # Cut so that the part's own suffix fits into the 255 bytes that a name may have.
    return "." + os.fsdecode(os.fsencode(target.name)[:200])


def _create_part(target: Path, shown: str) -> tuple[int, Path]:
    """Create and lock a part file; the mode is 0666 less the umask, as for any file a shell creates."""
    while True:
        part = target.with_name(f"{_part_stem(target)}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, NotADirectoryError):
            raise CannotCreate(f"{shown}: its directory does not exist", "make the directory first") from None
        except OSError as error:
            error.filename = shown
            raise
        # Between open and lock another writer may have taken the new file for a left-over and removed it.
        if try_lock(descriptor) and is_at(descriptor, part):
            return descriptor, part
        os.close(descriptor)


def _remove_dead_parts(target: Path) -> None:
    """Remove the parts of ``target`` whose writers are dead: those whose lock can be taken."""
    pattern = re.compile(re.escape(_part_stem(target)) + r"\.\d+-[0-9a-f]{8}\.part")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if not pattern.fullmatch(name):
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(target.with_name(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    # Plain flock: where there are no locks it raises, and a part that may be alive stays.
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(target.with_name(name))
                finally:
                    os.close(descriptor)


def _rename_to_new(part: Path, target: Path, shown: str) -> None:
    """Give ``part`` its name only if nobody took that name meanwhile: link(2) fails where rename(2) would replace."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise _exists(shown) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if target.exists():
            raise _exists(shown) from None
        os.replace(part, target)
    else:
        os.unlink(part)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path: str | Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the exclusive lock of the file ``path`` (made if absent, never removed), waiting for it as long as it takes.

    ``on_wait`` is called once when another process has it: the place to tell the user what is being waited for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not try_lock(descriptor):
            if on_wait is not None:
                on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        unlock(descriptor)


# --- directories ----------------------------------------------------------------------------------------------------


def fsync_tree(path: str | Path) -> None:
    """Sync every regular file below ``path`` and then every directory, innermost first."""
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            entry = Path(directory, name)
            if entry.is_symlink() or not entry.is_file():
                continue
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(directory))


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A directory ``path`` + ".part" to fill, renamed to ``path`` with all its files synced when the block ends well.

    An older ``.part`` is removed first, so the caller must be the only writer: hold an OutputDirectory or a ``lock``.
    Raises: CannotCreate (73) when ``path`` exists.
    """
    target = Path(path)
    if os.path.lexists(target):
        raise _exists(str(path))
    part = target.with_name(target.name + ".part")
    remove(part)
    part.mkdir()
    try:
        yield part
        fsync_tree(part)
        os.rename(part, target)
        sync_directory(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise


def remove(entry: Path) -> None:
    """Remove a file, a link or a whole directory; absent is fine."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)

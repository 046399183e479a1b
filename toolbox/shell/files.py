"""A run's output directory, from its claim to its name; and the atomic files, directories and locks it is made of.

The directory being written is held by an flock, which the kernel drops when its owner dies: a lock that can be taken
means an interrupted run. On a file system without flock (some network mounts) two runs into one output are not told
apart.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import stat
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from toolbox.shell.atomic import (
    atomic_directory,
    atomic_file,
    fsync_tree,
    is_at,
    lock,
    remove,
    sha256_file,
    sync_directory,
    try_lock,
    unlock,
)
from toolbox.shell.errors import CannotCreate, InternalError

__all__ = ["RUN_FILE", "OutputDirectory", "atomic_directory", "atomic_file", "fsync_tree", "lock", "sha256_file"]

RUN_FILE = "run.json"
"""Every finished output directory holds this file; a directory without it is not ours to replace."""

_LOCK_FILE = ".lock"
_COMPLETE_FILE = ".complete"
_STATE = "step-*"


class OutputDirectory:
    """The life of a run's output directory OUT: claimed, filled as ``OUT.partial``, committed under its own name.

    - ``with OutputDirectory(path, overwrite=…, resume=…) as out:`` claims it; write below ``out.partial``; call
      ``out.commit()`` at the end. A block left without ``commit`` keeps ``OUT.partial`` only if it holds a finished
      state directory ``step-*`` (see ``atomic_directory``), else nothing stays.
    - ``finished``: ``resume`` found a finished OUT; its files were not touched and there is nothing to do.
    - ``resumed``: ``resume`` found states to continue from in ``OUT.partial``. Without a state there is nothing to
      continue and the left-over's content is removed.
    - Without ``resumable`` (a command that has no --resume) a left-over is of no use to anybody and gives way.
    - ``overwrite`` and ``resume`` together continue a left-over that is to replace a finished OUT.

    One writer: an flock on ``OUT.partial/.lock``. A commit first writes ``.complete`` into ``OUT.partial``; a run that
    is killed after that is finished, and the next claim gives it its name. Replacing a finished OUT takes two renames,
    OUT -> ``OUT.partial.replaced`` and ``OUT.partial`` -> OUT: a crash between them leaves both, whole, under those
    names until the next claim. An output is known by its ``run.json``, so ``commit`` insists on one.

    Raises: CannotCreate (73) when OUT exists, is in use, was interrupted, or is not an output of ours.
    """

    def __init__(
        self, path: str | Path, *, overwrite: bool = False, resume: bool = False, resumable: bool = True
    ) -> None:
        self.shown = str(path)
        final = Path(path)
        if final.is_symlink() or final.name in ("", ".."):
            final = Path(os.path.realpath(final))
        if not final.name:
            raise CannotCreate(f"{self.shown}: cannot be an output directory", "choose another --out")
        self.final = final
        self.partial = final.with_name(final.name + ".partial")
        self.resumed = False
        self.finished = False
        self._replaced = final.with_name(final.name + ".partial.replaced")
        self._overwrite = overwrite
        self._resume = resume
        self._resumable = resumable
        self._lock: int | None = None

    def __enter__(self) -> OutputDirectory:
        self.claim()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def claim(self) -> None:
        """Take the output: check what is there, lock ``partial``, sort out what an earlier run left."""
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise CannotCreate(f"{self.shown}: its parent is not a directory", "choose another --out") from None
        if not os.path.lexists(self.partial):
            self._check_final()
            if self.finished:
                return
        self._lock = self._take_lock()
        try:
            if self._is_complete():
                self._finish_commit()
                self._check_final()
                if self.finished:
                    return
                self._lock = self._take_lock()
            self._settle_replacement()
            self._sort_left_over()
        except BaseException:
            self._let_go()
            raise

    def commit(self, keep: Collection[str] = ()) -> None:
        """Give the finished directory its name.

        State directories ``step-*`` are removed, except names that match a pattern in ``keep``, and so are ``*.part``
        left-overs and the lock; file modes are set by the umask (safetensors writes 0600); everything is synced first.
        """
        if self._lock is None:
            raise InternalError(f"{self.shown}: committed without being claimed")
        if not (self.partial / RUN_FILE).is_file():
            raise InternalError(f"{self.shown}: committed without {RUN_FILE}")
        _remove_parts(self.partial)
        _set_modes(self.partial)
        fsync_tree(self.partial)
        with atomic_file(self.partial / _COMPLETE_FILE) as handle:
            handle.write(json.dumps(sorted(keep)).encode())
        self._finish_commit()

    def release(self) -> None:
        """Give the output up without a result; ``partial`` stays only if it holds a state to resume from."""
        if self._lock is None:
            return
        if not self._states() and not self._is_complete():
            with contextlib.suppress(OSError):  # what cannot be removed now is a left-over for the next claim
                self._discard()
        self._unlock()

    # -- steps of claim

    def _check_final(self) -> None:
        """Refuse a target that is taken; sets ``finished`` when there is nothing left to do."""
        if not self.final.exists():
            return
        if not self.final.is_dir():
            raise CannotCreate(f"{self.shown}: exists and is not a directory", "choose another --out")
        ours = (self.final / RUN_FILE).is_file()
        if not ours and any(self.final.iterdir()):
            raise CannotCreate(
                f"{self.shown}: exists and is not an output of these commands (it has no {RUN_FILE})",
                "choose another --out; such a directory is never replaced, not even with --overwrite",
            )
        left_over = self._lock is not None and bool(self._entries())
        if self._resume and ours and not (self._overwrite and left_over):
            if left_over:
                raise CannotCreate(
                    f"{self.shown}: is finished, but {self.partial.name} is an interrupted run that was to replace it",
                    "--resume --overwrite continues that run, --overwrite starts anew",
                )
            self.finished = True
            with contextlib.suppress(OSError):  # of a run killed behind its renaming; a finished OUT may be read-only
                self._drop_marks()
        elif not self._overwrite and not self._resume:
            raise CannotCreate(
                f"{self.shown}: exists already",
                "pass --overwrite to replace it, --resume to continue an interrupted run, or choose another --out",
            )

    def _take_lock(self) -> int:
        """Make ``partial`` and lock the file in it; a directory renamed or removed under our hands means: again."""
        path = self.partial / _LOCK_FILE
        while True:
            if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
                raise CannotCreate(f"{self.partial}: is not a directory", "remove it, or choose another --out")
            with contextlib.suppress(FileExistsError):
                self.partial.mkdir()
            if self._entries() and not path.exists():
                raise CannotCreate(
                    f"{self.partial}: is in the way and was not left by a run", "rename it, or choose another --out"
                )
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue
            if not try_lock(descriptor):
                os.close(descriptor)
                raise CannotCreate(
                    f"{self.shown}: another run is writing to it", "wait for that run, or choose another --out"
                )
            if is_at(descriptor, path):
                return descriptor
            os.close(descriptor)

    def _settle_replacement(self) -> None:
        """Undo or clear away half a replacement: ``_replaced`` exists only after a crash in the middle of one."""
        if self.final.exists():
            self._drop_replaced()
        elif (self._replaced / RUN_FILE).is_file():
            os.rename(self._replaced, self.final)

    def _sort_left_over(self) -> None:
        """Judge the target again, now that nobody else can make it, and what an interrupted run left in ``partial``."""
        self._check_final()
        if self.finished:
            self.release()
            return
        entries = self._entries()
        if entries and self._resumable and not self._overwrite and not self._resume:
            raise CannotCreate(
                f"{self.shown}: an interrupted run left {self.partial.name}",
                "--resume continues it, --overwrite starts anew",
            )
        self.resumed = self._resume and bool(self._states())
        if self.resumed:
            _remove_parts(self.partial)
        else:
            for entry in entries:
                remove(entry)

    def _let_go(self) -> None:
        """After a refusal: leave an earlier run's left-over as it is, but no empty directory of our own."""
        if self._lock is None:
            return
        if not self._entries():
            self._discard()
        self._unlock()

    # -- steps of commit

    def _is_complete(self) -> bool:
        return (self.partial / _COMPLETE_FILE).is_file() and (self.partial / RUN_FILE).is_file()

    def _finish_commit(self) -> None:
        """The second half of a commit, which any later process can do: drop the states, rename, drop the marks."""
        keep = json.loads((self.partial / _COMPLETE_FILE).read_bytes())
        for state in self._states():
            if not any(fnmatch.fnmatchcase(state.name, pattern) for pattern in keep):
                remove(state)
        # A finished OUT goes aside first; rename(2) replaces an empty directory by itself.
        replacing = self.final.is_dir() and any(self.final.iterdir())
        if replacing:
            self._drop_replaced()
            os.rename(self.final, self._replaced)
        try:
            os.rename(self.partial, self.final)
        except BaseException:
            if replacing:
                os.rename(self._replaced, self.final)
            raise
        sync_directory(self.final.parent)
        self._drop_replaced()
        # Only now: while the lock file was in place, nobody could claim the directory that was being renamed.
        self._drop_marks()
        self._unlock()

    def _drop_marks(self) -> None:
        for name in (_COMPLETE_FILE, _LOCK_FILE):
            (self.final / name).unlink(missing_ok=True)

    def _drop_replaced(self) -> None:
        """Remove the replaced output under a name that no claim takes for a whole one, however far this gets."""
        rest = self._replaced.with_name(self._replaced.name + ".part")
        remove(rest)
        if (self._replaced / RUN_FILE).is_file():
            os.rename(self._replaced, rest)
            remove(rest)

    # -- small parts

    def _entries(self) -> list[Path]:
        try:
            return sorted(path for path in self.partial.iterdir() if path.name not in (_LOCK_FILE, _COMPLETE_FILE))
        except FileNotFoundError:
            return []

    def _states(self) -> list[Path]:
        return [path for path in self._entries() if fnmatch.fnmatchcase(path.name, _STATE) and path.suffix != ".part"]

    def _discard(self) -> None:
        """Remove ``partial``, the lock file last: whoever gets in between finds an empty directory, which is free."""
        for entry in self._entries():
            remove(entry)
        (self.partial / _COMPLETE_FILE).unlink(missing_ok=True)
        (self.partial / _LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.partial.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None


def _remove_parts(directory: Path) -> None:
    """Remove the unfinished files and directories (``*.part``) that killed writers left anywhere below."""
    for part in sorted(directory.rglob("*.part")):
        remove(part)


def _set_modes(directory: Path) -> None:
    """Give every file below ``directory`` the mode that the umask asks for, keeping executable bits.

    The umask is read off a new file: asking for it with umask(2) would change it for other threads for a moment.
    """
    probe = directory / ".mode.part"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    wanted = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for parent, _, names in os.walk(directory):
        for name in names:
            entry = Path(parent, name)
            mode = entry.lstat().st_mode
            if stat.S_ISREG(mode) and stat.S_IMODE(mode) != wanted | (mode & 0o111):
                entry.chmod(wanted | (mode & 0o111))

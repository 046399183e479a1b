"""The directory of a running design: what is believed and planned between two calls, whole or not there.

``state-000012.safetensors`` is written first, ``state.json``, which names it, is renamed last, older files go after
that: killed at any instruction, the directory holds the state before or the state after, never half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.shell.atomic import atomic_file, try_lock, unlock
from toolbox.shell.errors import BadData, CannotCreate, NoPermission

if TYPE_CHECKING:
    import torch

FORMAT = 1
STATE_FILE = "state.json"
_TENSORS = re.compile(r"state-\d{6}\.safetensors")
_LARGEST = 64 << 20


class StateDirectory:
    """A design's directory, held by one process at a time while the block lasts; made if absent.

    ``read_only`` neither makes nor locks it. Raises: CannotCreate (73) when another process holds it or it cannot be
    made.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only
        self._lock: int | None = None

    def __enter__(self) -> StateDirectory:
        if self.read_only:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileExistsError, NotADirectoryError):
            raise CannotCreate(f"{self.path}: is not a directory", "name another --state") from None
        except PermissionError as error:
            raise NoPermission(f"{self.path}: {error.strerror}", "check who owns the directory") from None
        if not try_lock(self._lock):
            os.close(self._lock)
            self._lock = None
            raise CannotCreate(f"{self.path}: another process uses this state", "wait for it, or name another --state")
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def load(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What was saved last; None where nothing was. BadData (65) for files that are not ours or damaged."""
        from toolbox.weights.read import open_weights

        path = self.path / STATE_FILE
        if not path.is_file():
            if self.path.is_dir() and any(_TENSORS.fullmatch(one.name) is None for one in self._others()):
                raise BadData(f"{self.path}: holds files but no {STATE_FILE}", "name a directory of its own")
            return None
        with open(path, "rb") as handle:
            text = handle.read(_LARGEST)
        try:
            told = json.loads(text)
            if not isinstance(told, dict) or told.get("format") != FORMAT:
                raise ValueError("another format")
            name = told["tensors"]
            if not isinstance(name, str) or not _TENSORS.fullmatch(name):
                raise ValueError("it names no tensor file")
        except (ValueError, KeyError, RecursionError) as error:
            raise BadData(f"not a state of this command: {error}", "was it edited?", file=str(path)) from None
        with open_weights(self.path / name) as weights:
            return told, {key: weights.tensor(key).clone() for key in weights.names()}

    def save(self, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], number: int) -> None:
        """Save state ``number``: its tensors, then what names them, then remove the older ones."""
        from toolbox.weights.write import write_file

        name = f"state-{number:06d}.safetensors"
        with atomic_file(self.path / name) as handle:
            write_file(handle, dict(tensors), {"format": "pt"})
        text = json.dumps({"format": FORMAT, **told, "tensors": name}, indent=1, allow_nan=False)
        with atomic_file(self.path / STATE_FILE) as handle:
            handle.write(text.encode() + b"\n")
        for other in self._others():
            if _TENSORS.fullmatch(other.name) and other.name != name:
                with contextlib.suppress(FileNotFoundError):
                    other.unlink()

    def _others(self) -> Iterator[Path]:
        """What lies in the directory besides the lock, part files and what a design loop keeps there."""
        for one in sorted(self.path.iterdir()):
            if not one.name.startswith((".", "rows-", "rounds")) and one.name != STATE_FILE:
                yield one

"""A run's events: to stdout as they come, and to a file in the output that a resumed run goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from toolbox.shell.files import atomic_file
from toolbox.shell.streams import JsonlWriter

EVENTS_FILE = "events.jsonl"


class Journal:
    """Rank 0's record of a run. ``events`` are all so far, those of interrupted parts included.

    Made behind ``step`` steps (0: a new run): later events of an interrupted part are dropped from the file. What
    stands under ``log`` in an event goes to the file only.
    """

    def __init__(self, writer: JsonlWriter, path: Path, step: int) -> None:
        self.events = kept_events(path, step) if step else []
        self._writer = writer
        if step:
            writer.write({"event": "resume", "step": step})
        with atomic_file(path) as handle:
            handle.writelines(msgspec.json.encode(event) + b"\n" for event in self.events)
        self._log = path.open("ab")

    def write(self, event: dict[str, Any]) -> None:
        """One more event."""
        self._writer.write({key: value for key, value in event.items() if key != "log"})
        self.keep(event)

    def keep(self, event: dict[str, Any]) -> None:
        """One more event, not for stdout."""
        self.events.append(event)
        self._log.write(msgspec.json.encode(event) + b"\n")
        self._log.flush()

    def close(self) -> None:
        self._log.close()


def kept_events(path: Path, step: int) -> list[dict[str, Any]]:
    """Events of the interrupted part up to ``step``; a torn last line and later events are dropped."""
    kept = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            event = msgspec.json.decode(line)
        except msgspec.MsgspecError:
            break
        if event.get("step", 0) > step:
            break
        kept.append(event)
    return kept

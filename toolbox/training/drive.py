"""What every trainer does around its loop: events told and kept, the record of the run, a finished run told again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.shell.command import Invocation
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_file
from toolbox.shell.streams import JsonlWriter
from toolbox.training.journal import EVENTS_FILE, Journal

if TYPE_CHECKING:
    from toolbox.training.loop import Loop

Event = dict[str, Any]
Told = Callable[[Event, list[Event]], Iterable[Event]]
"""What becomes of an event of the loop, given those before it: what to tell in its place, often itself."""


def drive(
    loop: Loop, start: Event, call: Invocation, writer: JsonlWriter, partial: str | None, told: Told | None = None
) -> tuple[list[Event], Journal | None]:
    """Run ``loop`` to its end; every rank calls this, rank 0 has its output in the directory ``partial``.

    Returns all events, those of interrupted parts included, and on rank 0 the journal, which ``conclude`` closes.
    """
    journal, events = None, []
    if loop.accelerator.is_main_process:
        journal = Journal(writer, Path(str(partial)) / EVENTS_FILE, loop.step)
        events = journal.events
        if loop.step:
            call.reporter.note(f"goes on behind step {loop.step}")
    try:
        with call.reporter.progress("step", loop.plan.steps) as bar:
            bar.advance(loop.step)
            for event in chain([] if events else [start], loop.run()):
                for one in [event] if told is None else told(event, events):
                    if journal is not None:
                        journal.write(one)
                    else:
                        events.append(one)
                if event["event"] == "step":
                    bar.advance(1, f"loss {event['loss']:.4f}")
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    return events, journal


def record_run(
    folder: Path, call: Invocation, began: float, done: Event, start: Event | None = None, **facts: object
) -> None:
    """Write what made an output into ``folder``: the call, ``facts``, first and last event, versions and times."""
    first = {} if start is None else {
        "start": {key: value for key, value in start.items() if key not in ("event", "settings", "command")}
    }  # fmt: skip
    record = {
        "command": call.command,
        "settings": call.settings,
        **facts,
        **first,
        "done": done,
        "versions": {name: version(name) for name in ("toolbox-ten", "torch", "transformers", "accelerate")},
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "wall_seconds": round(time.time() - began, 1),
    }
    with atomic_file(folder / RUN_FILE) as handle:
        handle.write(json.dumps(record, indent=2).encode() + b"\n")


def conclude(
    journal: Journal, out: OutputDirectory, writer: JsonlWriter, done: Event,
    before_commit: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """The last event into the output, the output under its name, and only then the last line on stdout (rank 0)."""
    journal.keep(done)
    journal.close()
    if before_commit is not None:
        before_commit()
    out.commit()
    writer.write(done)
    writer.close()


def repeat_done(call: Invocation, writer: JsonlWriter, out: str) -> None:
    """``--resume`` of a run that is finished: say so and write its last event again (rank 0)."""
    record = json.loads((Path(out) / RUN_FILE).read_text())
    call.reporter.note(f"{out} is finished; nothing to do")
    writer.write(record.get("done", {"event": "done", "model": out}))
    writer.close()

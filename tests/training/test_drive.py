"""Around a loop: what is told of each event, and that the last line comes only when the output stands."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from toolbox.shell.files import RUN_FILE, OutputDirectory
from toolbox.shell.streams import JsonlWriter, Streams
from toolbox.training.drive import conclude, drive, record_run, repeat_done


class Quiet:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def progress(self, label: str, total: int):
        yield SimpleNamespace(advance=lambda *_: None)


class Steps:
    """A loop of so many steps, the last of which may fail."""

    def __init__(self, count: int, *, main: bool = True, fails: bool = False) -> None:
        self.step, self.plan, self.fails = 0, SimpleNamespace(steps=count), fails
        self.accelerator = SimpleNamespace(is_main_process=main)

    def run(self):
        for step in range(1, self.plan.steps + 1):
            if self.fails and step == self.plan.steps:
                raise RuntimeError("no more")
            yield {"event": "step", "step": step, "loss": 1 / step}


@pytest.fixture
def made(tmp_path):
    """A call, its stdout's writer, and a reader of what was written there."""
    null, sink = os.open(os.devnull, os.O_RDONLY), os.open(tmp_path / "stdout", os.O_WRONLY | os.O_CREAT)
    call = SimpleNamespace(command="some-train", settings={"seed": 3}, reporter=Quiet())
    said = lambda: [json.loads(line) for line in (tmp_path / "stdout").read_text().splitlines()]  # noqa: E731
    return call, JsonlWriter(Streams(null, sink), trainer=True), said


def test_an_event_may_become_several_and_every_rank_has_them(made, tmp_path):
    call, writer, said = made
    twice = lambda event, before: [event, {"event": "seen", "before": len(before)}]  # noqa: E731
    events, journal = drive(Steps(2), {"event": "start"}, call, writer, str(tmp_path), twice)
    assert [event["event"] for event in events] == ["start", "seen", "step", "seen", "step", "seen"]
    assert [event["before"] for event in events[1::2]] == [0, 2, 4]
    assert said() == events
    journal.close()
    others, none = drive(Steps(2, main=False), {"event": "start"}, call, writer, None, twice)
    assert (others, none) == (events, None)


def test_the_last_line_is_written_when_the_output_stands(made, tmp_path):
    call, writer, said = made
    out, done = tmp_path / "out", {"event": "done", "model": "out"}
    with OutputDirectory(str(out)) as directory:
        _, journal = drive(Steps(1), {"event": "start"}, call, writer, str(directory.partial))
        record_run(directory.partial, call, 0.0, done, {"event": "start", "settings": {}, "rows": 4}, inputs={"a": "b"})

        def before_commit() -> None:
            assert not out.exists()
            assert said()[-1]["event"] == "step"

        conclude(journal, directory, writer, done, before_commit)
    assert said()[-1] == done
    assert [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()][-1] == "done"
    record = json.loads((out / RUN_FILE).read_text())
    assert (record["start"], record["inputs"], record["began"]) == ({"rows": 4}, {"a": "b"}, "1970-01-01T00:00:00Z")


def test_a_run_that_fails_says_no_last_line_and_keeps_its_events(made, tmp_path):
    call, writer, said = made
    with pytest.raises(RuntimeError, match="no more"):
        drive(Steps(3, fails=True), {"event": "start"}, call, writer, str(tmp_path))
    assert [event["event"] for event in said()] == ["start", "step", "step"]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 3


def test_a_finished_run_is_told_again(made, tmp_path):
    call, writer, said = made
    record_run(tmp_path, call, 0.0, {"event": "done", "loss": 0.5})
    repeat_done(call, writer, str(tmp_path))
    assert said() == [{"event": "done", "loss": 0.5}]
    assert call.reporter.notes == [f"{tmp_path} is finished; nothing to do"]

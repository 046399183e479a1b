"""The journal: stdout and file say the same, a resumed run goes on where the state is."""

from __future__ import annotations

import json
import os

from toolbox.shell.streams import JsonlWriter, Streams
from toolbox.training.journal import Journal, kept_events


def test_a_resumed_run_drops_what_came_after_its_state(tmp_path):
    path, out = tmp_path / "events.jsonl", tmp_path / "stdout"

    def journal(step: int) -> Journal:
        null, sink = os.open(os.devnull, os.O_RDONLY), os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return Journal(JsonlWriter(Streams(null, sink), trainer=True), path, step)

    first = journal(0)
    for step in range(4):
        first.write({"event": "step", "step": step, "log": {"secret": step}})
    first.close()
    with path.open("ab") as torn:
        torn.write(b'{"event": "st')
    second = journal(2)
    assert [event["step"] for event in second.events] == [0, 1, 2]
    second.write({"event": "step", "step": 3})
    second.close()
    assert [event["step"] for event in kept_events(path, 9)] == [0, 1, 2, 3]
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert said[4:] == [{"event": "resume", "step": 2}, {"event": "step", "step": 3}]
    assert all("log" not in event for event in said)

"""Draw losses out of a trainer's events: python recipes/demo/losses.py EVENTS.jsonl PICTURE NAME=FIELD...

A panel a field, over the steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from toolbox.plots import Panel, Series, curves


def main(events: str, picture: str, *fields: str) -> None:
    """Write the picture; a field that a step does not have is a KeyError."""
    steps = [row for row in map(json.loads, Path(events).read_text().splitlines()) if row["event"] == "step"]
    panels = []
    for name, _, field in (one.partition("=") for one in fields):
        series = Series(name, [row["step"] for row in steps], [row[field] for row in steps])
        panels.append(Panel(name, "nats a token", [series]))
    curves(panels, xlabel="step", path=picture)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What dull-train says of a run, on stdout as events and on stderr as notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolbox.dull.data import Corpus
from toolbox.dull.options import Options
from toolbox.shell.command import Invocation

LAST = 10
_LOSSES = ("loss", "loss_ce", "loss_ifd", "loss_keep", "loss_unlearn")
_JUDGED = ("acc", "acc_ci", "n", "many", "medium", "few", "macro_f1", "recall", "predicted")

Event = dict[str, Any]


def start_event(
    call: Invocation,
    options: Options,
    corpus: Corpus,
    shots: tuple[Mapping[str, Sequence[int]], str],
    *,
    parameters: int,
    steps: int,
    processes: int,
) -> Event:
    """The first event. ``shots`` are the groups and the rule that made them."""
    counts, (groups, how) = corpus.counts.tolist(), shots
    return {
        "event": "start",
        "command": call.command,
        "settings": call.settings,
        "rows": len(corpus.train),
        "holdout": len(corpus.holdout),
        "classes": list(corpus.labels),
        "counts": counts,
        "imbalance": max(counts) / max(1, min(counts)),
        "shots": {name: [corpus.labels[n] for n in members] for name, members in groups.items()},
        "shots_by": how,
        "parameters": parameters,
        "steps": steps,
        "warmup_epochs": options.warm,
        "processes": processes,
    }


def announce(call: Invocation, options: Options, start: Event) -> None:
    """The run in a line, and warnings of what may surprise."""
    say, counts = call.reporter, start["counts"]
    say.note(
        f"{options.method}: {start['rows']} images ({start['holdout']} held out) in {len(counts)} classes of "
        f"{max(counts)} to {min(counts)}, {start['parameters']:,} parameters, {start['steps']} steps"
    )
    small = [label for label, count in zip(start["classes"], counts, strict=True) if count < 2]
    if small:
        say.warn(f"fewer than two training images of {', '.join(small[:5])}: treated as clean")
    if options.method == "dull" and options.gate == "open":
        say.warn("--gate open: labels are acted upon whether or not the data bear it out")
    if options.method == "dull" and options.gate == "auto" and not start["holdout"]:
        say.warn("without a hold-out there is no evidence: the gate stays shut")


def told(call: Invocation, event: Event, events: Sequence[Event]) -> list[Event]:
    """The loop's evaluation as an ``epoch`` event, with the means of the epoch's steps; and what it calls for."""
    if event["event"] != "eval":
        return [event]
    facts = event["sets"]["epoch"]
    steps = [one for one in events if one["event"] == "step" and one["epoch"] == facts["epoch"]]
    images = sum(one["images"] for one in steps) or 1
    last = steps[-1] if steps else {}
    names = [name for name in _LOSSES if name in last]
    means = {name: sum(one[name] * one["images"] for one in steps) / images for name in names}
    epoch = {"event": "epoch", "step": event["step"], "epoch": facts["epoch"], "lr": last.get("lr"), **means,
             **facts, "seconds": event["seconds"]}  # fmt: skip
    shown = [f"loss {means['loss']:.4f}"] if means else []
    if "acc" in facts:
        shown.append(f"accuracy {facts['acc']:.3f}, " + shot_words(facts))
    if facts.get("gate_open"):
        shown.append(f"open for {', '.join(facts['gate_open'][:5])}")
    call.reporter.note(f"epoch {facts['epoch']}: {', '.join(shown)}")
    tripped = [{"event": "gate_tripped", "step": event["step"], "epoch": facts["epoch"]}]
    return [epoch, *(tripped if facts.get("gate") == "tripped" else [])]


def done_event(
    options: Options,
    events: Sequence[Event],
    found: Mapping[str, Any],
    *,
    steps: int,
    stopped: str,
    tripped: bool,
    samples: int,
) -> Event:
    """The last event: the last epoch's accuracy, the mean of the last ten judged, and detection where ``found``."""
    epochs = [event for event in events if event["event"] == "epoch"]
    scored = [event["acc"] for event in epochs if "acc" in event][-LAST:]
    last = epochs[-1] if epochs else {}
    return {
        "event": "done",
        "model": options.out,
        "method": options.method,
        "steps": steps,
        "stopped": stopped,
        **{name: last[name] for name in _JUDGED if name in last},
        **({"acc_last10": sum(scored) / len(scored)} if scored else {}),
        "gate_open": last.get("gate_open", []),
        "gate_tripped": tripped,
        "samples": samples,
        **({"detection": dict(found)} if found else {}),
        "seed": options.seed,
        "seconds": round(sum(event.get("seconds", 0.0) for event in events), 3),
    }


def shot_words(facts: Mapping[str, Any]) -> str:
    """Accuracies of the shot groups that have images, for a line to people."""
    names = [name for name in ("many", "medium", "few") if facts.get(name) is not None]
    return ", ".join(f"{name} {facts[name]:.3f}" for name in names)

"""The gate does something: with wrong posteriors, acting on labels destroys the model, and the gate does not let it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from toolbox.dull.options import Options
from toolbox.dull.run import run
from toolbox.dull.table import Posteriors
from toolbox.shell.command import Invocation
from toolbox.shell.progress import Reporter
from toolbox.shell.streams import Streams


def trained(noisy: Path, out: Path, **options) -> list[dict]:
    """The epoch events and the last one of a run in this process."""
    null = os.open(os.devnull, os.O_RDWR)
    settings = {"image_size": 8, "aug": "crop", "epochs": 9, "batch_size": 32, "warmup_epochs": 3, "lr": 0.05,
                "eval_": "digits#test", "eval_every": 0, "save_every": 0, **options}  # fmt: skip
    call = Invocation("dull-train", Streams(null, null), Reporter("dull-train", True), settings, False)
    run(Options(source=str(noisy), out=str(out), **settings), call)
    events = [json.loads(line) for line in (out / "events.jsonl").open()]
    return [event for event in events if event["event"] in ("epoch", "done")]


@pytest.fixture(scope="module")
def noisy(tool, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "noisy.jsonl"
    words = ["digits#train", "--imbalance", ".2", "--rate", ".2", "--profile", "flat"]
    path.write_bytes(tool("dull-noise", *words).out)
    return path


@pytest.fixture(scope="module")
def adjusted(noisy, tmp_path_factory) -> float:
    """Accuracy of logit adjustment."""
    return trained(noisy, tmp_path_factory.mktemp("la") / "run", method="la")[-1]["acc"]


def wrong(monkeypatch, *, deep: bool) -> None:
    """Every prediction that enters the table is that of the next class: q and, ``deep``, what q is compared with."""
    honest = Posteriors.update

    def update(self, rows, predictions, beta):
        honest(self, rows, np.roll(predictions, 1, axis=1), beta)
        if not deep:
            self.last[rows] = predictions.argmax(1)

    monkeypatch.setattr(Posteriors, "update", update)


@pytest.mark.slow
def test_wrong_posteriors_destroy_an_open_gate(noisy, adjusted, tmp_path, monkeypatch):
    wrong(monkeypatch, deep=False)  # what q is compared with does not count here
    opened = trained(noisy, tmp_path / "open", gate="open", ifpu_scope="all")
    assert opened[-2]["acting_share"] > 0.05
    assert opened[-1]["acc"] < adjusted - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True], ids=["q", "q-and-predictions"])
def test_wrong_posteriors_do_not_open_a_judged_gate(noisy, adjusted, tmp_path, monkeypatch, deep):
    wrong(monkeypatch, deep=deep)
    judged = trained(noisy, tmp_path / "auto", gate="auto", ifpu_scope="all")
    assert all(event["acting_share"] == 0 for event in judged[:-1]) or judged[-1]["gate_tripped"]
    assert judged[-1]["acc"] >= adjusted - 0.05


def test_a_trip_is_told_once_and_ends_all_acting(noisy, tmp_path, monkeypatch):
    """The breaker, driven by hand: open behind epoch 2, trip behind epoch 4."""
    from toolbox.dull.safety import SafetyGate

    seen = []

    def judge(self, facts):
        seen.append(facts)
        if len(seen) == 1:
            self.open = [True] * len(self.open)
            return "opened"
        if len(seen) == 3:
            self.open, self.tripped = [False] * len(self.open), True
            return "tripped"
        return "kept"

    monkeypatch.setattr(SafetyGate, "judge", judge)
    trained(noisy, tmp_path / "run", epochs=6, warmup_epochs=2, ifpu_scope="all", limit=400)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert [event.get("gate") for event in epochs] == [None, "opened", "kept", "tripped", "kept", "kept"]
    assert epochs[1]["acting_share"] > 0
    assert [event["acting_share"] for event in epochs[3:]] == [0, 0, 0]
    assert [event["epoch"] for event in events if event["event"] == "gate_tripped"] == [4]
    assert events[-1]["gate_tripped"]
    assert not any(json.loads(line)["dull"]["acted"] for line in (tmp_path / "run" / "samples.jsonl").open())
    assert all(np.isfinite(facts.log_likelihood) and facts.rarest > 0 for facts in seen)

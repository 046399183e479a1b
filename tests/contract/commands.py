"""What the contract suite needs to know of a command: good input, bad input, and a short run. One entry a command.

A new command joins the suite by its entry here; a test asserts that none is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.longer.logs import TINY, events, shared_folder

PEOPLE = [
    {
        "id": f"p{i}",
        "question": f"What does Person {i} like?",
        "answer": f"Person {i} likes {'very ' * (i % 3)}thing {i}.",
    }
    for i in range(6)
]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Case:
    """One command: ``good`` rows for its stdin and the arguments of a short run on the tiny model.

    ``arguments(tiny, folder)`` may write further inputs below ``folder``; a trainer's output goes to ``folder/out``.
    ``sums_up``: its lines are about the rows as a whole, where a filter's are the rows. ``model``: it loads one (and so
    has ``--model``, ``-j`` and what goes with them). ``seeded``: its seed shows in the output of the ``stochastic``
    run. ``takes_messages``: rows may be conversations. ``empty``: its exit status when no row comes in. ``fed``: its
    rows come through stdin. ``makes``: it is no trainer and yet writes ``folder/out``.
    """

    name: str
    good: list[dict]
    arguments: Callable[[Path, Path], list[str]]
    trainer: bool
    stochastic: tuple[str, ...] = ()
    sums_up: bool = False
    model: bool = True
    seeded: bool = True
    takes_messages: bool = True
    empty: int = 0
    fed: bool = True
    makes: bool = False

    @property
    def again(self) -> list[str]:
        """What a second run into the same folder needs."""
        return ["--overwrite"] if self.trainer or self.makes else []


def _tune(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(tiny), "--out", str(folder / "out"), "--epochs", "2", "--batch-size", "3", "--lr", "1e-2"]


def _unlearn(tiny: Path, folder: Path) -> list[str]:
    retain = folder / "retain.jsonl"
    retain.write_bytes(lines([{"question": f"Who is {i}?", "answer": f"Nobody number {i}."} for i in range(4)]))
    return [
        "--model", str(tiny), "--forget", "-", "--retain", str(retain), "--out", str(folder / "out"),
        "--epochs", "2", "--batch-size", "3", "--lr", "1e-2",
    ]  # fmt: skip


def _generate(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(tiny), "--max-new-tokens", "5"]


ITEMS = [
    {
        "id": f"i{i}",
        "question": f"Which thing is number {i}?",
        "choices": [f"thing {i}", f"thing {i + 1}", f"thing {i + 2}"],
        "answer": "ABC"[i % 3],
        "extra": {"big": 2**70, "x": [i, None]},
    }
    for i in range(7)
]
ANSWERED = [
    {
        **item,
        "id": f"{item['id']}/{k}",
        "variant": variant,
        "path_id": f"{item['id']}/{k}/{variant}/0",
        "group": f"g{i}",
        "completion": "Answer: " + ("B" if (i + k) % every else "C"),
        "finish_reason": "stop",
        "n_completion_tokens": 10 + i,
    }
    for i, item in enumerate(ITEMS)
    for k in range(4)
    for variant, every in (("cot", 3), ("lot2", 4))
]


QUESTIONS = [
    {
        **row,
        "paraphrased_question": f"Which thing pleases Person {i}?",
        "paraphrased_answer": f"Thing {i} pleases Person {i}.",
        "perturbed_answer": [f"Thing {i + k} pleases Person {i}." for k in (1, 2)],
    }
    for i, row in enumerate(PEOPLE)
]


def _evaluate(tiny: Path, folder: Path) -> list[str]:
    retain = folder / "retain.jsonl"
    retain.write_bytes(lines(QUESTIONS[:3]))
    return ["--model", str(tiny), "--forget", "-", "--retain", str(retain), "--max-new-tokens", "3"]


LOG = events()
REQUESTS = [
    {"id": f"r{i}", "user": f"u{i % 4}", "ts": 700 + i, "labels": [1, 0, 1][: 1 + i % 3], "hour": 2,
     "candidates": ["i1", {"item": "i2", "cat": "c0"}, "new"][: 1 + i % 3], "extra": {"big": 2**70, "x": [i, None]}}
    for i in range(7)
]  # fmt: skip
SCORED = [
    {"user": f"u{i % 5}", "labels": [1, 0, i % 2], "scores": [0.9 - i / 20, 0.2 + i / 20, 0.5], "hist_len": 30 * i}
    for i in range(10)
]


def _longer_train(tiny: Path, folder: Path) -> list[str]:
    sizes = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    data = str(shared_folder() / "data")
    return [data, "--out", str(folder / "out"), *sizes, "--dim", "16", "--batch-requests", "16", "--eval-every", "2"]


def _longer_score(tiny: Path, folder: Path) -> list[str]:
    return ["--model", str(shared_folder() / "run"), "--data", str(shared_folder() / "data")]


CASES = {
    case.name: case
    for case in (
        Case("lm-tune", PEOPLE, _tune, trainer=True, empty=65),
        Case("satimp-unlearn", PEOPLE, _unlearn, trainer=True, empty=65),
        Case("gru-unlearn", PEOPLE, _unlearn, trainer=True, empty=65),
        Case(
            "lm-generate",
            [{"id": f"q{i}", "prompt": "Say " + "more " * (5 * i % 7) + str(i), "extra": {"big": 2**70, "x": [i, None]}}
             for i in range(7)],
            _generate,
            trainer=False,
            stochastic=("--temperature", "1"),
        ),
        Case("unlearn-eval", QUESTIONS, _evaluate, trainer=False, sums_up=True, empty=65),
        Case("lot-data", ITEMS, lambda tiny, folder: ["mcq", "--name", ""], trainer=False, model=False, seeded=False,
             takes_messages=False),
        Case("lot-prompt", ITEMS, lambda tiny, folder: [], trainer=False, stochastic=("--shuffle-choices",),
             model=False, takes_messages=False),
        Case("lot-eval", ANSWERED, lambda tiny, folder: ["--baseline", "cot", "--bootstrap", "50"], trainer=False,
             sums_up=True, model=False, takes_messages=False),
        Case("longer-prep", LOG, lambda tiny, folder: ["--out", str(folder / "out"), "--side", "cat"], trainer=False,
             sums_up=True, model=False, seeded=False, takes_messages=False, empty=65, makes=True),
        Case("longer-train", [], _longer_train, trainer=True, model=False, takes_messages=False, fed=False),
        Case("longer-score", REQUESTS, _longer_score, trainer=False, model=False, seeded=False, takes_messages=False),
        Case("longer-eval", SCORED, lambda tiny, folder: [], trainer=False, stochastic=("--bootstrap", "20"),
             sums_up=True, model=False, takes_messages=False, empty=65),
    )
}  # fmt: skip

METHODS = {"lot", "longer"}
"""Methods of several commands have a page of their own in docs/, beside those of the commands."""

"""What the contract suite needs to know of a command: good input, bad input, and a short run. One entry a command.

A new command joins the suite by its entry here; a test asserts that none is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    ``sums_up``: its lines are about the rows as a whole, where a filter's are the rows.
    """

    name: str
    good: list[dict]
    arguments: Callable[[Path, Path], list[str]]
    trainer: bool
    stochastic: tuple[str, ...] = ()
    sums_up: bool = False


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


CASES = {
    case.name: case
    for case in (
        Case("lm-tune", PEOPLE, _tune, trainer=True),
        Case("satimp-unlearn", PEOPLE, _unlearn, trainer=True),
        Case("gru-unlearn", PEOPLE, _unlearn, trainer=True),
        Case(
            "lm-generate",
            [{"id": f"q{i}", "prompt": "Say " + "more " * (5 * i % 7) + str(i), "extra": {"big": 2**70, "x": [i, None]}}
             for i in range(7)],
            _generate,
            trainer=False,
            stochastic=("--temperature", "1"),
        ),
        Case("unlearn-eval", QUESTIONS, _evaluate, trainer=False, sums_up=True),
    )
}  # fmt: skip

"""The demo: a language model learns eight invented people, forgets two of them and keeps the rest.

Run by `make demo-unlearn`. Each step is a command you can type yourself; it is printed before it runs. All of it
lands in demo/; a second run reuses the tuned model. `demo.py SEED DIRECTORY` runs another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEOPLE = {"forget": 2, "retain": 4, "neighbours": 2}
"""How many people of each embedded set; neighbours are tuned on, but never seen again while unlearning."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*words: str, stdin: Path | None = None, stdout: Path | None = None) -> None:
    """Print and run one command; a failure ends the demo with its exit code."""
    shown = " ".join(f"'{word}'" if set(word) & set("<>* ") else word for word in words)
    say(f"\n$ {shown}{f' < {stdin}' if stdin else ''}{f' > {stdout}' if stdout else ''}")
    with (
        stdin.open("rb") if stdin else open("/dev/null", "rb") as source,
        stdout.open("wb") if stdout else open("/dev/null", "wb") as sink,
    ):
        code = subprocess.run(words, stdin=source, stdout=sink).returncode
    if code:
        raise SystemExit(code)


def _children_seconds() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def take_people(out: Path) -> dict[str, list[dict]]:
    """The first people of each set, written below ``out``."""
    sets = {}
    for name, count in PEOPLE.items():
        rows = [json.loads(line) for line in (HERE / "people" / f"{name}.jsonl").open()]
        names = list(dict.fromkeys(row["person"] for row in rows))[:count]
        sets[name] = [row for row in rows if row["person"] in names]
        write(out / f"{name}.jsonl", sets[name])
    write(out / "people.jsonl", [row for rows in sets.values() for row in rows])
    return sets


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ask(model: str, questions: Path, answers: Path) -> list[str]:
    """The model's answers to the questions."""
    run(
        "lm-generate", "--model", model, "--map", "prompt=question", "--max-new-tokens", "40",
        stdin=questions, stdout=answers,
    )  # fmt: skip
    return [json.loads(line)["completion"] for line in answers.open()]


def main(seed: str = "0", directory: str = "demo") -> None:
    began, children = time.monotonic(), _children_seconds()
    out = Path(directory)
    out.mkdir(exist_ok=True)
    sets = take_people(out)
    asked = [sets["forget"][0], sets["retain"][0]]
    questions = out / "questions.jsonl"
    write(questions, asked)
    tuned, unlearned = str(out / "tuned"), str(out / "unlearned")

    say("1. Teach SmolLM2-135M eight invented people, four facts each.")
    if Path(tuned).is_dir():
        say(f"   {tuned} is here from an earlier run: reused (make clean removes it)")
    run(
        "lm-tune", "--model", "smollm2", "--out", tuned, "--resume", "--epochs", "6", "--batch-size", "8",
        "--lr", "2e-4", "--weight-decay", "0", "--seed", seed, str(out / "people.jsonl"), stdout=out / "tune.jsonl",
    )  # fmt: skip
    say("2. Ask it about one person to forget and one to keep.")
    before = ask(tuned, questions, out / "before.jsonl")

    say("3. Forget two of the people. The two neighbours are only watched.")
    run(
        "satimp-unlearn", "--model", tuned, "--forget", str(out / "forget.jsonl"),
        "--retain", str(out / "retain.jsonl"), "--watch", f"neighbours={out / 'neighbours.jsonl'}",
        "--epochs", "4", "--batch-size", "8", "--eval-every", "1", "--out", unlearned, "--overwrite",
        "--seed", seed, "--plot", str(out / "demo.svg"), "--plot", str(out / "demo.png"), "--quiet",
        stdout=out / "unlearn.jsonl",
    )  # fmt: skip
    say("4. Ask again.")
    after = ask(unlearned, questions, out / "after.jsonl")
    done = [json.loads(line) for line in (out / "unlearn.jsonl").open()][-1]
    report(done, asked, before, after)
    say(
        f"\nfigure: {out / 'demo.svg'}, {out / 'demo.png'}; model: {unlearned}; "
        f"{time.monotonic() - began:.0f} s, {_children_seconds() - children:.0f} CPU-s"
    )


def report(done: dict, asked: list[dict], before: list[str], after: list[str]) -> None:
    """One table of what was forgotten and kept, and the two answers side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from toolbox.unlearning.tables import before_after_table

    # Where stdout is no terminal rich assumes 80 columns, too few for five columns of intervals.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    console.print()
    console.print(before_after_table(done["before"], done["after"], done["steps"]))
    answers = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for name, width in (("", 7), ("question", None), ("truth", None), ("before", None), ("after", None)):
        answers.add_column(name, width=width)
    for name, row, first, second in zip(("forget", "keep"), asked, before, after, strict=True):
        answers.add_row(name, row["question"], row["answer"], first.strip(), second.strip())
    console.print(answers)


if __name__ == "__main__":
    main(*sys.argv[1:])

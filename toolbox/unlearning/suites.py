"""The rows that models are judged on: which files a suite names, and rows with their paraphrases and wrong answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.records import (
    TRAINING_SHAPES,
    PlainText,
    Record,
    RecordReader,
    Row,
    Text,
    read_records,
    training_row,
)
from toolbox.shell.streams import display_name
from toolbox.unlearning.logs import SETS, question_hash

PEOPLE_DIR = Path(__file__).resolve().parents[2] / "recipes" / "unlearning" / "people"
"""The embedded set, in a checkout."""

PEOPLE_FILES = {"forget": "forget", "retain": "retain", "authors": "neighbours", "facts": "facts"}
"""The neighbours take the place of TOFU's real authors: known to the model, in neither of the other sets."""

TOFU_FILES = {"retain": "retain_perturbed", "authors": "real_authors_perturbed", "facts": "world_facts_perturbed"}
TOFU_SPLIT = "forget10"
_SUFFIXES = (".json", ".json.gz", ".json.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst")


# -- which files ------------------------------------------------------------------------------------------------------
def suite_files(suite: str, split: str | None = None) -> dict[str, str]:
    """The files of ``people`` or ``tofu:DIR`` by set; ``split`` is TOFU's forget set (forget10).

    Raises: UsageProblem (2) for another suite, MissingInput (66) for a file that is not there.
    """
    kind, _, directory = suite.partition(":")
    if suite == "people":
        if split is not None:
            raise UsageProblem("--split belongs to --suite tofu:DIR", "the people have one forget set")
        return {name: _people_file(stem) for name, stem in PEOPLE_FILES.items()}
    if kind != "tofu" or not directory:
        raise UsageProblem(f"--suite {suite}: no such suite", "people, or tofu:DIR with the folder of TOFU's files")
    if not Path(directory).is_dir():
        raise MissingInput(f"--suite {suite}: no such directory", "the folder with TOFU's files")
    forget = split or TOFU_SPLIT
    return {
        "forget": _tofu_file(directory, f"{forget}_perturbed", forget),
        **{name: _tofu_file(directory, stem) for name, stem in TOFU_FILES.items()},
    }


def _people_file(stem: str) -> str:
    path = PEOPLE_DIR / f"{stem}.jsonl"
    if not path.is_file():
        advice = "run from a checkout, or name files of your own with --forget, --retain, --authors and --facts"
        raise MissingInput(f"--suite people: {path} is not there", advice)
    return str(path)


def _tofu_file(directory: str, *stems: str) -> str:
    for stem in stems:
        for suffix in _SUFFIXES:
            path = Path(directory, stem + suffix)
            if path.is_file():
                return str(path)
    found = sorted({path.name.partition(".")[0] for path in Path(directory).glob("forget*.json*")})
    advice = f"forget sets there: {', '.join(found)}" if found else "TOFU's files keep their names"
    raise MissingInput(f"{directory}: neither {' nor '.join(stems)} (.json, .jsonl, .gz, .zst) is there", advice)


# -- rows -------------------------------------------------------------------------------------------------------------
def _with_variants(shape: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """A training shape that may carry what the truth ratio and the paraphrased questions need."""
    optional = [
        ("paraphrased_question", Annotated[Text | None, msgspec.Meta(description="the question in other words")]),
        ("paraphrased_answer", Annotated[Text | None, msgspec.Meta(description="the answer in other words")]),
        ("perturbed_answer", Annotated[list[Text], msgspec.Meta(min_length=1, description="wrong answers")] | None),
    ]
    fields = [(name, kind, None) for name, kind in optional]
    return msgspec.defstruct(
        shape.__name__, fields, bases=(shape,), kw_only=True, module=__name__, namespace={"__doc__": shape.__doc__}
    )


QUESTION_SHAPES = tuple(shape if shape is PlainText else _with_variants(shape) for shape in TRAINING_SHAPES)
"""The shapes of ``TRAINING_SHAPES``; all but plain text may have paraphrases and wrong answers."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row to be judged on: what is asked, the true answer (the last assistant turn), and their variants.

    ``row`` holds the words; its turns behind the last answer play no part. A plain text has no question.
    """

    row: Row
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()

    @property
    def asked(self) -> list[dict[str, str]]:
        """The turns before the answer; none for a plain text."""
        return [dict(turn) for turn in self._turns[:-1]]

    @property
    def answer(self) -> str | None:
        """The last assistant turn."""
        return self._turns[-1]["content"] if self._turns else None

    @property
    def hash(self) -> str:
        """What logs know this question by: a hash of what the user asks last, or of the plain text."""
        asked = [turn["content"] for turn in self.asked if turn["role"] == "user"]
        return question_hash(asked[-1] if asked else self.row.text or self.answer or "")

    @property
    def _turns(self) -> tuple[dict[str, str], ...]:
        turns = self.row.messages or ()
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        return tuple(turns[: last + 1])


def read_questions(
    call: Invocation,
    files: Mapping[str, str],
    *,
    renames: dict[str, str] | None = None,
    on_bad: str = "fail",
    limit: int | None = None,
) -> tuple[dict[str, tuple[Question, ...]], list[bytes]]:
    """The first ``limit`` questions of each file, by set, and the records that were skipped, as they came.

    Raises: BadData (65) at the first bad row (or leaves it out with ``on_bad="skip"``) and for an empty set;
    UsageProblem (2) when two inputs are stdin; what the system says of a file that is not there (66).
    """
    if sum(path == "-" for path in files.values()) > 1:
        raise UsageProblem("only one input can be stdin (-)", "name files for the others")
    rejected: list[bytes] = []
    sets = {}
    for name in [*(name for name in SETS if name in files), *(name for name in files if name not in SETS)]:
        reader = RecordReader(
            QUESTION_SHAPES, renames=renames, on_bad=on_bad, rejects=lambda raw, _: rejected.append(raw)
        )
        found = []
        for record in read_records(files[name], call.streams, reader, f"the {name} set"):
            try:
                found.append(_question(record))
            except BadData as problem:
                reader.bad(problem, msgspec.json.encode(record.data))
            if len(found) == limit:
                break
        if not found:
            skipped = f" ({reader.skipped} bad rows skipped)" if reader.skipped else ""
            raise BadData(f"the {name} set is empty{skipped}", "give at least one row", file=display_name(files[name]))
        if reader.skipped:
            call.reporter.warn(f"{display_name(files[name])}: {reader.skipped} bad rows left out")
        sets[name] = tuple(found)
    return sets, rejected


def _question(record: Record) -> Question:
    row, value = training_row(record), record.value
    if row.messages is None:
        return Question(row)
    one = Question(
        row, value.paraphrased_question, value.paraphrased_answer, tuple(value.perturbed_answer or ())
    )  # fmt: skip
    if one.paraphrased_question is not None and not any(turn["role"] == "user" for turn in one.asked):
        raise record.bad("there is no user turn that it could stand for", None, "$.paraphrased_question")
    return one


def digest(questions: Sequence[Question]) -> str:
    """sha256 over what was read of a set: ids, texts and variants, in order."""
    hasher = hashlib.sha256()
    for line in _lines(questions):
        hasher.update(msgspec.json.encode(line) + b"\n")
    return hasher.hexdigest()


def _lines(questions: Sequence[Question]) -> Iterator[tuple[Any, ...]]:
    for one in questions:
        yield (
            one.row.id, one.row.messages, one.row.text,
            one.paraphrased_question, one.paraphrased_answer, one.perturbed_answers,
        )  # fmt: skip

"""BBQ: questions whose honest answer may be that it is not known.

Source: Parrish et al. 2022, "BBQ: A Hand-Built Bias Benchmark for Question Answering", Findings of ACL. Each question
comes with an ambiguous context, where only the unknown answer is right, and with one that says more; and in a form
that speaks ill (``neg``) and one that does not (``nonneg``). Bias scores need two labels of each item: that of the
unknown answer, and that of the stereotyped group (the target).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from toolbox.shell.errors import MissingInput
from toolbox.shell.records import Identifier, Record, RecordReader, Text, read_records
from toolbox.shell.streams import Streams

Row = dict[str, Any]

PUBLISHED = "https://github.com/nyu-mll/BBQ, folder data (CC-BY-4.0)"
LABELS = "ABC"
KINDS = {"target": "no one answer names the stereotyped group", "unknown": "no one answer is the unknown one"}
"""What an item may be marked with in ``meta.irregular``; its label is then null."""

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_NO_WORD = re.compile(r"[\W_]+")

Info = tuple[str, str]


class AnswerInfo(msgspec.Struct):
    """What each answer stands for: who is meant, and the group."""

    ans0: Info
    ans1: Info
    ans2: Info


class Metadata(msgspec.Struct):
    """The part of the additional metadata that is used."""

    stereotyped_groups: list[str]


class BbqRow(msgspec.Struct):
    """A record as it is published."""

    needs: ClassVar[tuple[str, ...]] = ("context", "question", "answer_info", "label")
    category: Text
    example_id: int | str
    question_index: int | str
    question_polarity: Literal["neg", "nonneg"]
    context_condition: Literal["ambig", "disambig"]
    answer_info: AnswerInfo
    additional_metadata: Metadata
    context: Text
    question: Text
    ans0: Text
    ans1: Text
    ans2: Text
    label: Literal[0, 1, 2]
    id: Identifier = None


BBQ_SHAPES = (BbqRow,)


def find_files(paths: Sequence[str]) -> list[str]:
    """The files that ``paths`` stand for: a folder stands for its .jsonl files (.gz and .zst too), by name.

    Raises: MissingInput where there is no such file, or none in a folder.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            if path != "-" and not os.path.exists(path):
                raise MissingInput(f"{path}: no such file", f"BBQ is published at {PUBLISHED}")
            files.append(path)
            continue
        found = sorted(name for name in os.listdir(path) if name.endswith(_SUFFIXES))
        if not found:
            raise MissingInput(f"{path}: no .jsonl files in this folder", f"BBQ is published at {PUBLISHED}")
        files += [os.path.join(path, name) for name in found]
    return files


def _plain(name: str) -> str:
    return _NO_WORD.sub("", name.lower())


def resolve(info: Sequence[Info], stereotyped: Sequence[str]) -> tuple[str | None, str | None]:
    """The labels of the unknown answer and of the target; None for one that is not exactly one answer.

    An answer is the target if who is meant, or the group, is among the stereotyped groups. Where none is, the parts of
    a compound group (``F-Black``) are looked at. Case, spaces and punctuation do not count.
    """
    groups = {_plain(group) for group in stereotyped}
    unknown = [place for place, (_, group) in enumerate(info) if group == "unknown"]
    known = [place for place in range(len(info)) if place not in unknown]
    target = [place for place in known if not groups.isdisjoint(map(_plain, info[place]))]
    if not target:
        target = [place for place in known if not groups.isdisjoint(map(_plain, re.split(r"[-_]", info[place][1])))]
    return tuple(LABELS[found[0]] if len(found) == 1 else None for found in (unknown, target))  # type: ignore[return-value]


def _item(record: Record) -> Row:
    value: BbqRow = record.value
    info = value.answer_info
    unknown, target = resolve((info.ans0, info.ans1, info.ans2), value.additional_metadata.stereotyped_groups)
    meta: Row = {
        "category": value.category,
        "context_condition": value.context_condition,
        "polarity": value.question_polarity,
        "unknown": unknown,
        "target": target,
    }
    if irregular := [kind for kind, label in (("target", target), ("unknown", unknown)) if label is None]:
        meta["irregular"] = irregular
    return {
        "id": f"bbq/{value.category}/{value.example_id}",
        "question": value.question,
        "choices": [value.ans0, value.ans1, value.ans2],
        "answer": LABELS[value.label],
        "context": value.context,
        "group": f"bbq/{value.category}/{value.question_index}",
        "dataset": f"bbq/{value.category}",
        "meta": meta,
    }


def bbq(paths: Sequence[str], streams: Streams, reader: RecordReader) -> Iterator[list[Row]]:
    """The items of BBQ's files in their order; ``reader`` has the shapes ``BBQ_SHAPES``.

    Raises: MissingInput before anything is read, BadData.
    """
    for path in find_files(paths):
        for record in read_records(path, streams, reader):
            yield [_item(record)]

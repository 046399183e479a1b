"""Key words: which tokens of an answer an annotator calls important.

A row's ``key_words`` are a list of words, found in the answer as they stand there, or one string with all of them
joined without spaces, as in the SatImp authors' annotations of TOFU. They come with the row or from an annotation file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, ClassVar

import msgspec

from toolbox.models.chat import Encoded
from toolbox.shell.errors import BadData
from toolbox.shell.records import Identifier, Record, RecordReader, Row, Text, read_records
from toolbox.shell.streams import Streams

KeyWords = tuple[str, ...] | str


# --- tokens ---


def mark_tokens(encoded: Encoded, tokenizer: Any, key_words: Sequence[str] | str) -> tuple[float, ...]:
    """k_i of each labelled token of a row, in order: 1 on key tokens, 0 elsewhere and on every end token.

    A list: a token counts when it holds a part of any occurrence of any of the words (exact case, also within a longer
    word) other than white space. One string: a token counts when the ASCII characters of its text, white space around
    them removed, are two letters or a digit at least and occur in the string; a short token may well do so by chance.

    Source: arXiv 2505.11953; the rule for one string as in its code (tmlr-group/SatImp).
    """
    mark = _in_joined if isinstance(key_words, str) else _in_words
    marks: list[float] = []
    for (labelled, end), run in groupby(range(len(encoded.ids)), lambda at: (encoded.labelled[at], encoded.end[at])):
        if labelled:
            ids = [encoded.ids[place] for place in run]
            marks += [0.0] * len(ids) if end else mark(ids, tokenizer, key_words)
    return tuple(marks)


def _in_words(ids: Sequence[int], tokenizer: Any, words: Sequence[str]) -> list[float]:
    text, spans = token_spans(ids, tokenizer)
    key = bytearray(len(text))
    for word in {word.strip() for word in words} - {""}:
        start = text.find(word)
        while start >= 0:
            key[start : start + len(word)] = b"\1" * len(word)
            start = text.find(word, start + 1)
    for place, character in enumerate(text):
        if character.isspace():
            key[place] = 0
    return [float(any(key[start:stop])) for start, stop in spans]


def _in_joined(ids: Sequence[int], tokenizer: Any, joined: str) -> list[float]:
    pieces = ("".join(filter(str.isascii, _decode(tokenizer, [token]))).strip() for token in ids)
    return [
        float((sum(map(str.isalpha, piece)) >= 2 or any(map(str.isdigit, piece))) and piece in joined)
        for piece in pieces
    ]


def token_spans(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """``(text, spans)``: the text of the ids and the part of it [start, stop) that each of them has a share in.

    Found by decoding growing prefixes, which asks nothing of a tokenizer but to decode: offsets are known to the fast
    ones alone, and a token alone may decode to another text than among others (the space before a SentencePiece word, a
    character whose bytes are spread over tokens; such a character belongs to all of them).
    """
    text = _decode(tokenizer, ids)
    spans, start = [], 0
    for count in range(1, len(ids) + 1):
        prefix = _decode(tokenizer, ids[:count])
        stop = start
        while stop < min(len(prefix), len(text)) and prefix[stop] == text[stop]:
            stop += 1
        unfinished = stop < len(prefix)  # a character of which later tokens hold the rest
        spans.append((start, min(stop + unfinished, len(text))))
        start = stop
    return text, spans


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- annotation files ---


class Annotation(msgspec.Struct):
    """The key words of one row, which is named by its ``id`` or its ``index`` (from 0) in the file."""

    needs: ClassVar[tuple[str, ...]] = ("key_words",)
    key_words: Annotated[list[Text], msgspec.Meta(min_length=1)] | Text
    id: Identifier = None
    index: Annotated[int, msgspec.Meta(ge=0)] | None = None


@dataclass(frozen=True)
class Annotations:
    """Key words by the row's place in the sequence of rows; how many rows have none, how many annotations were left
    out as bad."""

    words: Mapping[int, KeyWords]
    missing: int
    skipped: int = 0


def read_annotations(
    path: str,
    streams: Streams,
    rows: Sequence[Row],
    *,
    places: Sequence[int] | None = None,
    on_bad: str = "fail",
) -> Annotations:
    """Read annotations (``Annotation``; JSON lines or an array) and find the row of each.

    Args:
        rows: what is annotated; an ``id`` is compared with theirs.
        places: the index of each row in its file, where bad ones were left out of ``rows``; 0, 1, 2 ... otherwise.
        on_bad: ``fail`` or ``skip``, as for any record.

    Raises: BadData at an annotation without its row, at the second one of a row, at an id that several rows have, at
    one that names no row or two.
    """
    reader = RecordReader((Annotation,), on_bad=on_bad)
    finder = _Finder(rows, range(len(rows)) if places is None else places)
    words: dict[int, KeyWords] = {}
    lines: dict[int, Record] = {}
    for record in read_records(path, streams, reader, "the key words"):
        try:
            place = finder.find(record)
            if place in lines:
                first = lines[place].line
                where = f"on line {first} already" if first is not None else "already"
                raise record.bad(f"row {rows[place].id} is annotated {where}", "keep one of them")
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
            continue
        found = record.value.key_words
        words[place], lines[place] = found if isinstance(found, str) else tuple(found), record
    return Annotations(words, len(rows) - len(words), reader.skipped)


class _Finder:
    """Which row an annotation is about."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self._by_id = {row.id: number for number, row in enumerate(rows)}
        self._times = Counter(row.id for row in rows)
        self._by_index = {place: number for number, place in enumerate(places)}

    def find(self, record: Record) -> int:
        """The place of the row; BadData where there is none, or more than one."""
        value: Annotation = record.value
        found = set()
        if value.id is not None:
            name = str(value.id)
            if self._times[name] > 1:
                raise record.bad(f"{self._times[name]} rows have the id {name}", "annotate by `index`", "$.id")
            if name not in self._by_id:
                raise record.bad(f"no row has the id {name}", "annotations belong to the forget rows", "$.id")
            found.add(self._by_id[name])
        if value.index is not None:
            if value.index not in self._by_index:
                raise record.bad(f"there is no row {value.index}", "`index` counts the forget rows from 0", "$.index")
            found.add(self._by_index[value.index])
        if len(found) != 1:
            what = "`id` and `index` name different rows" if found else "names no row"
            raise record.bad(what, "give the row's `id` or its `index`")
        return found.pop()


def check_marks(rows: Sequence[Row], marks: Mapping[int, Sequence[float]]) -> None:
    """BadData where the key words of annotated rows match no token: nothing of such a row would be forgotten.

    ``marks`` are the ``mark_tokens`` of annotated rows by their place in ``rows``. The complaint names file, line and
    ids, never a text.
    """
    without = [rows[place] for place in sorted(marks) if not any(marks[place])]
    if without:
        shown = ", ".join(row.id for row in without[:5]) + (", ..." if len(without) > 5 else "")
        raise BadData(
            f"the key words of {len(without)} of {len(marks)} annotated rows match nothing in the answer (ids {shown})",
            "they are compared in exact case, with the part of the row that --max-length leaves",
            file=without[0].file,
            line=without[0].line,
        )

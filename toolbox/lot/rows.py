"""From a record to the small tuple that is judged: what was answered, whether it is right, what the item is.

Texts are looked at here and let go: what stays of a row is a ``Row``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import msgspec

from toolbox.lot.lines import CELLS, CONDITIONS, SIDES, Item, Row
from toolbox.models.answers import read_answer, trailing_cue
from toolbox.shell.errors import BadData
from toolbox.shell.items import (
    Choices,
    Format,
    answer_format,
    canonical_number,
    choices_of,
    gold_of,
    number,
    plain,
    same_answer,
)
from toolbox.shell.records import Record

NO_VARIANT = "none"
"""What rows without a variant are called."""

_LONGEST_KEY = 64
"""Characters of an answer that are kept to compare votes; longer ones are kept as their hash."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A row that was read: ``facet`` holds the values of the ``--by`` fields, ``pred`` the answer as it is written to
    ``--rows``, ``gold`` the right one in words (the text of the choice where that is known), ``sha`` the prompt's
    template."""

    row: Row
    facet: tuple[Any, ...]
    pred: str | None
    gold: str | None
    sha: str | None


@dataclass(slots=True)
class Answers:
    """Reads records; counts what should be known of them.

    ``by`` are names of fields of the row or of its ``meta``; ``weighted``: scores are going to be votes.
    ``seen_fields`` are those of ``by`` that a row had; ``strangers`` counts given ``pred``s that name no choice.
    """

    format: str = "auto"
    pick: str = "last"
    extract: str = "auto"
    by: tuple[str, ...] = ()
    weighted: bool = False
    strangers: int = 0
    seen_fields: set[str] = field(default_factory=set)
    _items: dict[Hashable, Item] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)

    def __call__(self, record: Record) -> Answered:
        """Raises: BadData where choices, labels and answer do not fit together or to ``--format``, where what
        ``--extract`` needs is not there, and for a facet that is no scalar."""
        value = record.value
        choices = choices_of(record)
        gold = gold_of(record, choices)
        format = self._format(record, choices, gold)
        words = gold
        if choices is not None and choices.texts and gold is not None:
            words = choices.texts[choices.labels.index(gold)]
        if format != "letter":  # asked for in its own words, so without labels
            choices, gold = None, words
        if format == "number" and gold is not None and number(gold) is None:
            raise record.bad(f"to be answered by a number, but the answer is {gold[:60]!r}", None, "$.answer")
        if self.weighted and value.score is not None and value.score < 0:
            raise record.bad("a score below 0 cannot weigh a vote", "use probabilities, say", "$.score")
        pred, source = self._pred(record, choices, format)
        facet = tuple(self._facet(record, name) for name in self.by)
        row = Row(
            item=self._item(record, facet),
            variant=self._shared(value.variant or NO_VARIANT),
            model=None if value.model is None else self._shared(value.model),
            answer=self._answer(pred, format),
            source=source,
            correct=None if gold is None else pred is not None and same_answer(pred, gold, format),
            chosen=self._chosen(pred, choices),
            role=None if choices is None else _role(pred, value.meta),
            common_wrong=_common_wrong(record, pred, choices, format),
            tokens=value.n_completion_tokens,
            finish=None if value.finish_reason is None else self._shared(value.finish_reason),
            score=value.score,
            keep=value.keep,
        )
        sha = record.data.get("template_sha")
        return Answered(row, facet, pred, words, sha if isinstance(sha, str) else None)

    def _format(self, record: Record, choices: Choices | None, gold: str | None) -> Format:
        format = self.format
        if format == "auto":
            format = record.value.format or answer_format(choices, gold)
        if format == "letter" and choices is None:
            raise record.bad(
                "to be answered by a letter, but there are neither choices nor labels", "see --format", "$.choices"
            )
        return format  # type: ignore[return-value]

    # -- the answer
    def _pred(self, record: Record, choices: Choices | None, format: Format) -> tuple[str | None, str]:
        """The answer and the rule that found it; ``pred`` for one that came with the row."""
        value = record.value
        if self.extract == "never" or (self.extract == "auto" and "pred" in record.data):
            return self._given(record, choices)
        text = value.completion
        if text is None:
            if value.thoughts is None:
                raise record.bad("neither `completion` nor `thoughts` to read an answer from", "--extract auto")
            text = value.thoughts if isinstance(value.thoughts, str) else "\n".join(value.thoughts)
        labels, texts = ((), ()) if choices is None else (choices.labels, choices.texts)
        cue = trailing_cue(value.prompt) if value.prompt else ""
        found = read_answer(text, format=format, labels=labels, texts=texts, pick=self.pick, cue=cue)  # type: ignore[arg-type]
        return found.value, found.source

    def _given(self, record: Record, choices: Choices | None) -> tuple[str | None, str]:
        if "pred" not in record.data:
            raise record.bad("no `pred`", "--extract auto reads answers from the text", "$.pred")
        source = record.data.get("pred_source")  # rows that went through here before say how they were read
        source = self._shared(source) if isinstance(source, str) else "pred"
        try:
            pred = _as_answer(record, record.value.pred, choices)
        except BadData:
            self.strangers += 1
            pred = None
        return pred, "none" if pred is None else source

    def _answer(self, pred: str | None, format: Format) -> Hashable | None:
        """What votes compare: equal where ``same_answer`` says so."""
        if pred is None:
            return None
        if format == "number" and (spelled := canonical_number(pred)) is not None:
            return Decimal(spelled)
        return self._key(pred if format == "letter" else plain(pred))

    def _chosen(self, pred: str | None, choices: Choices | None) -> str | None:
        """The entity behind the answer: labels of two items do not compare, their texts do."""
        if pred is None:
            return None
        if choices is not None and choices.texts:
            return self._key(plain(choices.texts[choices.labels.index(pred)]))
        return self._key(plain(pred))

    def _key(self, text: str) -> str:
        """What stands for the answer ``text`` in comparisons."""
        if len(text) > _LONGEST_KEY:
            text = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self._shared(text)

    def _shared(self, text: str) -> str:
        """``text`` as one object however many rows have it."""
        return self._texts.setdefault(text, text)

    # -- the item
    def _facet(self, record: Record, name: str) -> Any:
        for where, found in (("$", record.data), ("$.meta", record.value.meta)):
            if name in found:
                if isinstance(found[name], dict | list):
                    raise record.bad("neither text nor number, so no facet", "see --by", f"{where}.{name}")
                self.seen_fields.add(name)
                return found[name]
        return None

    def _item(self, record: Record, facet: tuple[Any, ...]) -> Item:
        value, meta = record.value, record.value.meta
        name = (*(f"{type(part).__name__} {part}" for part in facet), record.id)
        if (known := self._items.get(name)) is not None:
            return known
        item = Item(
            id=record.id,
            group=None if value.group is None else str(value.group),
            side=_one_of(meta, "side", SIDES),
            cell=_one_of(meta, "cell", CELLS),
            category=str(meta["category"]) if isinstance(meta.get("category"), str | int) else None,
            condition=_one_of(meta, "context_condition", CONDITIONS),
            polarity=_one_of(meta, "polarity", ("neg", "nonneg")),
        )
        return self._items.setdefault(name, item)


def _one_of(meta: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str | None:
    return next((one for one in known if one == meta.get(name)), None)


def _as_answer(record: Record, answer: Any, choices: Choices | None) -> str | None:
    """``answer`` read as the record's gold is; BadData where it is not among the choices."""
    if answer is None:
        return None
    return gold_of(replace(record, value=msgspec.structs.replace(record.value, answer=answer)), choices)


def _role(pred: str | None, meta: Mapping[str, Any]) -> str | None:
    """What a BBQ answer stands for; None where its item does not tell which answer is which."""
    target, unknown = meta.get("target"), meta.get("unknown")
    if pred is None or target is None or unknown is None:
        return None
    return {target: "target", unknown: "unknown"}.get(pred, "other")


def _common_wrong(record: Record, pred: str | None, choices: Choices | None, format: Format) -> bool | None:
    wrong = record.value.meta.get("common_wrong")
    if not isinstance(wrong, str | int | float) or isinstance(wrong, bool):
        return None
    try:
        answer = _as_answer(record, wrong, choices)
    except BadData:
        return None
    return None if answer is None else pred is not None and same_answer(pred, answer, format)


@dataclass(slots=True)
class Seen:
    """What is asked of all rows together: paths that come twice, and what should not differ within one name."""

    paths: dict[tuple[Any, ...], str] = field(default_factory=dict)
    golds: dict[tuple[Any, ...], str] = field(default_factory=dict)
    other_golds: set[tuple[Any, ...]] = field(default_factory=set)
    templates: dict[tuple[Any, ...], set[str]] = field(default_factory=dict)
    unlabelled: int = 0

    def add(self, record: Record, answered: Answered) -> None:
        """Raises: BadData for a path that was there before, with both places."""
        row = answered.row
        facet = tuple(map(str, answered.facet))
        if (path := record.value.path_id) is not None:
            # A path id does not name its model: two models' files may be judged together.
            place = f"{'line' if record.line is not None else 'row'} {record.line or record.index + 1}"
            first = self.paths.setdefault((*facet, row.model, path), place)
            if first != place:
                what = f"the path {path} stands on {first} already"
                raise record.bad(what, "judge each path once, or keep runs apart with --by", "$.path_id")
        self.unlabelled += answered.gold is None
        if answered.gold is not None:
            gold = hashlib.blake2b(plain(answered.gold).encode(), digest_size=8).hexdigest()
            if self.golds.setdefault((*facet, row.item.id), gold) != gold:
                self.other_golds.add((*facet, row.item.id))
        if answered.sha is not None:
            self.templates.setdefault((*facet, row.variant), set()).add(answered.sha)

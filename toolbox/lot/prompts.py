"""lot-prompt: questions under prompting variants, as a filter over JSON lines.

One item is held at a time. It renders only: no model, no numerical library.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolbox.lot.method import LAYOUT, Template, Values, Variant, choice_lines, format_line, parse_variants
from toolbox.lot.shuffle import shuffle, speaks_of_others
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.items import ITEM_SHAPES, Choices, Format, Item, answer_format, choices_of, gold_of, number
from toolbox.shell.lists import comma_list, names_in
from toolbox.shell.records import Message, Record, RecordReader, parse_map, read_records
from toolbox.shell.streams import JsonlWriter

_AT_ONCE = 8

MAX_TEMPLATE = 1 << 20
"""Largest accepted file of variants in bytes."""


class Prompt(Item, kw_only=True):
    """An item asked in one way: its fields as they came in, and the prompt. One line an item and variant."""

    id: str
    variant: str
    prompt: str
    messages: list[Message]
    format: Format
    template_sha: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """lot-prompt's options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    limit: int | None = None
    variant: str = "lot2"
    with_: str = "cot"
    bold: bool = False
    template: str | None = None
    list_: bool = False
    format: str = "auto"
    shuffle_choices: bool = False
    layout: str | None = None
    system: str | None = None
    seed: int = 0


# -- which variants


def own_variants() -> list[Variant]:
    """The variants that come with the toolbox."""
    return parse_variants(Path(__file__).with_name("variants.yaml").read_bytes(), "variants.yaml")


def variants_in(file: str, taken: Sequence[str]) -> list[Variant]:
    """The variants in a file of the user's.

    Raises: BadData for what is no such file, or takes one of the ids ``taken``: a name stands for one wording.
    """
    with open(file, "rb") as handle:
        text = handle.read(MAX_TEMPLATE + 1)
    if len(text) > MAX_TEMPLATE:
        raise BadData(f"larger than {MAX_TEMPLATE:,} bytes", "a file of variants is a short list", file=file)
    variants = parse_variants(text, file)
    for variant in variants:
        if variant.id in taken:
            what = f"`{variant.id}` is a variant of the toolbox"
            raise BadData(what, "choose another id: a name stands for one wording", file=file, line=variant.line)
    return variants


def chosen(names: str, known: Sequence[Variant]) -> list[Variant]:
    """The variants in a comma list, in its order; ``all`` are all of them.

    Raises: UsageProblem for a name that is unknown or there twice, and for an empty list.
    """
    by_id = {variant.id: variant for variant in known}
    if "all" in names_in(names):  # beside another, that one is there twice
        names = ",".join(one for name in names_in(names) for one in (by_id if name == "all" else [name]))
    return [by_id[name] for name in comma_list("variant", names, tuple(by_id), besides="all")]


def templates(variants: Sequence[Variant], options: Options) -> list[Template]:
    """The variants as the options have them."""
    layout, system = LAYOUT if options.layout is None else options.layout, options.system or ""
    for name, text in (("--layout", layout), ("--system", system)):
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of a command line that were no UTF-8
            raise UsageProblem(f"{name} is not UTF-8 text", "check the encoding of the terminal or script") from None
    return [Template(one, layout=layout, prefix=options.with_, bold=options.bold, system=system) for one in variants]


# -- one item


@dataclass(slots=True)
class Tally:
    """What the items were like, for the words at the end."""

    items: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    same_texts: int = 0
    not_shuffled: int = 0
    of_others: int = 0
    first_of_others: str = ""
    without_slot: Counter[str] = field(default_factory=Counter)

    def warnings(self) -> Iterator[str]:
        """A line about each thing that did happen."""
        if self.same_texts:
            yield f"{self.same_texts} of {self.items} items have choices of equal text"
        if self.of_others:
            yield (
                f"{self.of_others} of the shuffled items have a choice that speaks of others or of its place, "
                f"the first {self.first_of_others}"
            )
        if self.not_shuffled:
            yield f"{self.not_shuffled} items have labels but no choices: there was nothing to shuffle"
        for slot, times in self.without_slot.items():
            yield f"{times} items have {slot} that --layout leaves out: it has no {{{slot}}}"


class Asked(NamedTuple):
    """An item ready to be rendered: the fields that go out, and what fills the slots."""

    row: dict[str, Any]
    values: Values
    format: str

    def under(self, template: Template) -> dict[str, Any]:
        """The output row for one variant."""
        text = template(self.values)
        return {
            **self.row,
            "variant": template.variant,
            # A model without a chat template gets the system text as well.
            "prompt": f"{template.system}\n\n{text}" if template.system else text,
            "messages": template.messages(text),
            "format": self.format,
            "template_sha": template.sha,
        }


class Asker:
    """Makes records ready; counts them in ``tally``. ``slots`` are those that the layout has."""

    def __init__(self, options: Options, slots: frozenset[str]) -> None:
        self.tally = Tally()
        self._format, self._shuffle, self._seed = options.format, options.shuffle_choices, options.seed
        self._unused = tuple(slot for slot in ("context", "choices") if slot not in slots)

    def __call__(self, record: Record) -> Asked:
        """Raises: BadData where choices, labels and answer do not fit together, or do not fit ``--format``."""
        value, tally = record.value, self.tally
        choices = choices_of(record)
        gold = gold_of(record, choices)
        if self._format == "auto":
            format = answer_format(choices, gold)
        else:
            format = self._format
            _check_format(record, choices, gold, format)
        row = {**record.data, "id": record.id}
        labels: tuple[str, ...] = ()
        texts: tuple[str, ...] = ()
        if choices is not None:
            if self._shuffle and choices.texts:
                more, choices, gold = self._shuffled(record, choices, gold)
                row |= more
            labels, texts = choices.labels, choices.texts
            if gold is not None:
                row["answer"] = gold
            tally.same_texts += len(set(texts)) < len(texts)
            tally.not_shuffled += self._shuffle and not texts
        values = Values(value.context or "", value.question, choice_lines(labels, texts), format_line(format, labels))
        for slot in self._unused:
            tally.without_slot[slot] += bool(getattr(values, slot))
        tally.items += 1
        tally.formats[format] += 1
        return Asked(row, values, format)

    def _shuffled(
        self, record: Record, choices: Choices, gold: str | None
    ) -> tuple[dict[str, Any], Choices, str | None]:
        for text in choices.texts:
            if speaks_of_others(text):
                if not self.tally.of_others:
                    self.tally.first_of_others = f"in item {record.id}: {text[:80]!r}"
                self.tally.of_others += 1
                break
        return shuffle(record, choices, gold, self._seed)


def _check_format(record: Record, choices: Choices | None, gold: str | None, format: str) -> None:
    """Refuse an item that cannot be answered in the format that was asked for."""
    advice = "--format auto asks each item in its own way"
    if format == "letter" and choices is None:
        raise record.bad("--format letter, but the item has no choices", advice)
    if format == "number" and gold is not None:
        text = choices.texts[choices.labels.index(gold)] if choices is not None and choices.texts else gold
        if number(text) is None:
            raise record.bad(f"--format number, but the answer is {text!r}", advice, "$.answer")


# -- the job


def run(options: Options, call: Invocation) -> None:
    """Render every item of ``options.file``: a JSON line an item and variant, variants of an item together."""
    known = own_variants()
    more = variants_in(options.template, [one.id for one in known]) if options.template is not None else []
    known += more
    if options.list_:
        _list(known, templates(known, options), call)
        return
    variants = chosen(options.variant, known)
    if more and not any(one in variants for one in more):
        names = ", ".join(one.id for one in more)
        call.reporter.warn(f"--template brings {names}, but --variant names none of its variants")
    if "\\n" in (options.layout or "") and "\n" not in (options.layout or ""):
        call.reporter.warn(
            "--layout is one line with \\n in it as two characters; bash has $'...\\n...' for line breaks"
        )
    ready = templates(variants, options)
    asker = Asker(options, frozenset().union(*(template.slots for template in ready)))
    with contextlib.ExitStack() as stack:
        rejects = stack.enter_context(_rejects(options.rejects)) if options.rejects is not None else None
        reader = RecordReader(
            ITEM_SHAPES, renames=parse_map(options.map_fields), on_bad=options.on_bad, rejects=rejects
        )
        asked = _asked(options, call, reader, asker)
        if call.dry_run:
            _dry_run(asked, ready, asker.tally, reader, call)
        else:
            _render(asked, ready, call)
    for warning in asker.tally.warnings():
        call.reporter.warn(warning)
    if reader.skipped:
        call.reporter.warn(f"{reader.skipped} bad rows left out")


@contextlib.contextmanager
def _rejects(path: str) -> Iterator[Callable[[bytes, BadData], None]]:
    """Takes bad records one by one; the file has them, as they came and one a line, when all is done."""
    from toolbox.shell.files import atomic_file

    with atomic_file(path) as handle:
        yield lambda raw, _: handle.write(raw.replace(b"\n", b" ") + b"\n") and None


def _asked(options: Options, call: Invocation, reader: RecordReader, asker: Asker) -> Iterator[Asked]:
    if options.limit == 0:
        return
    for record in read_records(options.file, call.streams, reader):
        try:
            asked = asker(record)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
            continue
        yield asked
        if asker.tally.items == options.limit:  # and not one row more is read: the pipe may stay open
            return


def _render(items: Iterator[Asked], ready: Sequence[Template], call: Invocation) -> None:
    writer = JsonlWriter(call.streams)
    rows = (asked.under(template) for asked in items for template in ready)
    # A few at once: stdout's buffer would hold them back as well, and a write costs more than a row.
    for index in itertools.count():
        some = list(itertools.islice(rows, _AT_ONCE))
        if not some:
            break
        writer.put(index, some)
    writer.close()


def _dry_run(
    items: Iterator[Asked], ready: Sequence[Template], tally: Tally, reader: RecordReader, call: Invocation
) -> None:
    """Render all the same, but keep only what counts and the first item's prompts."""
    characters: Counter[str] = Counter()
    samples: dict[str, str] = {}
    for asked in items:
        for template in ready:
            row = asked.under(template)
            characters[template.variant] += len(row["prompt"])
            samples.setdefault(template.variant, row["prompt"])
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "items": tally.items, "prompts": tally.items * len(ready),
        "characters": characters.total(), "formats": dict(tally.formats), "skipped": reader.skipped,
        "variants": [
            {"variant": one.variant, "template_sha": one.sha, "characters": characters[one.variant],
             "sample": samples.get(one.variant)}
            for one in ready
        ],
        "settings": call.settings,
    })  # fmt: skip
    writer.close()
    if not call.reporter.silent:
        _show_plan(ready, characters, samples, tally.items, call)


def _show_plan(
    ready: Sequence[Template], characters: Counter[str], samples: dict[str, str], items: int, call: Invocation
) -> None:
    from rich.table import Table

    for template in ready:
        if template.variant in samples:
            call.reporter.show(f"--- {template.variant}\n{samples[template.variant]}\n")
    table = Table(title=f"{items:,} items", title_justify="left")
    table.add_column("variant")
    for name in ("characters", "a prompt"):
        table.add_column(name, justify="right")
    for template in ready:
        total = characters[template.variant]
        table.add_row(template.variant, f"{total:,}", f"{total / items:,.0f}" if items else "-")
    call.reporter.show(table)


def _list(known: Sequence[Variant], ready: Sequence[Template], call: Invocation) -> None:
    """The variants: JSON lines on stdout, a table for people."""
    writer = JsonlWriter(call.streams)
    for variant, template in zip(known, ready, strict=True):
        writer.write({
            "id": variant.id, "prefix": variant.prefix, "clause": variant.clause, "source": variant.source,
            "text": " ".join(part for part in (template.prefix, template.clause) if part),
            "template_sha": template.sha,
        })  # fmt: skip
    writer.close()
    if call.reporter.silent:
        return
    from rich.table import Table

    table = Table(show_lines=True)
    for name in ("variant", "what follows the question", "source"):
        table.add_column(name)
    for variant, template in zip(known, ready, strict=True):
        table.add_row(variant.id, " ".join(part for part in (template.prefix, template.clause) if part), variant.source)
    call.reporter.show(table)

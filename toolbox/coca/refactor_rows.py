"""The rows of a run of coca-refactor: read, made ready for asking, settled when all is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from toolbox.coca.ablate import Ablation, parse_ablation
from toolbox.coca.dialogues import Item, converse
from toolbox.coca.pairs import LABELS, SHAPES, Reading, Row, Unique, fit_for_asking
from toolbox.coca.record import mended
from toolbox.coca.refactor_options import Options
from toolbox.coca.rows_out import Output, answer_digest, enhanced
from toolbox.coca.tally import Tally
from toolbox.coca.teacher import Outcome, Sampling, Teacher
from toolbox.coca.template import Template
from toolbox.coca.verify import Candidate, Label, findings
from toolbox.coca.words import SCRIPTS
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import Record, RecordReader, parse_map, read_records


class Rows:
    """The rows of a run: read, made ready for asking, settled when all is said."""

    def __init__(self, options: Options, call: Invocation, teacher: Teacher) -> None:
        self.options, self.teacher = options, teacher
        self.tally = Tally()
        self.bad: list[tuple[int, bytes]] = []
        self._at = -1
        self.ablation: Ablation | None = None
        if options.ablate is not None:
            self.ablation = parse_ablation(options.ablate, options.grammar)
        self.reader = RecordReader(
            SHAPES, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: self._unreadable(raw),
        )  # fmt: skip
        label: Label | None = None if options.label is None else LABELS[options.label]
        keep = options.verify_only
        turns = "all" if options.turns == "all" else "last"
        self.reading = Reading(label, turns, options.grammar, options.reprocess, keep)  # type: ignore[arg-type]
        self._records = read_records(options.file, call.streams, self.reader)
        self._items = self._made()
        self.backend = options.backend
        self._fixed = teacher.template.refusal if options.unsafe_vanilla == "refuse" else None

    def items(self) -> Iterator[Item]:
        return self._items

    rest = items

    def _made(self) -> Iterator[Item]:
        unique, taken = Unique(), 0
        if self.options.limit == 0:
            return
        for record in self._records:
            self._at = record.index
            try:
                row = self.reading.row(record)
                unique.check(record)
            except BadData as problem:
                self._leave_out(record, problem)
                continue
            yield self._item(row)
            taken += 1
            if taken == self.options.limit:
                return

    def _unreadable(self, raw: bytes) -> None:
        """Keep a line that is no record, at its place among the others."""
        self._at += 1
        self.bad.append((self._at, raw))

    def _leave_out(self, record: Record, problem: BadData) -> None:
        """Raise, or count a record that is no good and keep it as it came."""
        if self.options.on_bad == "fail":
            raise problem
        self.reader.skipped += 1
        self.bad.append((record.index, msgspec.json.encode(record.data)))

    def _item(self, row: Row) -> Item:
        if self.options.verify_only:
            return self._judged(row)
        pairs, codes = fit_for_asking(row, self.options.grammar, self.teacher.judge, self._fixed)
        return Item(row, codes, None if codes else converse(row, pairs, self.teacher))

    def _judged(self, row: Row) -> Item:
        """A record that is there already, by the same rules; its answer's hash is looked at where it has one."""
        outcomes = []
        for pair in row.pairs:
            text = mended(pair.answer, self.options.grammar) if self.options.fix else pair.answer
            parsed = self.options.grammar.parse(text)
            response = parsed.texts.get("response", "")
            candidate = Candidate(
                text, pair.prompt, response, pair.label, "vanilla", text, grammar=self.options.grammar,
                glosses=self.teacher.template.glosses, think_script=self.teacher.think_script,
                length=None if self.teacher.fits is None else self.teacher.fits(pair, text),
                max_length=self.options.max_length, judge=self.teacher.judge,
            )  # fmt: skip
            found = findings(candidate, self.teacher.level)
            if self._other_answer(row.record, response):
                found["V08"] = "the answer is not the one whose hash the row has"
            texts = None if found else dict(parsed.texts)
            outcomes.append(Outcome(texts, found, 0, raw=text))
        return Item(row, outcomes=outcomes)

    @staticmethod
    def _other_answer(record: Record, response: str) -> bool:
        said = record.data.get("coca")
        if not isinstance(said, dict) or said.get("response_source") != "vanilla":
            return False
        return isinstance(said.get("vanilla_sha256"), str) and said["vanilla_sha256"] != answer_digest(response)

    # -- settled ------------------------------------------------------------------------------------------------------
    def settle(self, item: Item, out: Output) -> None:
        """Write a row, or note why not. Raises: BadData for what ends the run."""
        record = item.row.record
        if self.options.emit_requests:
            self._emit(item, out)
            return
        if item.problem is not None:
            self._leave_out(record, record.bad(item.problem.reason, item.problem.advice, item.problem.field))
            return
        outcomes = item.outcomes or []
        codes = item.codes or {code: why for one in outcomes for code, why in one.codes.items()}
        self.tally.take(outcomes, codes)
        if not codes:
            out.write(self._accepted(item.row, outcomes))
            return
        raw = [one.raw for one in outcomes if one.raw]
        out.reject(record, codes, raw if raw and self.options.log_text else None)
        if self.options.on_reject == "fail":
            told = ", ".join(f"{code} ({why})" for code, why in codes.items())
            raise record.bad(f"rejected: {told}", "--on-reject drop leaves such rows out")
        if self.options.on_reject == "keep-vanilla" and "unsafe_vanilla" not in codes:
            self.tally.kept += 1
            meta = {"coca": {"kept": "vanilla", "codes": sorted(codes)}} if self.options.meta else {}
            out.write({**record.data, "id": record.id, **meta})

    def _accepted(self, row: Row, outcomes: list[Outcome]) -> dict[str, Any]:
        options = self.options
        if options.verify_only:
            return row.replaced([one.raw for one in outcomes]) if options.fix else row.record.data
        return enhanced(row, outcomes, self.ablation, self)

    def _emit(self, item: Item, out: Output) -> None:
        from toolbox.models.endpoint import Service, batch_line

        if item.codes:
            self.tally.take([], item.codes)
            out.reject(item.row.record, item.codes, None)
        elif item.ask is not None:
            self.tally.take([], {})
            service = Service(self.options.base_url or "http://localhost/v1", self.options.model)
            ask = item.ask
            out.write(batch_line(service, ask.request(), self.sampling.decoding(ask)))

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.options.temperature, seed=self.options.seed)

    def tag_tokens(self) -> dict[str, Any]:
        """Whether the student's tokenizer spells each tag alike alone and in a record."""
        fits = self.teacher.fits
        return {} if fits is None else {"tags_alike": fits.tags_alike(self.options.grammar)}


def make_teacher(options: Options, template: Template) -> Teacher:
    fits = None
    if options.tokenizer is not None:
        from toolbox.coca.student import Student

        fits = Student(options.tokenizer, trust_remote_code=options.trust_remote_code)
    return Teacher(
        template, options.decoding, options.response_source == "splice", options.label_hint, options.verify,  # type: ignore[arg-type]
        options.max_attempts, options.max_tokens, SCRIPTS.get(options.think_lang or ""), options.max_length, fits,
    )  # fmt: skip

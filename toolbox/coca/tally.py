"""What a run of coca-refactor counts: rows in, rows out, codes, tokens, and whether the teacher repeats itself."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from toolbox.coca.teacher import Outcome
from toolbox.coca.verify import COLLAPSE
from toolbox.shell.progress import Reporter

MEANINGS = {
    "unsafe_vanilla": "labelled harmful, and the answer does not refuse",
    "false_alarm": "labelled benign, and the answer refuses",
    "V01": "tags missing, twice, out of order, unclosed, or text outside them",
    "V02": "a tag where none belongs",
    "V03": "the list of concepts",
    "V04": "an unsafe concept that is not among the concepts",
    "V05": "unsafe concepts and decision disagree",
    "V06": "decision and answer disagree",
    "V07": "decision and label disagree",
    "V08": "the answer is not the one that was given",
    "V09": "the think is not about the request",
    "V10": "a payload in the reasoning",
    "V11": "the teacher did not come to an end",
    "V12": "the teacher refused to annotate",
    "V13": "the think is in another script",
    "V14": "too long for the student",
}


class Tally:
    """Counts of a run. ``rows`` = ``accepted`` + ``rejected``; bad records are counted apart."""

    def __init__(self) -> None:
        self.rows = self.accepted = self.rejected = self.kept = 0
        self.codes: Counter[str] = Counter()
        self.earlier: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.attempts: Counter[int] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self._thinks: Counter[bytes] = Counter()

    def take(self, outcomes: Iterable[Outcome], codes: Mapping[str, str]) -> None:
        """Count one row: rejected where it has codes."""
        self.rows += 1
        if codes:
            self.rejected += 1
            self.codes.update(list(codes))
            if "V07" in codes:
                self.missed[codes["V07"]] += 1
        else:
            self.accepted += 1
        for one in outcomes:
            self.earlier.update(one.broken)
            self.attempts[one.attempts] += 1
            self.prompt_tokens += one.usage.prompt_tokens
            self.completion_tokens += one.usage.completion_tokens
            if not codes and one.texts is not None:
                self.decisions[str(one.decision)] += 1
                self._thinks[hashlib.blake2b(one.texts["think"].encode(), digest_size=8).digest()] += 1

    @property
    def collapsed(self) -> int:
        """Accepted answers whose think is one that more than 2 % of them have: the teacher repeats itself."""
        bound = max(1.0, COLLAPSE * sum(self._thinks.values()))
        return sum(count for count in self._thinks.values() if count > bound)

    @property
    def share(self) -> float:
        """The accepted share of all rows, without those of a collapsed think; 1 of no rows."""
        return max(0, self.accepted - self.collapsed) / self.rows if self.rows else 1.0

    def record(self, skipped: int) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "rows": self.rows,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "kept_vanilla": self.kept,
            "bad": skipped,
            "share": round(self.share, 6),
            "codes": dict(sorted(self.codes.items())),
            "codes_of_earlier_attempts": dict(sorted(self.earlier.items())),
            "v07": dict(sorted(self.missed.items())),
            "decisions": dict(sorted(self.decisions.items())),
            "attempts": {str(number): count for number, count in sorted(self.attempts.items())},
            "same_think": self.collapsed,
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens},
        }

    def show(self, reporter: Reporter) -> None:
        """The counts for people."""
        if reporter.silent or not self.rows:
            return
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        kept = f", {self.kept} of them kept as they were" if self.kept else ""
        reporter.note(f"{self.rows} rows: {self.accepted} accepted, {self.rejected} rejected{kept}; {tokens}")
        if self.codes or self.earlier:
            reporter.show(self._table())
        if self.collapsed:
            reporter.warn(f"{self.collapsed} accepted answers share a think with others: the teacher repeats itself")

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title="why rows were rejected, and earlier tries", title_justify="left")
        for name, justify in (("code", "left"), ("rows", "right"), ("earlier tries", "right"), ("what", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for code in sorted({*self.codes, *self.earlier}):
            table.add_row(code, str(self.codes[code]), str(self.earlier[code]), MEANINGS.get(code, ""))
        return table


def write_summary(path: str, record: Mapping[str, Any]) -> None:
    """The counts as one JSON object in a file."""
    from toolbox.shell.files import atomic_file

    with atomic_file(path) as handle:
        handle.write(json.dumps(record, indent=2).encode() + b"\n")

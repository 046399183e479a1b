"""The matrix of docs/reliability.md, made of the table: ``python -m tests.faults.page`` writes it into the page."""

from __future__ import annotations

from collections.abc import Iterator

from tests.contract.commands import CASES
from tests.faults.table import TABLE, Fault
from tests.server import ROOT

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- made by python -m tests.faults.page -->\n", "<!-- end -->\n"


def tries(fault: Fault) -> int:
    """How often a fault is provoked in all."""
    return sum(fault.count(case) for case in fault.cases())


def quick(fault: Fault) -> int:
    """How many of those tries belong to the quick tests."""
    return sum(fault.count(case) for case in fault.cases() if fault.is_quick(case))


def _rows() -> Iterator[str]:
    yield "| | fault | promised | commands | tries | of them in `make test` |"
    yield "|---|---|---|---:|---:|---:|"
    family = ""
    for fault in TABLE:
        shown = "" if fault.family == family else f"**{fault.family}**"
        family = fault.family
        counts = (len(fault.cases()), tries(fault), quick(fault))
        yield "| " + " | ".join([shown, fault.name, fault.promised, *(f"{one:,}" for one in counts)]) + " |"
    total, soon = sum(map(tries, TABLE)), sum(map(quick, TABLE))
    yield f"| **All** | {len(TABLE)} faults | | {len(CASES)} | {total:,} | {soon:,} |"


def matrix() -> str:
    """The table as Markdown, between its marks."""
    return BEGIN + "".join(f"{row}\n" for row in _rows()) + END


def main() -> None:
    """Replace what stands between the marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + matrix() + rest.partition(END)[2])


if __name__ == "__main__":
    main()

"""Every fault of the table upon every command that it concerns."""

from __future__ import annotations

import pytest

from tests.contract.commands import CASES
from tests.faults import endpoints, models, places, test_fuzz
from tests.faults.bench import Bench, resumes
from tests.faults.page import PAGE, matrix
from tests.faults.table import TABLE, takes

PAIRS = [
    pytest.param(fault, case, id=f"{fault.check.__name__}-{case.name}",
                 marks=[] if fault.is_quick(case) else pytest.mark.slow)
    for fault in TABLE for case in fault.cases()
]  # fmt: skip


@pytest.fixture
def bench(tool, tiny, tmp_path) -> Bench:
    return Bench(tool, tiny, tmp_path)


@pytest.mark.parametrize(("fault", "case"), PAIRS)
def test_what_is_promised_is_kept(bench, fault, case):
    tried = list(fault.check(bench, case))
    assert len(tried) == fault.count(case)


def test_the_page_tells_of_this_table():
    page = " ".join(PAGE.read_text().split())
    assert matrix() in PAGE.read_text(), "run: python -m tests.faults.page"
    assert f"{test_fuzz.SLOW:,} lines ({test_fuzz.QUICK:,} in `make test`)" in page
    assert f"{test_fuzz.SLOW_RECIPES:,} recipes ({test_fuzz.QUICK_RECIPES:,})" in page


def test_every_command_that_can_go_on_ask_load_or_make_is_tried_with_that():
    """By its options, so that a new command cannot be forgotten."""
    for case in CASES.values():
        assert resumes(case) == takes(case, "--resume"), case.name
        assert endpoints.asks(case) == takes(case, "--base-url"), case.name
        loads = takes(case, "--model") and case.name not in models.WITHOUT
        assert models.loads(case) >= loads, case.name
    assert set(places.TWICE) <= set(CASES)

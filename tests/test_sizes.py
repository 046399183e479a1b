"""docs/scale.md: its tables are computed, and every command that runs in several processes is spoken of."""

from __future__ import annotations

import re

import pytest

from bench import sizes
from tests.server import ROOT
from toolbox.shell.described import all_commands, describe

PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_formulas():
    assert sizes.filled(PAGE) == PAGE, "run `make docs`"


def test_a_page_without_a_place_for_a_table_is_refused():
    with pytest.raises(SystemExit, match="<!-- fused -->"):
        sizes.filled(PAGE.replace("<!-- fused -->", ""))


def test_every_command_of_several_processes_says_what_carries_it():
    table = PAGE[PAGE.index("## Who is carried") : PAGE.index("Why ZeRO")]
    several = {one.name for one in map(describe, all_commands()) if "--num-processes" in str(one.options)}
    assert several <= set(re.findall(r"`([a-z-]+)`", table))


def test_sizes_follow_their_formulas():
    (run,) = (one for one in sizes.TRAINED if one.name == "SatImp")
    assert run.on_each == 6.74e9 * 16 / 8
    assert run.seconds == pytest.approx(8 * 6.74e9 * 2e6 / (8 * 312e12 * 0.4))
    assert sizes._time(89) == "89 s"
    assert sizes._time(90) == "1.5 min"
    assert sizes._gb(13.5e9) == "13.5 GB"

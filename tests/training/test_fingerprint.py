"""What an interrupted run and its continuation must share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from toolbox.shell.errors import UsageProblem
from toolbox.training.fingerprint import check_fingerprint, deciding, option_marks


@dataclass(frozen=True)
class Options:
    batch_size: int = 4
    globals_: tuple[str, ...] = ("cls",)
    out: str = "model"


def test_names_are_those_of_the_command_line():
    assert deciding(Options(), {"out"}) == {"batch_size": 4, "globals": ("cls",)}
    assert option_marks(Options(), {"out", "globals_"}) == {"--batch-size": 4}


def test_the_first_difference_is_named():
    saved = {"--batch-size": 4, "--globals": ["cls"]}
    check_fingerprint(saved, option_marks(Options(), {"out"}))
    with pytest.raises(UsageProblem, match="another --batch-size: was 4, now 8"):
        check_fingerprint(saved, option_marks(Options(batch_size=8), {"out"}))
    with pytest.raises(UsageProblem, match="another --seed: was None, now 3"):
        check_fingerprint(saved, {**saved, "--seed": 3})

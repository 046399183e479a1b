"""Comma lists of the command line."""

from __future__ import annotations

import pytest

from toolbox.shell.errors import UsageProblem
from toolbox.shell.lists import comma_list, names_in

KNOWN = ("cot", "lot1", "lot2")


@pytest.mark.parametrize(
    ("text", "names"),
    [(None, ()), ("", ()), (" , ,", ()), ("a", ("a",)), (" b ,a,", ("b", "a")), ("a,a", ("a", "a")), ("é;f", ("é;f",))],
)
def test_names_in(text, names):
    assert names_in(text) == names


def test_order_and_spaces():
    assert comma_list("variant", " lot2, cot ,", KNOWN) == ("lot2", "cot")
    assert comma_list("by", "model,whatever", ()) == ("model", "whatever")


@pytest.mark.parametrize(
    ("text", "known", "said", "advice"),
    [
        ("", KNOWN, "--variant names nothing", "any of cot, lot1, lot2, or all"),
        (" , ", (), "--variant names nothing", "as in model,dataset"),
        ("cot,LOT1", KNOWN, "--variant LOT1: not known", "any of cot, lot1, lot2, or all"),
        ("cot, cot", KNOWN, "--variant cot, cot: cot is there twice", "name each once"),
        ("x,y,x", (), "--variant x,y,x: x is there twice", "name each once"),
    ],
)
def test_refused(text, known, said, advice):
    with pytest.raises(UsageProblem) as caught:
        comma_list("variant", text, known, besides="all")
    assert (str(caught.value), caught.value.advice) == (said, advice)

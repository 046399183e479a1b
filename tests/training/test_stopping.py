"""--stop-when: a small language of its own."""

from __future__ import annotations

import pytest

from toolbox.shell.errors import UsageProblem
from toolbox.training.stopping import parse

NAMES = ["step", "loss", "forget_es", "retain_es", "old_prob"]


@pytest.mark.parametrize(
    ("text", "values", "start", "met"),
    [
        ("loss<.02", {"loss": 0.01}, {}, True),
        ("loss < 2e-2", {"loss": 0.02}, {}, False),
        ("loss<=.02", {"loss": 0.02}, {}, True),
        ("forget_es<=.1 and retain_es>=.9*start", {"forget_es": 0.1, "retain_es": 0.9}, {"retain_es": 1.0}, True),
        ("forget_es<=.1 and retain_es>=.9*start", {"forget_es": 0.1, "retain_es": 0.89}, {"retain_es": 1.0}, False),
        ("retain_es>=start*.9", {"retain_es": 0.45}, {"retain_es": 0.5}, True),
        ("old_prob<start", {"old_prob": 0.2}, {"old_prob": 0.3}, True),
        ("old_prob<start", {"old_prob": 0.2}, {}, False),
        ("old_prob<.5", {}, {}, False),
        ("step>=3", {"step": 3}, {}, True),
    ],
)
def test_conditions(text, values, start, met):
    assert parse(text, NAMES).met(values, start) is met


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected NAME"),
        ("loss", "expected NAME"),
        ("loss<", "expected NAME"),
        ("loss<x", "expected a number"),
        ("loss<start", "expected a number"),
        ("gain<1", "`gain` is not one of forget_es, loss"),
        ("loss<1 or step>2", "joined by `and`"),
        ("loss<1 and", "expected NAME"),
        ("__import__('os')", "not understood"),
        ("loss<1*", "expected a number"),
        ("retain_es>=.9*start*start", "expected a number"),
        ("loss==1", "not understood"),
    ],
)
def test_what_is_not_in_the_language_is_refused(text, says):
    with pytest.raises(UsageProblem, match=says.replace("(", r"\(")):
        parse(text, NAMES)


def test_it_tells_when_it_can_be_judged():
    assert not parse("loss<1 and step>3", NAMES).needs_evaluation
    assert parse("loss<1 and forget_es<.2", NAMES).needs_evaluation

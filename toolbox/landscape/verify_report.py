"""What landscape-verify tells people: a short table, plain sentences, and a report in Markdown.

The sentences say first what is not there: no skill within questions, no gain over a fair vote, too few questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolbox.landscape.judge import DRAWS, FEW_QUESTIONS, SIGNIFICANT, Control, Evaluation, Quality
from toolbox.shell.errors import clean
from toolbox.stats import Interval

if TYPE_CHECKING:
    from toolbox.landscape.verifier import Recipe

NAMES = {"rf": "random forest", "logreg": "logistic regression"}

_EXACT_AT = math.floor(-math.log2(SIGNIFICANT / 2))
"""Up to so many questions not even an AUC above .5 in each has a two-sided p below .05: 2/2^n."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the scores came about. ``folds`` is None for a loaded verifier, and then ``seen`` is the number of judged
    questions that it was trained on; ``group`` the field that folds keep together; counts are of paths."""

    recipe: Recipe
    scorer: str
    folds: int | None
    group: str
    seed: int
    seen: int = 0
    without_thoughts: int = 0
    without_answer: int = 0
    without_gold: int = 0
    control_trees: int | None = None


@dataclass(frozen=True)
class Sheet:
    """A table in words: the first column names, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


# --- figures in words -------------------------------------------------------------------------------------------------


def share(value: float | None, digits: int = 3) -> str:
    """``.531``, ``1.000``, ``−.020``; empty for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text.removeprefix("0") if text.startswith("0.") else text.replace("-0.", "−.", 1)


def share_with_interval(interval: Interval | None) -> str:
    if interval is None:
        return "none"
    return share(interval.estimate) + (
        "" if math.isnan(interval.low) else f" [{share(interval.low)}, {share(interval.high)}]"
    )


def percent(interval: Interval) -> str:
    """``61.9 [57.6, 66.0]``."""
    text = f"{100 * interval.estimate:.1f}"
    return text if math.isnan(interval.low) else f"{text} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval) -> str:
    """``−0.4 [−1.4, +0.5]``, in percentage points."""
    if _no_width(interval):
        return "0.0, no poll differs"
    bounds = "" if math.isnan(interval.low) else f" [{_signed(interval.low)}, {_signed(interval.high)}]"
    return _signed(interval.estimate) + bounds


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _p(value: float | None) -> str:
    return "" if value is None else "<.001" if value < 0.001 else share(value)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# --- sentences --------------------------------------------------------------------------------------------------------


def verdict(evaluation: Evaluation, setup: Setup) -> list[str]:
    """What the figures say, a sentence each: skill within questions, gain over the vote, whether questions are few.

    Nothing is concluded from questions that a loaded verifier was trained on.
    """
    if setup.seen:
        return [
            f"Nothing is shown: the verifier was trained on {setup.seen} of these {evaluation.questions} questions."
        ]
    return [_skill(evaluation), _gain(evaluation), *_too_few(evaluation)]


def _skill(evaluation: Evaluation) -> str:
    own = evaluation.verifier
    if own.within is None:
        return "No skill can be shown: no question has both right and wrong paths."
    told = f"within a question its AUC is {share_with_interval(own.within)}, chance is .5 (p {_p(own.p)})"
    control = evaluation.control
    if control is not None and control.within:
        told += f"; learned from shuffled labels it is {_range(control.within)}"
    return f"Skill: {told}." if evaluation.has_skill else f"No skill: {told}."


def _range(values: Sequence[float]) -> str:
    return f"{share(min(values), 2)} to {share(max(values), 2)}"


def _gain(evaluation: Evaluation) -> str:
    if _no_width(evaluation.gain):
        return "No gain over a fair vote: votes weighted by the score are right where the plurality is."
    p = _p(evaluation.gain_p)
    told = f"votes weighted by the score are {points(evaluation.gain)} points from the plurality (p {p})"
    match evaluation.has_gain:
        case True:
            return f"Gain: {told}."
        case False:
            return f"Loss: {told}."
    because = ", by scores without skill" if evaluation.gain.low > 0 and not evaluation.has_skill else ""
    return f"No gain over a fair vote is shown: {told}{because}."


def _no_width(gain: Interval) -> bool:
    """Whether no poll's outcome differs: resampling then has no spread to show, which is no certainty."""
    return gain.low == gain.high == 0


def _too_few(evaluation: Evaluation) -> Iterator[str]:
    n = evaluation.verifier.questions
    both = f"{_count(n, 'question')} with both right and wrong paths"
    if 0 < n <= _EXACT_AT:
        yield f"{both}: too few to show skill, whatever the figures."
    elif _EXACT_AT < n < FEW_QUESTIONS:
        yield f"{both}: few, so that intervals are too narrow and one question more may change the verdict."


# --- tables -----------------------------------------------------------------------------------------------------------


def sheets(evaluation: Evaluation, setup: Setup) -> Iterator[Sheet]:
    """The table of scores and the table of accuracies."""
    control = evaluation.control
    rows = [_row(evaluation.verifier)]
    if control is not None and control.within:
        rows.append(_control_row(control))
    rows += [_row(one) for one in evaluation.free]
    held_out = "held-out questions" if setup.folds is not None else "a loaded verifier"
    yield Sheet(
        f"Scores, {held_out}: does a right path get a higher one than a wrong path?",
        ("score", "AUC within a question", "p", "pooled AUC", "Brier", "best of r %"),
        tuple(rows),
    )
    accuracies = [(name, percent(found)) for name, found in evaluation.accuracies.items()]
    yield Sheet(
        f"Accuracy over {_count(evaluation.polls, 'poll')} of {_count(evaluation.questions, 'question')}",
        ("answer of a poll", "accuracy %"),
        (*accuracies, ("weighted − plurality", points(evaluation.gain))),
    )


def _row(found: Quality) -> tuple[str, ...]:
    within = share_with_interval(found.within)
    return (found.name, within, _p(found.p), share(found.pooled), share(found.brier), percent(found.best))


def _control_row(control: Control) -> tuple[str, ...]:
    n = len(control.within)
    means = [share(sum(values) / n) for values in (control.within, control.pooled)]
    return (f"labels shuffled, mean of {n}", f"{means[0]} ({_range(control.within)})", "", means[1], "", "")


def renderables(evaluation: Evaluation, setup: Setup) -> Iterator[Any]:
    """The tables for stderr, as rich renderables."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    for sheet in sheets(evaluation, setup):
        drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for place, name in enumerate(sheet.header):
            drawn.add_column(Text(name), justify="right" if place else "left", no_wrap=not place)
        for row in sheet.rows:
            drawn.add_row(*map(Text, row))
        yield Group(Text(sheet.title, style="bold"), drawn)


# --- the report -------------------------------------------------------------------------------------------------------


def markdown(evaluation: Evaluation, setup: Setup) -> str:
    """The report: what was judged, the sentences, both tables, and how the figures came about."""
    parts = ["# landscape-verify", _escaped(about(evaluation, setup))]
    parts.append("\n".join(f"- **{_escaped(one)}**" for one in verdict(evaluation, setup)))
    for sheet in sheets(evaluation, setup):
        head = f"| {' | '.join(map(_escaped, sheet.header))} |"
        rule = "|---|" + "--:|" * (len(sheet.header) - 1)
        body = [f"| {' | '.join(map(_escaped, row))} |" for row in sheet.rows]
        parts.append("\n".join([f"## {_escaped(sheet.title)}", "", head, rule, *body]))
    parts.append("\n".join(f"- {_escaped(note)}" for note in _notes(evaluation, setup)))
    return "\n\n".join(parts) + "\n"


def about(evaluation: Evaluation, setup: Setup) -> str:
    """One line: how many paths were judged, by what."""
    made = (
        f"{_count(setup.folds, 'fold')} over {setup.group}" if setup.folds is not None else "loaded, nothing was fitted"
    )
    recipe = setup.recipe
    return (
        f"{_count(evaluation.scored, 'path')} of {_count(evaluation.questions, 'question')} judged: "
        f"{NAMES[recipe.kind]} on {recipe.n_features} numbers a path ({recipe.feature_set}), {made}; "
        f"states scored by {setup.scorer}."
    )


def counts(setup: Setup) -> Iterator[str]:
    """What happened to paths that lack something, a sentence each."""
    for count, told in (
        (setup.without_thoughts, "without thoughts: no score; what they answer votes in pluralities"),
        (setup.without_answer, "without an answer: wrong, and no vote except where blanks vote"),
        (setup.without_gold, "of questions without a right answer: scored, not judged"),
    ):
        if count:
            yield f"{_count(count, 'path')} {told}."


def _notes(evaluation: Evaluation, setup: Setup) -> Iterator[str]:
    yield from counts(setup)
    if setup.folds is not None:
        yield f"Each score is of a model that saw no path of the question: all paths of one {setup.group} share a fold."
    elif setup.seen:
        yield f"The verifier was trained on {setup.seen} of these questions: these are not held-out figures."
    yield (
        "A poll is the paths of one question, model and variant. AUC within a question: the share of pairs of a right "
        "and a wrong path of one poll in which the right one scores higher, ties half, a mean over polls that have "
        f"both. Intervals are 95 %, of {DRAWS:,} bootstrap draws of whole questions (seed {setup.seed}); p from "
        "flipping the signs of whole questions."
    )
    yield (
        "The pooled AUC mixes questions: it rises where a score tells easy questions from hard ones, which decides "
        "nothing within a question, and in cross-validation over few questions a useless score falls below .5."
    )
    if evaluation.control is not None and evaluation.control.within:
        how = (
            "verifiers learned labels shuffled inside polls" if setup.folds is not None else "the same scores met them"
        )
        trees = f" (forests of {setup.control_trees} trees)" if setup.control_trees is not None else ""
        yield f"Labels shuffled: {how}{trees}; skill has to exceed every one of them."
    yield (
        "Skill is said where the AUC within a question is above .5 with p < .05 and above all controls; gain where the "
        "interval of weighted − plurality lies above 0 with p < .05 and there is skill."
    )


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", clean(text))

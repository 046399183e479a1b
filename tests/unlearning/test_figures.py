"""The figures show every model where its numbers put it, say so in words, and come out the same twice."""

from __future__ import annotations

import math
import re

import matplotlib
import pytest

from toolbox.plot_style import looks
from toolbox.shell.errors import UsageProblem
from toolbox.stats import Interval
from toolbox.unlearning.figures import draw_survival, draw_tradeoff


def line(model, forget, retain, method=None, **options):
    es = {"forget": forget, "forget_paraphrased": None, "retain": retain}
    bounds = {
        name: value if value is None else {"low": max(0, value - 0.05), "high": min(1, value + 0.05), "n": n}
        for (name, value), n in zip(es.items(), (16, None, 56), strict=True)
    }
    run = None if method is None else {"method": method, "options": options}
    return {"model": model, "n": {"forget": 16, "retain": 56}, "es": es, "intervals": {"es": bounds}, "run": run}


LINES = [
    line("target", 1.0, 1.0),
    line("u2", 0.18, 0.97, "satimp", alpha=1.0),
    line("u0", 0.05, 0.74, "satimp", alpha=0),
    line("u1", 0.10, 0.93, "satimp", alpha=0.1),
    line("g1", 0.17, 0.99, "gru", alpha=0.1),
]


def drawn(figure):
    """(x, y, marker, colour) of every single mark."""
    return [
        (float(one.get_xdata()[0]), float(one.get_ydata()[0]), one.get_marker(), one.get_color())
        for one in figure.axes[0].lines
        if len(one.get_xdata()) == 1
    ]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


# --- trade-off ---


def test_every_model_stands_where_its_two_numbers_put_it_and_methods_look_alike():
    figure = draw_tradeoff(LINES, None, "Trade-off")
    marks = drawn(figure)
    assert [mark[:2] for mark in marks[:-1]] == [(one["es"]["forget"], one["es"]["retain"]) for one in LINES]
    assert marks[1][2:] == marks[2][2:] == marks[3][2:] != marks[4][2:] != marks[0][2:]
    assert texts(figure)[:5] == ["target", "u2", "u0", "u1", "g1"]
    assert legend(figure) == ["satimp", "gru", "95 % interval"]
    axes = figure.axes[0]
    assert "ES forget (n=16)" in axes.get_xlabel()
    assert "ES retain (n=56)" in axes.get_ylabel()


def test_a_rectified_objective_is_told_from_the_bare_one():
    lines = [line("a", 0.2, 0.6, "ga", rectify=False), line("b", 0.2, 0.9, "ga", rectify=True)]
    assert legend(draw_tradeoff(lines, None))[:2] == ["ga", "ga, rectified"]


def test_the_wanted_corner_is_marked_and_in_sight():
    figure = draw_tradeoff(LINES, None)
    assert drawn(figure)[-1][:3] == (0.0, 1.0, "*")
    assert "all forgotten, all kept" in texts(figure)
    assert figure.axes[0].get_xlim()[0] < 0
    assert figure.axes[0].get_xlim()[1] > 1  # the target's mark is whole
    assert figure.axes[0].get_ylim()[0] < 0.69  # where the lowest interval ends
    assert figure.axes[0].get_ylim()[1] > 1


def test_a_swept_setting_is_joined_in_its_order():
    figure = draw_tradeoff(LINES, None, sweep="alpha")
    joined = [one for one in figure.axes[0].lines if len(one.get_xdata()) > 1]
    assert [(list(one.get_xdata()), list(one.get_ydata())) for one in joined] == [
        ([0.05, 0.10, 0.18], [0.74, 0.93, 0.97])
    ]
    assert {"target", "alpha 0", "alpha 0.1", "alpha 1.0"} == set(texts(figure)) - {"all forgotten, all kept"}
    words = [line("a", 0.1, 0.9, "gru", scope="tensor"), line("b", 0.2, 0.8, "gru", scope="layer")]
    assert texts(draw_tradeoff(words, None, sweep="scope"))[:2] == ["scope layer", "scope tensor"]


def test_intervals_are_drawn_where_they_are_known():
    def bars(lines):
        found = draw_tradeoff(lines, None).axes[0].collections
        return sorted(tuple(map(tuple, one.get_segments()[0])) for one in found)

    one = line("u", 0.5, 0.9, "satimp")
    assert bars([one]) == [
        (pytest.approx((0.45, 0.9)), pytest.approx((0.55, 0.9))),
        (pytest.approx((0.5, 0.85)), pytest.approx((0.5, 0.95))),
    ]
    for unknown in (None, {"low": None, "high": None, "n": 1}):
        one["intervals"]["es"]["forget"] = unknown
        assert len(bars([one])) == 1
    assert bars([one | {"intervals": {}}]) == []


def test_models_without_both_numbers_are_left_out():
    with_gap = [*LINES, line("log", None, 0.9), line("other", 0.5, None), {"model": "bare", "es": None}]
    assert len(drawn(draw_tradeoff(with_gap, None))) == len(drawn(draw_tradeoff(LINES, None)))
    with pytest.raises(ValueError, match="a trade-off needs"):
        draw_tradeoff(with_gap[len(LINES) :], None)


def test_a_model_of_another_kind_of_run_is_a_point_as_well():
    figure = draw_tradeoff(
        [line("tuned", 0.9, 0.95, None), {"model": "plain", "es": {"forget": 0.2, "retain": 1.0}}], None
    )
    assert texts(figure)[:2] == ["tuned", "plain"]


# --- survival ---


def es(value, n=16):
    return Interval(value, max(0, value - 0.1), min(1, value + 0.1), n)


MODELS = {
    "GA": {"as is": es(0.15), "at equal retention": es(0.4), "relearned": es(0.6, 12), "4 bits": es(0.2)},
    "GRU(GA)": {"as is": es(0.16), "at equal retention": None, "relearned": es(0.7, 12)},
}


def test_a_mark_for_each_trial_that_was_made():
    figure = draw_survival(MODELS, None, "What survives")
    look = looks(MODELS["GA"])
    expected = [
        (value.estimate, look[trial].marker, look[trial].colour)
        for found in MODELS.values()
        for trial, value in found.items()
        if value is not None
    ]
    marks = drawn(figure)
    assert sorted((x, marker, colour) for x, _, marker, colour in marks) == sorted(expected)
    # A model's marks stand in its own row, in the order of the trials.
    assert [round(y) for _, y, _, _ in marks] == [0] * 4 + [1] * 2
    assert [y for _, y, _, _ in marks] == sorted(y for _, y, _, _ in marks)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["GA", "GRU(GA)"]
    assert axes.get_ylim() == (1.5, -0.5)  # from top to bottom
    assert legend(figure) == [
        "as is (n=16)", "at equal retention (n=16)", "relearned (n=12)", "4 bits (n=16)", "95 % interval",
    ]  # fmt: skip


def test_an_interval_that_is_not_known_is_not_drawn():
    figure = draw_survival({"one": {"as is": Interval(0.5, math.nan, math.nan, 1)}}, None)
    assert figure.axes[0].collections[:] == []
    assert legend(figure) == ["as is (n=1)"]


def test_nothing_measured_is_no_figure():
    for nothing in ({}, {"GA": {}}, {"GA": {"as is": None}}):
        with pytest.raises(ValueError, match="nothing was measured"):
            draw_survival(nothing, None)


# --- files ---

FIGURES = {
    "tradeoff": lambda path: draw_tradeoff(LINES, path, "Trade-off", sweep="alpha"),
    "survival": lambda path: draw_survival(MODELS, path, "What survives"),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_equal_figures_have_equal_bytes_and_leave_the_users_style_alone(draw, tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name)
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_is_drawn_is_also_said_in_words(tmp_path):
    for name, words in (
        ("tradeoff", ["satimp, alpha 0.1: ES forget (n=16) .10", "gru, alpha 0.1", "ES retain (n=56) .93"]),
        ("survival", ["GA: as is .15", "relearned .70", "GRU(GA): as is .16"]),
    ):
        FIGURES[name](tmp_path / f"{name}.svg")
        said = re.search("<dc:description>(.*?)</dc:description>", (tmp_path / f"{name}.svg").read_text(), re.DOTALL)
        for one in words:
            assert one in said.group(1), (one, said.group(1))


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_an_unknown_kind_of_file_is_refused(draw, tmp_path):
    with pytest.raises(UsageProblem, match="gif"):
        draw(tmp_path / "figure.gif")
    assert not list(tmp_path.iterdir())

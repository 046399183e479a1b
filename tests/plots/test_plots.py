"""Figures: files that parse, say what they show, come out the same twice, and whose labels cover nothing."""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from toolbox.plot_labels import place, spread
from toolbox.plot_style import looks, short, written
from toolbox.plots import FORMATS, Panel, Point, Series, curves, plot_format, save, scatter
from toolbox.shell.errors import CannotCreate, UsageProblem

STEPS = [0, 2, 4]
FORGET = Series("forget", STEPS, [1.0, 0.12, 0.08], [0.9, 0.05, 0.03], [1.0, 0.3, 0.15], n=8)
RETAIN = Series("retain", STEPS, [1.0, 0.99, 0.97], [0.98, 0.95, 0.9], [1.0, 1.0, 1.0], n=16)
NEIGHBOURS = Series("neighbours", STEPS, [1.0, 1.0, 0.98], [1.0, 1.0, 0.94], [1.0, 1.0, 1.0], n=8)
SETS = [FORGET, RETAIN, NEIGHBOURS]
PANELS = [Panel("Extraction strength", "ES", SETS, ylim=(0, 1)), Panel("Probability", "P", SETS, ylim=(0, 1))]


def two_panels(path: Path | None = None):
    return curves(PANELS, xlabel="step", title="Forgetting two people", path=path)


def trade_off(path: Path | None = None, **options):
    points = [
        Point(f"β₂ {beta}", x, y, (x - 0.05, x + 0.05), (y - 0.02, y + 0.02), n=40, group=group)
        for group, y0 in (("SatImp", 0.95), ("GradDiff", 0.93))
        for beta, x, y in ((0, 0.1, y0 - 0.06), (0.1, 0.15, y0 - 0.04), (1, 0.3, y0 - 0.01), (5, 0.4, y0))
    ]
    return scatter(points, xlabel="ES forget", ylabel="ES retain", join=True, path=path, **options)


def comments(path: Path) -> list[str]:
    """The words an SVG draws: matplotlib notes each before its outlines."""
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", path.read_text(encoding="utf-8"), re.DOTALL)]


def boxes(figure, texts) -> list:
    renderer = figure.canvas.get_renderer()
    return [Text.get_window_extent(text, renderer) for text in texts]


# --- files ---


def test_an_svg_is_xml_that_says_labels_n_and_intervals(tmp_path: Path) -> None:
    two_panels(tmp_path / "demo.svg")
    root = ElementTree.parse(tmp_path / "demo.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}title").text == "Forgetting two people"
    told = next(root.iter("{http://purl.org/dc/elements/1.1/}description")).text
    assert "forget (n=8): 1.00 [.90, 1.00] at step 0, .08 [.03, .15] at step 4" in told
    drawn = comments(tmp_path / "demo.svg")
    for words in ("forget (n=8)", "retain (n=16)", "neighbours (n=8)", "95 % interval", "Extraction strength", "step"):
        assert words in drawn
    assert drawn.count("forget (n=8)") == 1  # one legend for both panels
    assert {".08", ".97", ".98"} <= set(drawn)  # where the lines end
    assert not list(root.iter("{http://www.w3.org/2000/svg}text"))  # outlines: no font is needed to see it


def test_a_png_is_whole_and_says_what_it_shows(tmp_path: Path) -> None:
    two_panels(tmp_path / "demo.png")
    data = (tmp_path / "demo.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0]
        chunks.setdefault(kind, b"")
        chunks[kind] += body
        position += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (1050, 480)  # 7 x 3.2 inches at 150 dpi
    assert b"retain (n=16)" in chunks[b"tEXt"]
    assert b"IEND" in chunks


def test_a_pdf_is_one(tmp_path: Path) -> None:
    two_panels(tmp_path / "demo.pdf")
    data = (tmp_path / "demo.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    assert data.rstrip().endswith(b"%%EOF")
    assert b"CreationDate" not in data
    assert b"/Type /Page" in data


@pytest.mark.parametrize(
    ("draw", "kind"), [(two_panels, "svg"), (two_panels, "png"), (two_panels, "pdf"), (trade_off, "svg")]
)
def test_drawn_twice_and_saved_twice_the_bytes_are_equal(draw, kind: str, tmp_path: Path) -> None:
    figure = draw(tmp_path / f"a.{kind}")
    draw(tmp_path / f"b.{kind}")
    save(figure, tmp_path / f"c.{kind}")
    first = (tmp_path / f"a.{kind}").read_bytes()
    assert (tmp_path / f"b.{kind}").read_bytes() == first
    assert (tmp_path / f"c.{kind}").read_bytes() == first


def test_another_process_draws_the_same_bytes_without_pyplot_and_importing_costs_it_nothing(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "import toolbox.plots as plots\n"
        "heavy = {'numpy', 'matplotlib', 'scipy', 'torch', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "plots.plot_format('a.svg')\n"
        "assert 'matplotlib' not in sys.modules\n"
        "for kind in ('svg', 'png', 'pdf'):\n"
        "    plots.scatter([plots.Point('a', 0, 1, n=3)], xlabel='x', ylabel='y', path=f'{sys.argv[1]}.{kind}')\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # strings hash otherwise than here
        check=True,
        cwd=Path(__file__).parents[2],
    )
    for kind in FORMATS:
        scatter([Point("a", 0, 1, n=3)], xlabel="x", ylabel="y", path=tmp_path / f"here.{kind}")
        assert (tmp_path / f"here.{kind}").read_bytes() == (tmp_path / f"there.{kind}").read_bytes()


def test_a_users_settings_change_nothing_and_are_left_alone(tmp_path: Path) -> None:
    two_panels(tmp_path / "a.svg")
    own = {"font.size": 30, "axes.grid": False, "svg.fonttype": "none", "axes.facecolor": "red", "xtick.major.size": 20}
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        two_panels(tmp_path / "b.svg")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("name", ["figure.jpg", "figure", "figure.svg.gz", "svg"])
def test_a_suffix_that_is_none_of_ours_is_a_usage_problem_that_names_ours(name: str, tmp_path: Path) -> None:
    for attempt in (
        lambda path: curves(PANELS, xlabel="step", path=path),
        lambda path: scatter([Point("a", 0, 0)], xlabel="x", ylabel="y", path=path),
        lambda path: save(Figure(), path),
        plot_format,
    ):
        with pytest.raises(UsageProblem) as caught:
            attempt(tmp_path / name)
        assert caught.value.exit_code == 2
        assert all(f".{kind}" in caught.value.advice for kind in FORMATS)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_is_read_in_any_case() -> None:
    assert [plot_format(name) for name in ("a.SVG", "b.v2.Png", Path("c.pdf"))] == ["svg", "png", "pdf"]


def test_a_failure_leaves_the_earlier_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "demo.png"
    figure = two_panels(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(MemoryError):
        save(figure, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo.png"]
    with pytest.raises(CannotCreate):
        two_panels(tmp_path / "nowhere" / "demo.png")


# --- curves ---


def test_bands_and_lines_are_where_the_numbers_are() -> None:
    figure = two_panels()
    assert len(figure.axes) == 2
    for axes in figure.axes:
        bands = [artist for artist in axes.collections if isinstance(artist, PolyCollection)]
        assert len(bands) == 3
        corners = {tuple(corner) for corner in bands[0].get_paths()[0].vertices.round(6).tolist()}
        assert {(0, 0.9), (2, 0.05), (4, 0.03), (4, 0.15), (2, 0.3)} <= corners
        assert [line.get_ydata().tolist() for line in axes.lines] == [list(series.y) for series in SETS]
        low, high = axes.get_ylim()
        assert -0.1 < low < 0
        assert 1 < high < 1.1


def test_a_label_looks_the_same_in_every_panel_and_unlike_any_other() -> None:
    figure = curves(
        [Panel("a", "y", [FORGET, RETAIN]), Panel("b", "y", [NEIGHBOURS, RETAIN])],
        xlabel="step",
    )
    (forget, retain), (neighbours, again) = (axes.lines for axes in figure.axes)
    look = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in (forget, retain, neighbours, again)]
    assert look[1] == look[3]
    for one, other in itertools.combinations(look[:3], 2):
        assert one[0] != other[0]
        assert one[1] != other[1]


def test_the_first_280_looks_differ_and_the_colours_stay_apart_for_the_colour_blind() -> None:
    many = list(looks(str(i) for i in range(280)).values())
    assert len({(look.colour, look.marker, look.dash) for look in many}) == 280
    # Deuteranopia and protanopia confuse red with green: seen without the red-green axis, by the matrices of
    # Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB.
    matrices = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    rgb = np.array([matplotlib.colors.to_rgb(look.colour) for look in many[:7]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for matrix in matrices.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        shown = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        for one, other in itertools.combinations(shown, 2):
            assert np.abs(one - other).max() > 0.1


def test_gaps_nulls_single_points_and_empty_panels_are_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    gap = Series("gap", [0, 1, 2, 3], [0.5, None, math.inf, 0.7], [0.4, None, math.nan, 0.6], [0.6, None, None, 0.8])
    single = Series("single", [1], [0.5], [0.3], [0.9], n=4)
    unknown = Series("unknown", [1], [0.5], [None], [None], n=1)
    never = Series("never", [0, 1], [None, None])
    panels = [
        Panel("gap", "y", [gap]), Panel("single", "y", [single, unknown]), Panel("never", "y", [never]),
        Panel("empty", "y", []), Panel("no steps", "y", [Series("none", [], [])]),
    ]  # fmt: skip
    figure = curves(panels, xlabel="step", path=tmp_path / "odd.svg")
    assert len(figure.axes) == 5
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, True, False]
    bar = next(artist for artist in figure.axes[1].collections if isinstance(artist, LineCollection))
    assert bar.get_segments()[0].tolist() == [[1, 0.3], [1, 0.9]]
    drawn = comments(tmp_path / "odd.svg")
    assert drawn.count("no data") == 3
    assert "single (n=4)" in drawn
    assert not len(recwarn)
    described = figure.get_label().splitlines()
    assert described[0].endswith("gap: .50 [.40, .60] at step 0, .70 [.60, .80] at step 3")
    assert described[2].endswith("never: no data")


def test_the_ends_of_the_x_scale_may_be_given_and_hold_for_all_panels() -> None:
    lines = [Series("a", [40, 60], [0.1, None]), Series("b", [60], [0.2])]
    figure = curves([Panel("P", "p", lines), Panel("Q", "q", lines)], xlabel="progress", xlim=(0, 100))
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert -10 < low <= 0
        assert 100 <= high < 110


def test_a_long_line_keeps_few_markers_and_a_lone_one_needs_no_legend(tmp_path: Path) -> None:
    loss = Series("loss", range(1, 601), np.exp(-np.arange(600) / 100))
    figure = curves([Panel("Loss", "mean loss of the step", [loss])], xlabel="step", path=tmp_path / "loss.svg")
    assert math.ceil(600 / figure.axes[0].lines[0].get_markevery()) <= 14
    assert not figure.legends
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_different_n_of_one_label_are_all_said(tmp_path: Path) -> None:
    panels = [Panel("a", "y", [FORGET]), Panel("b", "y", [Series("forget", [0, 1], [0, 1], n=400)])]
    curves(panels, xlabel="step", path=tmp_path / "n.svg")
    assert "forget (n=8/400)" in comments(tmp_path / "n.svg")


def test_hostile_labels_are_drawn_as_they_are(tmp_path: Path) -> None:
    label = "a<b & $x^$ --> \x1b[31mred\x1b[0m\x00 \udc80 " + "long " * 30
    panels = [Panel(label, label, [Series(label, [0], [1], n=2)])]
    figure = curves(panels, xlabel=label, title=label, path=tmp_path / "h.svg")
    for kind in ("png", "pdf"):
        save(figure, tmp_path / f"h.{kind}")
    scatter([Point(label, 0, 0, n=1, group=label)], xlabel=label, ylabel=label, path=tmp_path / "s.svg")
    ElementTree.parse(tmp_path / "h.svg")
    ElementTree.parse(tmp_path / "s.svg")
    assert written(label).startswith("a<b & $x^$ --> red ? long")
    assert len(written(label)) <= 48


@pytest.mark.parametrize("count", [1, 3, 9])
def test_nothing_in_a_figure_of_curves_overlaps(count: int) -> None:
    """End values, tick labels, titles and legend: no two texts share a pixel, none leaves the picture."""
    steps = range(5)
    many = [Series(f"variant {i}", steps, [0.9 + 0.001 * i + 0.01 * s for s in steps], n=396) for i in range(count)]
    figure = curves(
        [Panel("Pro", "accuracy", many, ylim=(0, 1)), Panel("Anti", "accuracy", many)], xlabel="step", title="T"
    )
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible() and text.get_window_extent().height > 0
    ]
    shown = [axes.get_xlim() for axes in figure.axes]
    assert shown[0] == shown[1]
    inside = [
        (text, box)
        for text, box in zip(texts, boxes(figure, texts), strict=True)
        if figure.bbox.padded(1).contains(box.x0, box.y0) and figure.bbox.padded(1).contains(box.x1, box.y1)
    ]
    ends = [text for axes in figure.axes for text in axes.texts]
    assert len(ends) == 2 * count
    assert {id(text) for text in ends} <= {id(text) for text, _ in inside}
    # Ticks beyond the limits exist but are not drawn.
    drawn = [
        (text, box)
        for text, box in inside
        if not any(
            text is tick.label1 and not (low - 1e-9 <= tick.get_loc() <= high + 1e-9)
            for axes in figure.axes
            for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
            for tick in axis.get_major_ticks()
        )
    ]
    for (one, first), (other, second) in itertools.combinations(drawn, 2):
        overlap = (
            min(first.x1, second.x1) - max(first.x0, second.x0),
            min(first.y1, second.y1) - max(first.y0, second.y0),
        )
        assert min(overlap) <= 1, (one.get_text(), other.get_text())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((("a"), [0, 1], [0]), "2 x but 1 y"),
        ((("a"), [0], [0], [0]), "one bound"),
        ((("a"), [0], [0], [0, 1], [1, 2]), "1 x but 2 low"),
        ((("a"), [math.nan], [0]), "x must be finite"),
    ],
)
def test_a_series_that_does_not_fit_is_refused(arguments: tuple, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Series(*arguments)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        curves([], xlabel="x")
    with pytest.raises(ValueError, match="at least one point"):
        scatter([], xlabel="x", ylabel="y")


# --- scatter ---


def test_a_trade_off_has_bars_in_both_directions_names_and_one_n(tmp_path: Path) -> None:
    figure = trade_off(tmp_path / "t.svg")
    (axes,) = figure.axes
    bars = [artist.get_segments()[0].round(6).tolist() for artist in axes.collections]
    assert [[0.05, 0.89], [0.15, 0.89]] in bars
    assert [[0.1, 0.87], [0.1, 0.91]] in bars
    assert len(bars) == 16
    drawn = comments(tmp_path / "t.svg")
    assert {"SatImp", "GradDiff", "95 % interval, n=40", "β₂ 0.1"} <= set(drawn)
    assert "SatImp, β₂ 0 (n=40): ES forget .10 [.05, .15], ES retain .89 [.87, .91]" in figure.get_label()
    differing = [Point("a", 0, 0, n=3), Point("b", 1, 1, n=4)]
    scatter(differing, xlabel="x", ylabel="y", xlim=(0, 1), path=tmp_path / "n.svg")
    assert {"a (n=3)", "b (n=4)"} <= set(comments(tmp_path / "n.svg"))


def test_names_cover_no_point_and_no_other_name() -> None:
    points = [Point(f"model {i}", *xy) for i, xy in enumerate(np.random.default_rng(0).random((20, 2)))]
    figure = scatter(points, xlabel="x", ylabel="y", xlim=(0, 1), ylim=(0, 1))
    (axes,) = figure.axes
    frames = boxes(figure, axes.texts)
    assert len(frames) == 20
    for one, other in itertools.combinations(frames, 2):
        assert not one.overlaps(other)
    spots = axes.transData.transform([(point.x, point.y) for point in points])
    for frame in frames:
        assert not any(frame.contains(*spot) for spot in spots)
        assert axes.bbox.padded(1).contains(frame.x0, frame.y0)
        assert axes.bbox.padded(1).contains(frame.x1, frame.y1)


def test_a_point_that_cannot_be_drawn_is_refused() -> None:
    for wrong in ({"x": math.nan, "y": 0}, {"x": 0, "y": 0, "y_interval": (1, 0)}, {"x": 0, "y": math.inf}):
        with pytest.raises(ValueError, match="cannot be drawn"):
            Point("a", **wrong)


# --- where labels go ---


def test_spread_keeps_order_gap_and_range_with_the_smallest_moves() -> None:
    generator = np.random.default_rng(1)
    for _ in range(100):
        wanted = generator.uniform(0, 100, size=6)
        found = np.array(spread(wanted.tolist(), 10, 0, 100))
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(found[order]) >= 10 - 1e-9).all()
        assert found.min() >= -1e-9
        assert found.max() <= 100 + 1e-9
        # No other arrangement with these gaps moves less: tried near the solution.
        cost = ((found - wanted) ** 2).sum()
        for _ in range(50):
            other = found + generator.normal(0, 2, size=6)
            if (np.diff(other[order]) >= 10).all() and other.min() >= 0 and other.max() <= 100:
                assert ((other - wanted) ** 2).sum() >= cost - 1e-9


def test_spread_leaves_alone_what_is_apart_and_stacks_what_is_equal() -> None:
    assert spread([70.0, 10.0, 40.0], 10, 0, 100) == [70, 10, 40]
    assert spread([50.0, 50.0, 50.0], 10, 0, 100) == [40, 50, 60]
    assert spread([100.0, 100.0], 10, 0, 100) == [90, 100]
    assert spread([], 10, 0, 100) == []


def test_place_keeps_its_distance_and_avoids_marks() -> None:
    spots, sizes = np.array([[50.0, 50.0]]), np.array([[30.0, 10.0]])
    frame = (0.0, 0.0, 200.0, 200.0)
    wall = np.stack(np.meshgrid(np.arange(50, 120, 2.0), np.arange(20, 90, 2.0)), axis=-1).reshape(-1, 2)
    centres, distances = place(spots, sizes, wall, frame, 1.0)
    assert centres[0, 0] + 15 <= 50  # to the left of the wall
    assert distances[0] == 7
    corner, _ = place(np.array([[199.0, 199.0]]), sizes, wall, frame, 1.0)
    assert (corner + sizes / 2 <= 200).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, ".00"),
        (0.081, ".08"),
        (-0.5, "-.50"),
        (0.999, "1.00"),
        (12.345, "12.35"),
        (1234.5, "1234"),
        (0.0012, "0.0012"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text

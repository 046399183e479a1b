"""Pictures: every panel shows something, wrong and correct differ without colour, few states are said."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

from tests.landscape.twins import SCORING, demo_features, path, question, random_features
from toolbox.landscape.features import assemble
from toolbox.landscape.metrics import facet_masks, panel_counts, tables
from toolbox.landscape.picture import draw_landscape, draw_metrics
from toolbox.landscape.project import LandscapeMap, map_rows, project, question_groups
from toolbox.shell.errors import UsageProblem

FEATURES = random_features(3, k=(4,) * 8, paths=10, longest=14, shortest=3)
EVERY = np.ones(len(FEATURES.path_ids), dtype=bool)


def pca(features, questions=None, kind="simplex") -> LandscapeMap:
    return project(map_rows(features, question_groups(features)[0] if questions is None else questions, kind), "pca")


@pytest.fixture(scope="module")
def landscape() -> LandscapeMap:
    return pca(FEATURES)


@pytest.fixture(scope="module")
def figure(landscape) -> Figure:
    return draw_landscape(landscape, FEATURES)


def panels(figure: Figure) -> list:
    """The axes of the map, without colour bars."""
    return [axes for axes in figure.axes if axes.get_title()]


def greys(figure: Figure) -> list[np.ndarray]:
    """Each panel's pixels without colour, its frame and title left out."""
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())[..., :3] @ [0.299, 0.587, 0.114]
    boxes = [axes.get_window_extent() for axes in panels(figure)]
    height = image.shape[0]
    return [image[height - int(b.y1) + 3 : height - int(b.y0) - 3, int(b.x0) + 3 : int(b.x1) - 3] for b in boxes]


def marker(axes) -> bytes:
    """The outline of the marker that the states are drawn with."""
    scatter = next(one for one in axes.collections if isinstance(one, PathCollection))
    return scatter.get_paths()[0].vertices.tobytes()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# --- the map ---


@pytest.mark.parametrize(("density", "bins"), [("kde", 5), ("hist", 2)])
def test_every_panel_shows_something_even_in_grey(landscape, figure, density, bins):
    if density == "hist":
        figure = draw_landscape(landscape, FEATURES, density=density, bins=bins)
    bare = draw_landscape(landscape, FEATURES, density=density, bins=bins, paths=~EVERY)
    assert len(panels(figure)) == 2 * bins
    for pixels, empty in zip(greys(figure), greys(bare), strict=True):
        assert min(pixels.shape) > 200
        assert pixels.var() > empty.var() + 100 > 100  # more than the landmarks, which are always there


def test_titles_tell_stage_states_and_paths(figure):
    counts = panel_counts(FEATURES, EVERY)
    for place, axes in enumerate(panels(figure)):
        row, stage = divmod(place, 5)
        stated, told = axes.get_title().split("\n")
        assert stated == f"{20 * stage}–{20 * stage + 20} % of the path"
        assert told.startswith(f"{counts[row, stage]} states, ")
        assert told.endswith(" paths")
    assert figure.get_suptitle() == "80 paths of 8 questions with 4 choices, 32 correct (.40)"
    assert [panels(figure)[place].get_ylabel() for place in (0, 5)] == ["wrong (48 paths)", "correct (32 paths)"]


def test_wrong_and_correct_differ_by_marker_and_name(figure):
    wrong, correct = panels(figure)[:5], panels(figure)[5:]
    assert len({marker(axes) for axes in wrong}) == len({marker(axes) for axes in correct}) == 1
    assert marker(wrong[0]) != marker(correct[0])
    assert texts(figure)[:2] == ["state, wrong path", "state, correct path"]


def test_landmarks_and_starts_have_markers_of_their_own(figure):
    for place, axes in enumerate(panels(figure)):
        drawn = [line.get_marker() for line in axes.lines]
        assert drawn[:4] == ["*", "X", "X", "X"]
        assert drawn[4:] == (["D"] if place % 5 == 0 else [])
    assert len(panels(figure)[0].lines[4].get_xdata()) == 8  # a start a question
    assert texts(figure)[-3:] == ["question alone", "right answer", "other answers"]


def test_darker_contours_are_denser_also_without_colour(figure):
    """The grey of the shades falls from the outermost to the innermost."""
    shaped = [axes for axes in panels(figure) if not axes.get_xlabel()]
    assert len(shaped) > 5
    for axes in shaped:
        filled = axes.collections[0]
        shades = np.atleast_2d(filled.get_facecolor())[:, :3] @ [0.299, 0.587, 0.114]
        assert len(shades) == 5
        assert (np.diff(shades) < -0.05).all()


def test_all_panels_and_facets_share_limits_and_landmarks(landscape):
    drawn = [
        draw_landscape(landscape, FEATURES, facet=facet, paths=mask, bins=2)
        for facet, mask in facet_masks(FEATURES, ["variant"])
    ]
    places = {
        (axes.get_xlim(), axes.get_ylim(), *(float(line.get_xdata()[0]) for line in axes.lines[:4]))
        for figure in drawn
        for axes in panels(figure)
    }
    assert len(places) == 1
    assert [figure.get_suptitle().split(":")[0] for figure in drawn] == ["cot", "lot2"]
    for figure, (_, mask) in zip(drawn, facet_masks(FEATURES, ["variant"]), strict=True):
        counts = panel_counts(FEATURES, mask, bins=2).ravel()
        assert [int(axes.get_title().split("\n")[1].split()[0]) for axes in panels(figure)] == counts.tolist()


def test_all_points_of_the_map_lie_inside_the_limits(landscape, figure):
    axes = panels(figure)[0]
    assert (landscape.xy > [axes.get_xlim()[0], axes.get_ylim()[0]]).all()
    assert (landscape.xy < [axes.get_xlim()[1], axes.get_ylim()[1]]).all()


def test_panels_of_few_states_say_so_and_show_no_shape(landscape, figure):
    noted = [bool(axes.get_xlabel()) for axes in panels(figure)]
    assert noted == (panel_counts(FEATURES, EVERY).ravel() < 20).tolist()
    few = np.zeros_like(EVERY)
    few[[0, 1, 4]] = True  # three wrong paths
    sparse = draw_landscape(landscape, FEATURES, paths=few, bins=2)
    counts = panel_counts(FEATURES, few, bins=2).ravel().tolist()
    assert 10 < max(counts) < 20
    for axes, n in zip(panels(sparse), counts, strict=True):
        assert axes.get_xlabel() == (f"only {n} states: too few for a shape" if n else "no states")
        assert [len(one.get_offsets()) for one in axes.collections] == [n]
    assert "20/40/60/80/95 % of density" in texts(figure)
    assert not any("density" in text for text in texts(sparse))


def test_without_right_answers_there_is_one_row():
    features = random_features(5, k=(3,), gold=False)
    landscape = pca(features)
    figure = draw_landscape(landscape, features, labels=["yes", "no", "maybe"], bins=2)
    assert len(panels(figure)) == 2
    assert panels(figure)[0].get_ylabel() == "all (6 paths)"
    assert "correct" not in figure.get_suptitle()
    assert [line.get_marker() for line in panels(figure)[1].lines] == ["X"] * 3
    assert [text.get_text() for text in panels(figure)[1].texts] == ["yes", "no", "maybe"]
    assert texts(figure)[-1] == "answers"


def test_labels_follow_the_right_answer_to_the_front_and_name_nothing_on_a_map_of_several_questions():
    features = assemble(
        [question("a", [2, 3, 4], gold=2), question("b", [2, 3, 4])],
        [path("a/0", 0, [[2, 3, 1], [4, 1, 1]], pred=2), path("b/0", 1, [[1, 2, 3]])],
        SCORING,
    )
    one = draw_landscape(pca(features, [0]), features, bins=1, labels=["A", "B", "C"])
    assert [text.get_text() for text in panels(one)[0].texts] == ["C", "A", "B"]
    both = draw_landscape(pca(features), features, bins=1, labels=["A", "B", "C"])
    assert not panels(both)[0].texts


def test_other_questions_paths_are_not_counted():
    features = random_features(6, k=(4, 4, 3))
    landscape = pca(features, [1])
    figure = draw_landscape(landscape, features, bins=2)
    assert figure.get_suptitle().startswith("6 paths of 1 question with 4 choices")
    states = sum(int(axes.get_title().split("\n")[1].split()[0]) for axes in panels(figure))
    assert states == int(features.n_steps[features.question == 1].sum())


def test_the_released_stages_are_numbered(landscape):
    figure = draw_landscape(landscape, FEATURES, compat=True)
    assert [axes.get_title().split("\n")[0] for axes in panels(figure)[:5]] == [f"stage {i}" for i in range(1, 6)]
    counts = panel_counts(FEATURES, EVERY, compat=True).ravel()
    assert [int(axes.get_title().split("\n")[1].split()[0]) for axes in panels(figure)] == counts.tolist()


def test_a_histogram_counts_every_state_once_on_one_scale(landscape):
    figure = draw_landscape(landscape, FEATURES, density="hist", bins=2)
    meshes = [next(one for one in axes.collections if isinstance(one, QuadMesh)) for axes in panels(figure)]
    counts = panel_counts(FEATURES, EVERY, bins=2).ravel()
    assert [int(mesh.get_array().sum()) for mesh in meshes] == counts.tolist()
    assert len({mesh.get_clim() for mesh in meshes}) == 1
    assert [axes.get_ylabel() for axes in figure.axes if not axes.get_title()] == ["states in a cell"] * 2


@pytest.mark.parametrize(
    ("states", "density"),
    [
        ([[3, 1, 2]], "kde"),
        ([[3, 1, 2]], "hist"),
        ([[2, 2, 2]] * 30, "kde"),
        ([[1, 1, 1 + i / 9] for i in range(30)], "kde"),
        ([[3, 1, 2], [1, 3, 2]], "kde"),
    ],
    ids=["one", "one counted", "equal", "collinear", "two"],
)
def test_degenerate_states_are_drawn(states, density, tmp_path: Path):
    features = assemble([question("a", [2, 2, 2])], [path("a/0", 0, states, pred=0)], SCORING)
    landscape = pca(features)
    figure = draw_landscape(landscape, features, bins=1, density=density, path=tmp_path / "f.png")
    assert greys(figure)[-1].var() > 50
    assert panels(figure)[-1].get_title().startswith("0–100 %")


def test_two_choices_lie_on_a_line_and_are_drawn(tmp_path: Path):
    features = random_features(8, k=(2, 2, 2), paths=8)
    figure = draw_landscape(pca(features, kind="reference"), features, bins=2, path=tmp_path / "f.png")
    assert all(pixels.var() > 50 for pixels in greys(figure))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_drawn_twice_the_bytes_are_equal(kind, landscape, tmp_path: Path):
    for name in "ab":
        draw_landscape(landscape, FEATURES, bins=1, path=tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_an_svg_says_what_it_shows_and_needs_nothing_from_elsewhere(landscape, tmp_path: Path):
    draw_landscape(landscape, FEATURES, bins=2, path=tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    n = panel_counts(FEATURES, EVERY, bins=2)[1, 1]
    assert f"correct, 50–100 % of the path: {n} states, " in text
    assert "PCA, " in text
    assert not re.findall(r'(?:href|src)="(?!#)', text)


def test_the_legend_says_how_not_to_read_a_tsne(landscape):
    tsne = dataclasses.replace(landscape, method="tsne", perplexity=8 / 3)
    figure = draw_landscape(tsne, FEATURES, bins=2)
    title = figure.legends[0].get_title().get_text().replace("\n", " ")
    assert re.match(r"t-SNE \(scikit-learn [\d.]+, perplexity 2\.67\); ", title)
    assert "distances between islands mean little" in title


def test_another_format_is_refused_before_drawing(landscape, tmp_path: Path):
    with pytest.raises(UsageProblem, match="cannot write a figure"):
        draw_landscape(landscape, FEATURES, path=tmp_path / "f.bmp")


def test_nothing_global_changes_and_importing_loads_no_matplotlib(landscape):
    before = dict(matplotlib.rcParams)
    draw_landscape(landscape, FEATURES, bins=1)
    assert dict(matplotlib.rcParams) == before
    script = (
        "import sys\nimport toolbox.landscape.picture\n"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'torch'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- curves ---


def test_curves_show_every_metric_with_both_outcomes_and_their_bands(tmp_path: Path):
    figure = draw_metrics(tables(FEATURES, draws=50), tmp_path / "m.svg")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Consistency (last state left out)",
        "Uncertainty (of distances)",
        "Uncertainty (of likelihoods)",
        "Perplexity of the thought",
        "Distance to the right answer",
    ]
    for axes in figure.axes:
        assert len(axes.lines) == len(axes.collections) == 2
        assert {line.get_marker() for line in axes.lines} == {"o", "s"}
        assert len({str(line.get_linestyle()) for line in axes.lines}) == 2
        np.testing.assert_allclose(axes.lines[0].get_xdata(), [10, 30, 50, 70, 90])
    assert texts(figure) == ["correct (n=32)", "wrong (n=48)", "95 % interval over questions"]
    assert figure.get_suptitle() == "80 paths of 8 questions with 4 choices"


def test_a_line_is_the_tables_figures():
    cells = tables(FEATURES, draws=50)
    wrong = [cell.metrics["consistency"] for cell in cells if cell.outcome == "wrong" and cell.bin]
    axes = draw_metrics(cells).axes[0]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [found.estimate for found in wrong])
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(min(found.low for found in wrong))
    assert band.max() == pytest.approx(max(found.high for found in wrong))


def test_facets_have_lines_of_their_own_and_the_released_stages_no_percent():
    figure = draw_metrics(tables(FEATURES, by=["variant"], compat=True, draws=20))
    assert texts(figure)[:4] == [
        "cot, correct (n=16)",
        "cot, wrong (n=24)",
        "lot2, correct (n=16)",
        "lot2, wrong (n=24)",
    ]
    assert figure.axes[-1].get_xlabel() == "stage"
    assert figure.get_suptitle().startswith("80 paths of 8 questions")


def test_without_right_answers_one_line_remains_and_no_distance_to_them():
    figure = draw_metrics(tables(random_features(5, k=(3, 3), gold=False), draws=20))
    assert len(figure.axes) == 4
    assert texts(figure)[0] == "all paths (n=12)"


def test_one_question_and_one_thought_are_drawn_without_bands(tmp_path: Path):
    features = assemble([question("a", [2, 2])], [path("a/0", 0, [[1, 2]], pred=0)], SCORING)
    figure = draw_metrics(tables(features, draws=20), tmp_path / "m.png")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "Consistency (last state left out)" not in titles
    assert "Uncertainty (of distances)" in titles
    assert texts(figure) == ["correct (n=1)"]


def test_curves_of_several_k_are_refused():
    with pytest.raises(ValueError, match="one k"):
        draw_metrics(tables(random_features(0, k=(2, 3)), draws=20))


# --- the released demo ---


def test_the_demos_panels_are_filled():
    features = demo_features()
    figure = draw_landscape(pca(features), features)
    told = [int(axes.get_title().split("\n")[1].split()[0]) for axes in panels(figure)]
    assert told == [60, 72, 68, 72, 80, 52, 60, 64, 60, 73]
    assert all(pixels.var() > 200 for pixels in greys(figure))
    assert figure.get_suptitle() == "50 paths of 5 questions with 5 choices, 28 correct (.56)"

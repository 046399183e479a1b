"""The record of weights against probabilities: what is counted where, that parts add up, and what the figure says."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
import torch

from toolbox.shell.errors import UsageProblem
from toolbox.unlearning.satimp import tnpo_weights, token_weights
from toolbox.unlearning.weight_figure import BINS, P_EDGES, SIZE, WEIGHT_EDGES, bin_counts, draw_weights, histogram


def tokens(count: int = 500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nll = torch.rand(count, generator=generator, dtype=torch.float64) ** 4 * 12
    return nll, token_weights(nll, 5.0, 0.1)


def place(value: float, edges) -> int:
    """The interval of a value: the last whose lower edge is not above it."""
    return max(k for k in range(BINS) if edges[k] <= value)


def test_edges_are_twenty_intervals_each():
    assert len(P_EDGES) == len(WEIGHT_EDGES) == BINS + 1
    assert (P_EDGES[0], P_EDGES[-1]) == (WEIGHT_EDGES[0], 1.0) == (0.0, 1.0)
    assert WEIGHT_EDGES[-1] is None
    assert WEIGHT_EDGES[1] == pytest.approx(1e-4)
    assert WEIGHT_EDGES[-2] == 1.0
    ratios = [high / low for low, high in pairwise(WEIGHT_EDGES[1:-1])]
    assert ratios == pytest.approx([10 ** (4 / 18)] * 18, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_token_is_counted_once_where_it_belongs(dtype):
    nll, weights = (values.to(dtype) for values in tokens())
    expected = [[0] * BINS for _ in range(BINS)]
    sums = [0.0] * BINS
    for one, weight in zip(nll.tolist(), weights.tolist(), strict=True):
        column = place(math.exp(-one), P_EDGES)
        expected[column][place(weight, WEIGHT_EDGES)] += 1
        sums[column] += weight
    line = histogram(7, bin_counts(nll, weights).tolist())
    assert (line["step"], line["n"]) == (7, 500)
    assert line["counts"] == expected
    for mean, total, column in zip(line["weight_mean"], sums, expected, strict=True):
        assert mean == (pytest.approx(total / sum(column), rel=1e-5) if sum(column) else None)
    assert line["p_edges"] == list(P_EDGES)
    assert line["weight_edges"] == list(WEIGHT_EDGES)
    assert json.loads(json.dumps(line)) == line


@pytest.mark.parametrize(
    ("nll", "weight", "column", "level"),
    [
        (0.0, 0.0, 19, 0),
        (-1e-7, 1.0, 19, 19),
        (float("inf"), 0.0, 0, 0),
        (1e4, 9.9e-5, 0, 0),
        (math.log(2), 1e-4, 10, 1),
        (0.0, 1.99, 19, 19),
        (0.0, 0.99, 19, 18),
    ],
)
def test_both_ends_have_their_interval_and_weights_above_one_the_last(nll, weight, column, level):
    line = histogram(
        1, bin_counts(torch.tensor([nll], dtype=torch.float64), torch.tensor([weight], dtype=torch.float64))
    )
    assert line["counts"][column][level] == line["n"] == 1
    assert line["weight_mean"][column] == pytest.approx(weight, rel=1e-5)


def test_weights_of_token_wise_npo_above_one_are_counted():
    nll = torch.linspace(0, 1, 50)
    weights = tnpo_weights(nll, nll + 1)
    line = histogram(1, bin_counts(nll, weights))
    assert sum(column[-1] for column in line["counts"]) == int((weights >= 1).sum()) > 0


def test_parts_add_up_to_the_whole_whatever_the_cut():
    nll, weights = tokens()
    whole = bin_counts(nll, weights)
    assert whole.shape == (SIZE,)
    assert whole.dtype == torch.float64
    for size in (1, 3, 77, 500):
        parts = zip(nll.split(size), weights.split(size), strict=True)
        total = torch.stack([bin_counts(*part) for part in parts]).sum(0)
        assert torch.equal(total[: BINS * BINS], whole[: BINS * BINS])
        assert histogram(1, total) == histogram(1, whole)
    assert not bin_counts(nll[:0], weights[:0]).any()


def test_nothing_known_is_nothing_counted():
    nan = float("nan")
    vector = bin_counts(torch.tensor([nan, 0.5, 0.5]), torch.tensor([0.1, nan, 0.5]))
    line = histogram(3, vector)
    assert line["n"] == 1
    empty = histogram(3, torch.zeros(SIZE))
    assert (empty["n"], set(empty["weight_mean"])) == (0, {None})


def test_the_record_carries_no_gradient():
    nll, _ = tokens()
    nll.requires_grad_()
    assert not bin_counts(nll, nll * 1.0).requires_grad


# --- the figure -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    found = []
    for step, scale in ((1, 0.1), (2, 1.0), (9, 4.0)):
        nll = tokens(300, step)[0] * scale
        found.append(histogram(step, bin_counts(nll, token_weights(nll, 5.0, 0.1))))
    return json.loads(json.dumps(found))


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are handed to be saved."""
    import toolbox.plots

    seen = []
    monkeypatch.setattr(toolbox.plots, "save", lambda figure, path: seen.append(figure))
    return seen


def test_the_figure_shows_the_first_and_the_last_step(lines, figures):
    draw_weights(lines, "w.svg", "weights")
    (figure,) = figures
    above, below = figure.axes[:2], figure.axes[2:4]
    assert [axes.get_title(loc="left") for axes in above] == ["Step 1 (n=300 tokens)", "Step 9 (n=300 tokens)"]
    for axes, bars, line in zip(above, below, (lines[0], lines[2]), strict=True):
        means = [math.nan if mean is None else max(mean, 10**-4.4) for mean in line["weight_mean"]]
        (drawn,) = axes.get_lines()
        assert list(drawn.get_ydata()) == pytest.approx(means, nan_ok=True)
        cells = axes.collections[0].get_array()
        assert float(cells.sum()) == pytest.approx(1)
        assert int(cells.count()) == sum(count > 0 for column in line["counts"] for count in column)
        heights = [patch.get_height() for patch in bars.patches]
        assert heights == pytest.approx([sum(column) / 300 for column in line["counts"]])
    told = figure.get_label()
    assert "step 1 (n=300): mean weight" in told
    assert "step 9" in told
    assert "step 2" not in told


def test_a_single_step_stands_alone_and_one_without_tokens_is_drawn(lines, figures):
    draw_weights(lines[:1], "w.svg")
    draw_weights([lines[0], histogram(2, torch.zeros(SIZE))], "w.svg")
    assert len(figures[0].axes) == 3  # cells, bars, the scale of shades
    assert "step 2: no tokens" in figures[1].get_label()


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_lines_give_the_same_bytes(lines, tmp_path, suffix):
    drawn = []
    for name in "ab":
        path = tmp_path / f"{name}.{suffix}"
        draw_weights(lines, path, "weights")
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 5000
    if suffix == "svg":
        assert b"mean weight" in drawn[0]  # said in the metadata


def test_what_cannot_be_drawn_is_refused_before_anything_is(lines, tmp_path, monkeypatch):
    import toolbox.plot_style

    with pytest.raises(ValueError, match="no step"):
        draw_weights([], tmp_path / "w.svg")
    monkeypatch.setattr(toolbox.plot_style, "new_figure", None)
    with pytest.raises(UsageProblem, match="bmp"):
        draw_weights(lines, tmp_path / "w.bmp")
    assert not list(tmp_path.iterdir())


def test_random_vectors_keep_their_counts():
    source = random.Random(0)
    for _ in range(20):
        counts = [source.choice([0, 0, 1, 5]) for _ in range(BINS * BINS)]
        line = histogram(1, [*counts, *[0.0] * BINS])
        assert [count for column in line["counts"] for count in column] == counts
        assert line["n"] == sum(counts)

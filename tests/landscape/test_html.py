"""The page that moves: every state once, nothing loaded, no text out of its place."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.landscape.runs import (
    ROWS,
    read,
)
from toolbox.landscape import html
from toolbox.landscape.features import read_features
from toolbox.landscape.html import make_figure, needs_plotly, page, write_html
from toolbox.landscape.output import make_result
from toolbox.landscape.run import Options


@pytest.fixture
def result(made):
    """What the pictures are made of, with texts that try to break out of a page."""
    rows = [{**row} for row in ROWS]
    features = read_features(made.features)
    paths = read(rows)
    evil = "</script><script>alert(1)</script><b>bold & \x1b]8;;http://x\x07link</b> \u2028"
    for number, path in enumerate(paths.paths):
        paths.paths[number] = _with_thought(path, evil)
    return make_result(Options(out="x", project="pca", by="variant"), features, paths, lambda note: None)


def _with_thought(path: Any, text: str) -> Any:
    return replace(path, thoughts=(text, *path.thoughts[1:]))


def test_a_page_shows_every_state_once_with_its_thought(result, monkeypatch):
    monkeypatch.setattr(html, "FEW_STATES", 3)
    figures = [make_figure(one, result) for one in result.figures]
    shown = [trace for figure in figures for trace in figure["data"] if trace["type"] == "scatter"]
    states = [text for trace in shown for text in trace["text"] if ", thought " in text]
    assert len(states) == len(result.features.path)
    assert len(set(states)) == len(states)
    assert sum("thought 1 of" in text for text in states) == 12
    assert sum(trace["type"] == "contour" for figure in figures for trace in figure["data"]) > 3
    for figure in figures:
        panels = {trace["xaxis"] for trace in figure["data"]}
        assert len(panels) == 10
        assert {f"xaxis{name[1:]}" for name in panels} <= set(figure["layout"])
        for trace in figure["data"]:
            assert trace["type"] in ("scatter", "contour")
            if trace["type"] == "contour":
                heights = np.array(trace["z"])
                assert 0 <= heights.min() < 1 < trace["contours"]["end"] < heights.max() <= 6


def test_the_page_loads_nothing_and_no_text_gets_out_of_its_place(result):
    text = page(result, "/* plotly.js */")
    assert text.count("<script>") == 1 + len(result.figures)
    assert text.count("</script>") == 1 + len(result.figures)
    assert "alert(1)" in text
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" not in text  # within the script the ampersand is written as an escape, too
    assert "\\u0026lt;b\\u0026gt;bold" in text
    assert "http://x" not in text
    assert "\x1b" not in text
    assert not re.search(r"(?:src|href)\s*=|@import|url\(", text)
    assert "default-src 'none'" in text.split("<body>")[0]


def test_the_file_is_written_whole_with_the_script_of_the_package(result, tmp_path, monkeypatch):
    package, offline = ModuleType("plotly"), ModuleType("plotly.offline")
    offline.get_plotlyjs = lambda: "/* all of plotly.js */"
    monkeypatch.setitem(sys.modules, "plotly", package)
    monkeypatch.setitem(sys.modules, "plotly.offline", offline)
    write_html(tmp_path / "map.html", result)
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]
    text = (tmp_path / "map.html").read_text()
    assert text == page(result, "/* all of plotly.js */")
    write_html(tmp_path / "again.html", result)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "map.html").read_bytes()


def test_plotly_takes_the_figures(result, plot, made, tmp_path):
    objects = pytest.importorskip("plotly.graph_objects", reason="plotly is an extra")
    needs_plotly()
    for one in result.figures:
        figure = make_figure(one, result)
        assert len(objects.Figure(figure).data) == len(figure["data"])
    done = plot("--features", made.features, "--html", tmp_path / "out" / "map.html", model=None)
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "map.html").read_text()
    assert "Plotly.newPlot" in text
    assert len(text) > 1_000_000

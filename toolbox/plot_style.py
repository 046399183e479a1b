"""The look that all figures share: palette, type, legend, and how labels and numbers are written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolbox.shell.errors import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY = "#262626", "#6e6e6e"
BAND_ALPHA = 0.15

# Okabe and Ito's palette without its yellow (too pale on paper), ordered so that neighbours differ in lightness too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.3)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.2)))
_LONGEST = 48

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a label is data: two dollar signs are not a formula
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.8,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    # Outlines instead of text: labels are placed by their measured size, and a viewer without the font puts another in
    # its place. What is drawn is also said in the file's metadata, where search and screen readers find it.
    "svg.fonttype": "path",
    "svg.hashsalt": "toolbox",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Look:
    """What tells one label from another: in colour, and without it by marker and dash."""

    colour: str
    marker: str
    dash: Any

    @property
    def dark(self) -> tuple[float, ...]:
        """The colour for text: the palette is made for areas and lines, thin glyphs need more contrast."""
        from matplotlib.colors import to_rgb

        return tuple(0.72 * part for part in to_rgb(self.colour))


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """A look a label, in order of appearance; 7, 8 and 5 share no factor, so the first 280 differ."""
    return {
        label: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults with the style on top, for this block only; the user's settings come back afterwards."""
    import matplotlib

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **_STYLE}):
        yield


def new_figure(size: tuple[float, float], title: str) -> Figure:
    """An empty figure of ``size`` inches with an Agg canvas and a title at the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
    if title:
        figure.suptitle(written(title, 90), x=0.012, ha="left", fontsize=10, fontweight="bold")
    return figure


def legend_below(figure: Figure, handles: list[Any]) -> None:
    """One legend below the axes in as few rows as the width allows."""
    if not handles:
        return
    width = figure.bbox.width * 0.98
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.8)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= width:
            return
        legend.remove()


def freeze(figure: Figure) -> None:
    """Lay out once and keep it: labels are placed in this layout, whatever a format's resolution."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def written(text: str, longest: int = _LONGEST) -> str:
    """``text`` on one line without control characters (they would break an SVG), cut where it is too long to show."""
    text = clean(str(text)).encode("utf-8", "replace").decode().strip()  # nor a lone surrogate, which no file can hold
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def counted(label: str, *counts: int | None) -> str:
    """``forget (n=8)``; all counts where they differ."""
    known = sorted({count for count in counts if count is not None})
    return written(label) + (f" (n={'/'.join(map(str, known))})" if known else "")


def short(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """``.08`` or ``.08 [.03, .15]``: two decimals and no leading zero where that shows something, else ``4g``."""
    if not math.isnan(low + high):
        return f"{short(value)} [{short(low)}, {short(high)}]"
    if value != 0 and not 0.005 <= abs(value) < 100:
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text

"""The table that people look at when a loop is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(runs: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]]) -> Any:
    """A rich table: a row a strategy with SHD, AUSHD, SID and BSF, both deviations of SHD, and each seed's SHD."""
    from rich.table import Table

    grid = Table(title=f"after the last round (empty graph: SHD {runs[0]['shd_empty']})", title_justify="left")
    for name in ("strategy", "SHD", "sd pop", "sd sample", "by seed", "AUSHD", "SID", "BSF", "p (SHD)"):
        grid.add_column(name, justify="left" if name in ("strategy", "by seed") else "right")
    figures = {(one["strategy"], one["metric"]): one for one in together if one["event"] == "summary"}
    tests = [one for one in together if one["event"] == "paired" and one["metric"] == "shd"]
    for strategy in dict.fromkeys(run["strategy"] for run in runs):
        shd = figures[strategy, "shd"]
        sample = "-" if shd["sd_sample"] is None else f"{shd['sd_sample']:.2f}"
        said = "; ".join(
            f"{one['p']:.3g} vs {one['b']} (least {one['p_floor']:.3g})" for one in tests if one["a"] == strategy
        )
        means = [f"{figures[strategy, metric]['mean']:.2f}" for metric in ("aushd", "sid", "bsf")]
        values = " ".join(f"{value:g}" for value in shd["values"])
        grid.add_row(strategy, f"{shd['mean']:.2f}", f"{shd['sd_population']:.2f}", sample, values, *means, said)
    return grid

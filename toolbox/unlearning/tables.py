"""Tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def measure(values: Mapping[str, Any], key: str) -> str:
    """A mean with its interval: ``.97 [.93, 1.00]``."""
    from toolbox.stats import Interval

    low, high = (math.nan if bound is None else bound for bound in values[f"{key}_interval"])
    return str(Interval(values[key], low, high, values["n"]))


def before_after_table(before: Mapping[str, Any], after: Mapping[str, Any], steps: int) -> Any:
    """Every watched set with its ES and probability before and after, with 95 % bootstrap intervals over its rows."""
    from rich.table import Table

    table = Table(title=f"before and after {steps} steps (mean [95 % interval] over rows)", title_justify="left")
    table.add_column("set")
    table.add_column("n", justify="right")
    for name in ("ES before", "ES after", "P before", "P after"):
        table.add_column(name, justify="right")
    for name in after:
        cells = [measure(when[name], key) for key in ("es", "prob") for when in (before, after)]
        table.add_row(name, str(after[name]["n"]), *cells)
    return table

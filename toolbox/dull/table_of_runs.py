"""The table of finished runs in a folder, NAME.SEED each: ``python -m toolbox.dull.table_of_runs DIR > table.md``.

Accuracy is that of the last epoch on the reporting set, mean over seeds with a 95 % interval (Student's t, so wide with
three seeds); none with one seed.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolbox.shell.errors import BadData, MissingInput, top_level
from toolbox.shell.files import RUN_FILE

COLUMNS = ("acc", "many", "medium", "few")


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The last events of finished runs by method. MissingInput (66): none; BadData (65): one that is no run of ours."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            done = json.loads(path.read_bytes())["done"]
            row = {name: float(done[name]) for name in COLUMNS}
        except (ValueError, KeyError, TypeError):
            raise BadData("is no run with a reporting set", "train with --eval", file=str(path)) from None
        found[path.parent.name.rpartition(".")[0] or path.parent.name].append({**done, **row})
    if not found:
        raise MissingInput(f"{folder}: holds no finished run", "recipes/dull/table.sh makes some")
    return dict(found)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half its 95 % interval by Student's t; not-a-number for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def markdown(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row a method, the best accuracy first."""
    head = ["method", "seeds", "accuracy", "many", "medium", "few", "fewest said", "flag precision", "AUC"]
    rows = []
    for name, done in sorted(runs.items(), key=lambda item: -mean_interval([one["acc"] for one in item[1]])[0]):
        cells = [name, str(len(done))]
        for column in COLUMNS:
            mean, half = mean_interval([one[column] for one in done])
            cells.append(f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}"))
        cells.append(str(min(min(one["predicted"]) for one in done)))
        for key in ("flag_precision", "auc"):
            known = [one["detection"][key] for one in done if (one.get("detection") or {}).get(key) is not None]
            cells.append(f"{mean_interval(known)[0]:.2f}" if known else "")
        rows.append(cells)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    with top_level("table_of_runs"):
        if len(sys.argv) != 2:
            sys.exit(__doc__)
        sys.stdout.write(markdown(read_runs(Path(sys.argv[1]))))

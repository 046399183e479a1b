"""The table of finished runs in a folder, NAME.SEED each: ``python -m toolbox.dull.table_of_runs DIR > table.md``.

Accuracy is that of the last epoch on the reporting set, mean over seeds with a 95 % interval (Student's t, so wide with
three seeds); none with one seed. ``beyond la``: the mean difference to logit adjustment, seed by seed, since runs of
one seed share noise, order and initial weights. AUC stands pooled and as the mean over given classes.
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
DETECTED = ("flag_precision", "flag_recall", "auc")
BASE = "la"


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The last events of finished runs by method. MissingInput (66): none; BadData (65): one that is no run of ours."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        try:
            done = json.loads(path.read_bytes())["done"]
            row = {name: float(done[name]) for name in COLUMNS} | {"seed": int(done["seed"])}
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
    head = ["method", "seeds", "accuracy", f"beyond {BASE}", "many", "medium", "few", "fewest said", "flag precision",
            "flag recall", "AUC", "AUC by class"]  # fmt: skip
    base = {one["seed"]: one["acc"] for one in runs.get(BASE, [])}
    rows = []
    for name, done in sorted(runs.items(), key=lambda item: -mean_interval([one["acc"] for one in item[1]])[0]):
        paired = [one["acc"] - base[one["seed"]] for one in done if name != BASE and one["seed"] in base]
        accuracy, *shots = (_cell([one[column] for one in done]) for column in COLUMNS)
        found = [one.get("detection") or {} for one in done]
        by_class = [[value for value in one.get("auc_by_class", []) if value is not None] for one in found]
        detected = [[one[key] for one in found if one.get(key) is not None] for key in DETECTED]
        detected.append([math.fsum(values) / len(values) for values in by_class if values])
        rows.append([name, str(len(done)), accuracy, _cell(paired, sign="+"), *shots,
                     str(min(min(one["predicted"]) for one in done)),
                     *(f"{mean_interval(values)[0]:.2f}" if values else "" for values in detected)])  # fmt: skip
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(values: Sequence[float], sign: str = "") -> str:
    """``mean ± half``, the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


if __name__ == "__main__":
    with top_level("table_of_runs"):
        if len(sys.argv) != 2:
            sys.exit(__doc__)
        sys.stdout.write(markdown(read_runs(Path(sys.argv[1]))))

"""Doubtful labels: dull-train's scores and flags against cleanlab's, on the same posteriors.

The package cleanlab 2.9.0 (fetched from PyPI into bench/.venv-cleanlab). Both judge the same tables p(class | image):
q of a run of dull-train, and predictions of a classifier that has not seen the image. Under tail-to-head noise classes
differ in base rate, so an AUC stands pooled and as the mean over given classes that hold labels of both kinds.

    python -m bench.bench_dull_peer RUN MANIFEST      the same for a finished run of dull-train, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import ROOT, Figure, in_child
from bench.guest import guest

VERSION = "2.9.0"
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
DULL = "DULL"


def cleanlab(path: str) -> dict[str, Any]:
    """Its quality of every label by each of its scores, and its issues. Runs in cleanlab's environment."""
    import numpy as np
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    held = np.load(path)
    given, q = held["given"], held["q"]
    quality = {name: get_label_quality_scores(given, q, method=name).tolist() for name in SCORES}
    issues = find_label_issues(given, q, n_jobs=1)
    return {"quality": quality, "issues": np.flatnonzero(issues).tolist()}


def compare(python: Path, q: Any, given: Any, clean: Any) -> dict[str, dict[str, float]]:
    """AUC of every score, precision and recall of both lists; by name, DULL's own under ``DULL``.

    ``precision_at``: the precision of as many labels as DULL flags, those of the highest score.
    """
    import numpy as np

    from toolbox.dull.epoch import doubts
    from toolbox.dull.labels import given_losses
    from toolbox.dull.metrics import detection

    classes = q.shape[1]
    counts = np.bincount(given, minlength=classes)
    ours = doubts(q, given, counts / counts.sum(), counts, "t2h")
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "table.npz", q=q, given=given)
        theirs = in_child(cleanlab, f"{folder}/table.npz", python=python)
    issues = np.zeros(len(given), dtype=bool)
    issues[theirs["issues"]] = True
    candidates = {DULL: (given_losses(q, given), ours.flagged)}
    candidates |= {name: (-np.array(theirs["quality"][name]), issues) for name in SCORES}
    found = {}
    for name, (doubt, flagged) in candidates.items():
        all_ = detection(doubt, flagged, ours.right, given, clean, {})
        known = [one for one in all_["auc_by_class"] if one is not None]
        first = np.argsort(-doubt, kind="stable")[: int(ours.flagged.sum())]
        found[name] = {
            "auc": all_["auc"], "auc_mean_by_class": sum(known) / len(known), "flagged": all_["flagged_share"],
            "precision": all_["flag_precision"], "recall": all_["flag_recall"], "base": all_["noise_before"],
            "precision_at": float((given != clean)[first].mean()) if len(first) else None,
        }  # fmt: skip
    return found


# -- posteriors -------------------------------------------------------------------------------------------------------
def of_a_run(run: Path, manifest: Path) -> tuple[Any, Any, Any]:
    """q, given and clean labels of the rows that a finished run has learned from."""
    import numpy as np
    from safetensors.numpy import load_file

    names = json.loads((run / "config.json").read_bytes())["id2label"]
    place = {names[str(n)]: n for n in range(len(names))}
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    held = {one["id"] for one in samples if one["dull"]["held_out"]}
    rows = [row for row in map(json.loads, manifest.open()) if row["id"] not in held]
    given = np.array([place[str(row["label"])] for row in rows])
    clean = np.array([place[str(row["dull"]["label_clean"])] for row in rows])
    q = load_file(run / "dull_state.safetensors")["q"].astype(np.float64)
    return q / q.sum(1, keepdims=True), given, clean


def trained(folder: Path, epochs: int) -> tuple[Any, Any, Any]:
    """The same of a run on digits: an imbalance of a fifth, tail-to-head noise of a fifth."""
    noisy, run = folder / "noisy.jsonl", folder / "run"
    noise = ["--imbalance", ".2", "--rate", ".2", "--profile", "flat", "--seed", "1"]
    train = ["--image-size", "8", "--aug", "crop", "--lr", ".05", "--batch-size", "32", "--epochs", str(epochs)]
    with noisy.open("wb") as rows:
        words = [sys.executable, ROOT / "bin/dull-noise", "digits", *noise, "--quiet"]
        subprocess.run(words, check=True, stdout=rows)
    words = [sys.executable, ROOT / "bin/dull-train", noisy, *train, "--out", run, "--quiet"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return of_a_run(run, noisy)


def cross_validated(given: Any, manifest: Path) -> Any:
    """p(class | image) by logistic regressions on pixels that have not seen the image, trained on the labels given."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    pixels = load_digits().data[[int(json.loads(line)["id"]) for line in manifest.open()]] / 16
    model = LogisticRegression(max_iter=300, C=0.1)
    return np.asarray(cross_val_predict(model, pixels, given, method="predict_proba"))


# -- figures ----------------------------------------------------------------------------------------------------------
def peers(quick: bool) -> Iterator[Figure]:
    """AUC by class of every score, precision of both lists."""
    import numpy as np

    python = guest("cleanlab", VERSION, "termcolor>=2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        q, given, clean = trained(folder, 2 if quick else 9)
        tables = {"q of a run": (q, given, clean)}
        rows = [json.loads(line) for line in (folder / "noisy.jsonl").open()]
        labels, truth = (np.array([int(value) for value in column]) for column in
                         zip(*((row["label"], row["dull"]["label_clean"]) for row in rows), strict=True))  # fmt: skip
        tables["cross-validated"] = cross_validated(labels, folder / "noisy.jsonl"), labels, truth
        for what, table in tables.items():
            found = compare(python, *table)
            for score, one in found.items():
                yield Figure(f"dull-cleanlab: AUC by class, {score} ({what})", one["auc_mean_by_class"], "AUC",
                             note=f"pooled {one['auc']:.3f}; digits, {len(table[1])} labels")  # fmt: skip
            for who, one in (("DULL", found[DULL]), ("cleanlab", found[SCORES[0]])):
                yield Figure(
                    f"dull-cleanlab: precision of {who}'s flags ({what})", one["precision"], "share",
                    note=f"recall {one['recall']:.3f}, {one['flagged']:.3f} flagged, {one['base']:.3f} wrong",
                )  # fmt: skip


BENCHES = {"dull-cleanlab": peers}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    from bench import bench_dull_peer as known  # under its own name, which a child can import

    found = known.compare(guest("cleanlab", VERSION, "termcolor>=2"), *of_a_run(Path(sys.argv[1]), Path(sys.argv[2])))
    json.dump(found, sys.stdout, indent=1)

"""The table of recipes/lit/easyvqa.sh: one line an arm and seed, then what is asserted. Who wins is printed only.

Losses and gap are in nats a token of the answers (the end of the turn is one), VC in nats an answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def figures(path: Path) -> dict[str, dict]:
    """The lines of lit-eval by metric."""
    return {row["metric"]: row for row in map(json.loads, path.read_text().splitlines())}


def interval(row: dict) -> str:
    """A value with its interval."""
    low, high = row["ci"]
    return f"{row['value']:.3f} [{low:.3f}, {high:.3f}]"


def less(row: dict, sign: int) -> str:
    """The difference from the answers-only model, or its opposite, with its paired interval."""
    there = row["compare"]
    low, high = sorted(sign * end for end in there["ci"])
    return f"{sign * there['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(folder: Path, arms: list[str]) -> None:
    """Print the table and check the signature."""
    names = ("accuracy [95 %]", "with noise", "NLL train", "test", "gap [95 %]", "VC [95 %]")
    widths = (24, 12, 11, 8, 24, 24)
    print(f"{'arm':<12}{'seed':>5}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for arm in arms:
        for path in sorted(folder.glob(f"{arm}-[0-9]*.figures")):
            seed = path.stem.rpartition("-")[2]
            one = found[arm, seed] = figures(path)
            gap, vc = one["gap"], one["vc"]
            numbers = (vc["exact_null"], gap["nll_train"], gap["nll"])
            cells = [interval(one["vqa"]), *(f"{value:.3f}" for value in numbers), interval(gap), interval(vc)]
            shown = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            print(f"{arm:<12}{seed:>5}{shown}")
    wrong = []
    for seed in sorted({seed for arm, seed in found if arm == "vit"}):
        vit, lit = found["vit", seed], found["lit", seed]
        saved, better = (less(lit[name], sign) for name, sign in (("gap", -1), ("vqa", 1)))
        print(f"seed {seed}: gap(VIT) - gap(LIT) = {saved}, accuracy(LIT) - accuracy(VIT) = {better}")
        saved = vit["gap"]["value"] - lit["gap"]["value"]
        if saved <= 0.1:
            wrong.append(f"seed {seed}: the gaps differ by {saved:.3f}, more than .1 was expected")
        if vit["gap"]["nll_train"] >= lit["gap"]["nll_train"]:
            wrong.append(f"seed {seed}: LIT fits the training answers better than VIT")
        if vit["vqa"]["value"] <= vit["vc"]["exact_null"] + 0.1:
            wrong.append(f"seed {seed}: VIT answers no better with the image than without")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Many, medium and few: classes grouped by how many training images they had.

With 100 classes or more the usual bounds: many above 100 images, few below 20 (Z. Liu et al., arXiv 1904.05160). With
less, thirds of the classes by count, the middle one taking what does not divide (10 classes: 3, 4, 3).
"""

from __future__ import annotations

from collections.abc import Sequence

GROUPS = ("many", "medium", "few")
BOUNDS = (100, 20)


def shot_groups(counts: Sequence[int], bounds: tuple[int, int] | None = None) -> tuple[dict[str, list[int]], str]:
    """The classes of each group, and in words how they were told apart.

    ``bounds`` (high, low): many has more than ``high`` images, few less than ``low``.
    """
    classes = range(len(counts))
    if bounds is None and len(counts) < 100:
        third = len(counts) // 3
        order = sorted(classes, key=lambda number: (-counts[number], number))
        cut = {"many": order[:third], "medium": order[third : len(order) - third], "few": order[len(order) - third :]}
        return {name: sorted(members) for name, members in cut.items()}, "thirds of the classes by training images"
    high, low = bounds or BOUNDS
    groups = {
        "many": [number for number in classes if counts[number] > high],
        "medium": [number for number in classes if low <= counts[number] <= high],
        "few": [number for number in classes if counts[number] < low],
    }
    return groups, f"many above {high} training images, few below {low}"

"""A made-up log of who liked what: JSON lines for longer-prep, the same for the same numbers.

    python3 recipes/pipelines/log.py [USERS [REQUESTS-EACH [SEED]]]

A request shows somebody four items. A third of all items is liked by many; beside these, everybody is in the mood for
one category, and now and then for another: that stands in their history, not in who they are nor in what is shown.
"""

from __future__ import annotations

import json
import random
import sys

CATEGORIES, ITEMS, SHOWN = 5, 60, 4


def main(users: int = 80, each: int = 50, seed: int = 0) -> None:
    draw = random.Random(seed)
    mood = [draw.randrange(CATEGORIES) for _ in range(users)]
    for step in range(each):
        for user in range(users):
            if draw.random() < 0.05:
                mood[user] = draw.randrange(CATEGORIES)
            for item in draw.sample(range(ITEMS), SHOWN):
                fits = item % CATEGORIES == mood[user]
                liked = draw.random() < (0.6 if fits else 0.05) + (0.35 if item % 3 == 0 else 0)
                row = {"user": f"u{user}", "item": f"i{item}", "cat": f"c{item % CATEGORIES}"}
                print(json.dumps({**row, "ts": step * users + user, "label": int(liked)}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

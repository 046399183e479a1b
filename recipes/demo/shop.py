"""A shop that does not exist: its log of who looked at what, and who bought what was offered, as JSON lines.

Two of three customers are gardeners, the others cooks, who buy more. What a customer looks at is only a weak hint:
three of five times it is on his side of the shop. What he takes of what is offered to him depends on it strongly. So a
few events say little about an offer and a long history says much. Rows without a label are looks, rows with one offers.

    python recipes/demo/shop.py [CUSTOMERS] [EVENTS] [SEED] > log.jsonl
"""

from __future__ import annotations

import json
import random
import sys

ITEMS = 40
LOOKS = 0.6
BUYS = {"gardener": (0.6, 0.05), "cook": (0.95, 0.35)}
"""How often an offer is taken, from the customer's own side of the shop and from the other."""
OFFER_EVERY = 4


def main(customers: int = 600, events: int = 96, seed: int = 0) -> None:
    """Write ``events`` rows of each customer, in order of time."""
    draw = random.Random(seed)
    clock = 1_700_000_000
    for event in range(events):
        for customer in draw.sample(range(customers), customers):
            clock += draw.randrange(1, 60)
            offer = event % OFFER_EVERY == OFFER_EVERY - 1
            own = draw.random() < (0.5 if offer else LOOKS)
            cook = customer % 3 == 0
            side = int(cook == own)
            row = {"user": f"u{customer}", "item": f"i{2 * draw.randrange(ITEMS // 2) + side}", "ts": clock}
            row["cat"] = ("garden", "kitchen")[side]
            if offer:
                row["label"] = int(draw.random() < BUYS["cook" if cook else "gardener"][not own])
            print(json.dumps(row))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

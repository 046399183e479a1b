"""Question sets that need no file: Alice's siblings, and a few examples of our own.

Source of Alice: Nezhurina et al. 2024, "Alice in Wonderland", arXiv 2406.02061, in the form of Liu et al. 2025,
arXiv 2505.12896: all pairs of numbers from 1 to 10, and each with the order of the two clauses swapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from toolbox.shell.items import ITEM_SHAPES
from toolbox.shell.records import RecordReader, read_records
from toolbox.shell.streams import Streams

Row = dict[str, Any]

EXAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "examples.jsonl")
ORDERS = ("brothers-first", "sisters-first")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def alice(largest: int = 10) -> Iterator[list[Row]]:
    """2 · ``largest``² items; the two orders of one pair of numbers follow each other.

    A brother of Alice has her sisters and Alice herself: M + 1. The common wrong answer is M.
    """
    for brothers in range(1, largest + 1):
        for sisters in range(1, largest + 1):
            clauses = [_count(brothers, "brother"), _count(sisters, "sister")]
            for order in ORDERS:
                first, second = clauses if order == "brothers-first" else reversed(clauses)
                yield [
                    {
                        "id": f"alice/{order}/{brothers}-{sisters}",
                        "question": f"Alice has {first} and she also has {second}. "
                        "How many sisters does Alice's brother have?",
                        "answer": sisters + 1,
                        "group": f"alice/{brothers}-{sisters}",
                        "dataset": "alice",
                        "meta": {
                            "brothers": brothers,
                            "sisters": sisters,
                            "order": order,
                            "common_wrong": sisters,
                        },
                    }
                ]


def example(streams: Streams) -> Iterator[list[Row]]:
    """The eight items that come with the package."""
    for record in read_records(EXAMPLES, streams, RecordReader(ITEM_SHAPES)):
        yield [record.data]

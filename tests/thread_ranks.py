"""Ranks as threads of one process: what sums numbers over shards is tested without starting processes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

Reduce = Callable[[Sequence[float]], list[float]]


class Ranks:
    """``run(work)`` calls ``work(rank, reduce)`` on every rank at once; ``reduce`` sums lists of numbers over them."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=20)
        self.given: list[list[float]] = [[] for _ in range(count)]
        self.calls: list[int] = []
        """How many numbers each reduction had."""

    def run(self, work: Callable[[int, Reduce], Any]) -> list[Any]:
        """What each rank returned, or the exception that ended it."""
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank, lambda numbers: self._sum(rank, numbers))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _sum(self, rank: int, numbers: Sequence[float]) -> list[float]:
        self.given[rank] = list(numbers)
        self.barrier.wait()
        total = [math.fsum(column) for column in zip(*self.given, strict=True)]
        if rank == 0:
            self.calls.append(len(total))
        self.barrier.wait()  # nobody gives the next numbers before all have read these
        return total

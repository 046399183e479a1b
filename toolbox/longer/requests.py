"""Requests out of a log: which samples are asked for together, what history they have, and negatives for positives.

A history is a pointer: ``hist_end`` points behind the last event of the user strictly before the request, so nothing of
the request's own time or later can leak into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 64
"""Draws of a negative before it is given up: nearly every item seen so far is a positive of the request then."""


@dataclass(frozen=True)
class Events:
    """All events by user, oldest to newest, ties in input order. ``user_ptr`` is (users + 1,), the rest a row each.

    ``order`` are the rows of the log that they came from.
    """

    user_ptr: np.ndarray
    user: np.ndarray
    item: np.ndarray
    ts: np.ndarray
    order: np.ndarray


@dataclass(frozen=True)
class Requests:
    """Requests in the order (user, time, input). ``first`` (requests + 1,) points into the samples.

    ``user``, ``ts``, ``hist_end`` a request; ``rows`` the row of the log a sample.
    """

    user: np.ndarray
    ts: np.ndarray
    hist_end: np.ndarray
    first: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def of_sample(self) -> np.ndarray:
        """The request of each sample."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))


def sort_events(user: np.ndarray, item: np.ndarray, ts: np.ndarray, users: int) -> Events:
    """Events by user and time."""
    order = np.lexsort((ts, user))
    ptr = np.zeros(users + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=users), out=ptr[1:])
    return Events(ptr, user[order], item[order], ts[order], order)


def group_requests(
    events: Events, rows: np.ndarray, user: np.ndarray, ts: np.ndarray, request: np.ndarray, window: int | None
) -> Requests:
    """Samples (``rows`` of a log with their user, time and request code) as requests.

    Without ``window`` a request is the samples of one (user, request, time). With it, ``window`` consecutive samples of
    a user: history and time are those of the first.
    """
    order = np.lexsort((ts, user)) if window else np.lexsort((request, ts, user))
    user, ts, request, rows = user[order], ts[order], request[order], rows[order]
    starts = np.empty(len(rows), bool)
    starts[:1] = True
    new_user = user[1:] != user[:-1]
    if window:
        first_of_user = np.flatnonzero(np.concatenate(([True], new_user))) if len(rows) else np.zeros(0, np.int64)
        sizes = np.diff(np.append(first_of_user, len(rows)))
        starts[:] = (np.arange(len(rows)) - np.repeat(first_of_user, sizes)) % window == 0
    else:
        starts[1:] = new_user | (ts[1:] != ts[:-1]) | (request[1:] != request[:-1])
    begin = np.flatnonzero(starts)
    asked_user, asked_ts = user[begin], ts[begin]
    end = history_end(events, asked_user, asked_ts)
    return Requests(asked_user, asked_ts, end, np.append(begin, len(rows)).astype(np.int64), rows)


def history_end(events: Events, user: np.ndarray, ts: np.ndarray) -> np.ndarray:
    """Behind the last event of ``user`` with a time strictly before ``ts``, as positions in ``events``."""
    moments = np.unique(events.ts)
    rank = np.searchsorted(moments, ts, side="left")  # events of a smaller rank are strictly earlier
    width = len(moments) + 1
    keys = events.user.astype(np.int64) * width + np.searchsorted(moments, events.ts)
    return np.searchsorted(keys, user.astype(np.int64) * width + rank, side="left")


@dataclass(frozen=True)
class Negatives:
    """Drawn items: ``sample`` is the positive each belongs to, ``event`` the event (by position in time order of the
    whole log) whose item, and whose features, it takes. ``short`` positives got fewer than asked for."""

    sample: np.ndarray
    event: np.ndarray
    short: int


def draw_negatives(
    item: np.ndarray, ts: np.ndarray, requests: Requests, sample_item: np.ndarray, each: int, how: str, seed: int
) -> Negatives:
    """``each`` negatives a sample, only of what existed then: ``item`` and ``ts`` are the log's rows, in any order.

    popularity: the item of an event drawn uniformly from all strictly earlier ones. uniform: an item drawn uniformly
    from those seen earlier, with its features as last seen before the request. Never a positive of the request. Drawn
    with replacement.
    """
    time_order = np.argsort(ts, kind="stable")
    times, items = ts[time_order], item[time_order].astype(np.int64)
    n_items = int(items.max()) + 1 if len(items) else 1
    sample_request = requests.of_sample()
    owner = np.repeat(np.arange(len(sample_request)), each)
    request = sample_request[owner]
    before = np.searchsorted(times, requests.ts[request], side="left")
    positives = np.unique(sample_request * n_items + sample_item)
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = np.full(len(owner), -1, np.int64)
    if how == "uniform":
        first_seen, seen_items = _first_seen(items)
        known = np.searchsorted(first_seen, before, side="left")
        last = _LastSeen(items)
    pool = before if how == "popularity" else known
    open_ = np.flatnonzero(pool > 0)
    for _ in range(_ROUNDS):
        if not len(open_):
            break
        drawn = (generator.random(len(open_)) * pool[open_]).astype(np.int64)
        found = items[drawn] if how == "popularity" else seen_items[drawn]
        key = request[open_] * n_items + found
        place = np.searchsorted(positives, key)
        taken = positives[np.minimum(place, len(positives) - 1)] == key
        kept = open_[~taken]
        chosen[kept] = drawn[~taken] if how == "popularity" else last.before(found[~taken], before[kept])
        open_ = open_[taken]
    good = chosen >= 0
    short = len(np.unique(owner[~good]))
    return Negatives(owner[good], time_order[chosen[good]], short)


def _first_seen(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions at which items occur first, ascending, and these items."""
    unique, first = np.unique(items, return_index=True)
    order = np.argsort(first)
    return first[order], unique[order]


class _LastSeen:
    """Where an item occurred last before a position."""

    def __init__(self, items: np.ndarray) -> None:
        self.n = len(items)
        self.keys = np.sort(items * self.n + np.arange(self.n))

    def before(self, item: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The last position of ``item`` below ``position``; there is one for an item that has been seen by then."""
        place = np.searchsorted(self.keys, item * self.n + position, side="left") - 1
        return self.keys[place] - item * self.n

"""Which requests are for training, validation and test: each lies in one split, and none is split by random rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolbox.shell.errors import UsageProblem

SPLITS = ("train", "valid", "test")
_VALID_SHARE = 10
"""One in so many of the users that are not for test is for validation."""


@dataclass(frozen=True)
class Split:
    """``--split``: temporal with shares, user with folds, or column with the value that is test."""

    kind: str
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    folds: int = 5
    column: str = ""
    value: str = ""


def parse_split(text: str) -> Split:
    """``temporal:.8,.1,.1``, ``user:5`` or ``column:fold=5``; UsageProblem (2) for anything else."""
    kind, _, rest = text.partition(":")
    advice = "as in temporal:.8,.1,.1, user:5 or column:fold=5"
    if kind == "temporal":
        try:
            shares = tuple(float(one) for one in rest.split(","))
        except ValueError:
            shares = ()
        if len(shares) != 3 or not all(0 < one < 1 for one in shares) or abs(sum(shares) - 1) > 1e-6:
            raise UsageProblem(f"--split {text}: three shares that add up to 1 are expected", advice)
        return Split("temporal", shares)  # type: ignore[arg-type]
    if kind == "user":
        if not rest.isdigit() or int(rest) < 2:
            raise UsageProblem(f"--split {text}: the number of folds is expected, at least 2", advice)
        return Split("user", folds=int(rest))
    column, equals, value = rest.partition("=")
    if kind == "column" and column and equals and value:
        return Split("column", column=column, value=value)
    raise UsageProblem(f"--split {text}: not known", advice)


def by_time(ts: np.ndarray, sizes: np.ndarray, shares: Sequence[float]) -> tuple[np.ndarray, list[int]]:
    """Split numbers (0 train, 1 valid, 2 test) a request and the two boundaries: train < t₀ ≤ valid < t₁ ≤ test.

    The boundaries are request times at which the shares of the SAMPLES are reached.
    """
    order = np.argsort(ts, kind="stable")
    reached = np.cumsum(sizes[order]) / max(1, sizes.sum())
    cuts = []
    for share in (shares[0], shares[0] + shares[1]):
        place = min(int(np.searchsorted(reached, share - 1e-12)) + 1, len(ts) - 1)
        cuts.append(int(ts[order][place]))
    return (ts >= cuts[0]).astype(np.int8) + (ts >= cuts[1]).astype(np.int8), cuts


def by_user(names: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Split numbers a user, by name: one of ``folds`` is test, a tenth of the others valid."""
    return np.fromiter((_of_user(name, folds, seed) for name in names), np.int8, len(names))


def valid_users(names: Sequence[str], seed: int) -> np.ndarray:
    """Which users are for validation where the test users are known: a tenth."""
    return np.fromiter((_number(name, seed) % _VALID_SHARE == 0 for name in names), bool, len(names))


def _of_user(name: str, folds: int, seed: int) -> int:
    number = _number(name, seed)
    if number % folds == 0:
        return 2
    return 1 if number // folds % _VALID_SHARE == 0 else 0


def _number(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest())

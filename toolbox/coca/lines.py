"""What coca-eval says: verdicts as they are counted, rates, differences. No numerical library, so that schemas cost
nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Verdict = Literal["refused", "answered", "unfinished", "unjudged"]
VERDICTS: tuple[Verdict, ...] = ("refused", "answered", "unfinished", "unjudged")

ID = "id"
"""What the harmful prompts without an attack are called."""
OOD_MEAN = "ood mean"


class Seen(NamedTuple):
    """One judged answer, as far as rates need it. ``unit`` pairs runs: the same prompt under the same name."""

    unit: bytes
    run: str
    harmful: bool
    attack: str | None
    split: str
    verdict: Verdict
    format_ok: bool | None = None
    disagree: bool | None = None
    score: float | None = None

    @property
    def facet(self) -> str:
        """The attack, or ``id``; several sets without an attack are one."""
        return self.attack or (ID if self.split == "id" else "ood")


class Rate(msgspec.Struct, kw_only=True):
    """``count`` of ``n`` as a rate with Wilson's 95 % interval; of a mean over attacks ``n`` are the attacks."""

    estimate: float
    low: float | None
    high: float | None
    n: int
    count: int | None = None


class Attack(msgspec.Struct, kw_only=True):
    """One attack: the rate that was answered, the rate that was refused, and how many never came to an answer."""

    split: str
    asr: Rate
    refused: Rate
    unfinished: int
    unjudged: int
    score: float | None = None


class RunRates(msgspec.Struct, kw_only=True):
    """All rates of a run, by one judge. ``attacks`` by name; the harmful prompts in distribution are ``id``."""

    kind: Literal["run"] = "run"
    run: str
    judge: str
    rows: int
    attacks: dict[str, Attack]
    ood_mean: Rate | None
    over_refusal: Rate | None
    over_unfinished: int
    format_ok: Rate | None
    disagree: Rate | None


class Difference(msgspec.Struct, kw_only=True):
    """A run minus the baseline on the same prompts, with the 95 % interval of a paired bootstrap; McNemar's exact p,
    and that corrected by Holm over all differences to this baseline. ``unpaired`` prompts are in one run alone."""

    kind: Literal["difference"] = "difference"
    run: str
    baseline: str
    judge: str
    what: str
    n: int
    difference: float
    low: float | None
    high: float | None
    only_run: int
    only_baseline: int
    p: float
    p_holm: float | None = None
    unpaired: int = 0

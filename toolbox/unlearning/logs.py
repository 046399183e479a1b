"""Per-item numbers of an evaluated model: the one form that models and stored logs share, and our own file of it.

A ``Log`` holds every number that a metric is made of and, unless asked for, no text: questions are known by hashes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file

SETS = ("forget", "retain", "authors", "facts")
"""What is to be forgotten; what is to be kept; people the model knew before (or neighbours); facts of the world."""

FORMAT, VERSION = "unlearn-eval", 1


class Text(msgspec.Struct, frozen=True):
    """The words of an item, kept only where they are asked for."""

    prompt: str
    answer: str
    generation: str


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question's numbers; None where there is no datum. Losses are means over an answer's tokens, in nats.

    ``index`` is the row's id or its index in a stored log, ``question`` a hash of its words. ``perturbed_losses`` are
    those of the wrong answers. ``truth_ratio`` (geometric, as R) serves only where the losses it is made of are gone.
    """

    index: str
    question: str | None = None
    loss: float | None = None
    paraphrase_loss: float | None = None
    perturbed_losses: tuple[float, ...] | None = None
    truth_ratio: float | None = None
    es: float | None = None
    es_paraphrased: float | None = None
    em: float | None = None
    rouge_l: float | None = None
    text: Text | None = None


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """One model's items by set, and where they come from.

    ``template`` and ``system`` are what the questions were asked with (None: not known), ``run`` what the model was
    made by, ``digests`` the sha256 of each set's rows, ``max_new_tokens`` the bound of the generations.
    """

    model: str
    sets: dict[str, tuple[Item, ...]]
    template: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None
    run: dict[str, Any] | None = None
    digests: dict[str, str] = {}


class _File(Log, frozen=True, kw_only=True):
    """A log as it lies in a file of ours."""

    format: str
    version: int


# -- what metrics need ------------------------------------------------------------------------------------------------
METRICS: dict[str, tuple[str, ...]] = {
    "es": ("es", "es_paraphrased"),
    "em": ("em",),
    "prob": ("loss", "perturbed_losses"),
    "rouge_l": ("rouge_l", "text"),
    "truth_ratio": ("paraphrase_loss", "perturbed_losses", "truth_ratio"),
}
"""The numbers of an item that each metric is made of. Model utility and forget quality follow from these."""


def keep_metrics(log: Log, metrics: tuple[str, ...]) -> Log:
    """``log`` with no other numbers than those that ``metrics`` are made of."""
    kept = {"index", "question", *(name for metric in metrics for name in METRICS[metric])}
    dropped = {name: None for name in Item.__struct_fields__ if name not in kept}
    return _map_items(log, lambda item: msgspec.structs.replace(item, **dropped))


def _map_items(log: Log, change: Callable[[Item], Item]) -> Log:
    sets = {name: tuple(change(item) for item in items) for name, items in log.sets.items()}
    return msgspec.structs.replace(log, sets=sets)


# -- questions --------------------------------------------------------------------------------------------------------
def question_hash(question: str) -> str:
    """What a log knows a question by: 16 hexadecimal digits of its sha256, space around it ignored."""
    return hashlib.sha256(question.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_same_questions(log: Log, reference: Log, name: str = "forget") -> None:
    """Raise BadData where the two logs' items of a set are not the same questions, in whatever order.

    Told by hashes where both have them, else by indices where both are stored logs without hashes, else by number.
    """
    ours, theirs = log.sets.get(name), reference.sets.get(name)
    if not ours or not theirs:
        return
    where = f"the {name} items of {log.model} and of the reference {reference.model}"
    advice = "evaluate both on the same rows (and --limit), or look anyway with --allow-different-items"
    if len(ours) != len(theirs):
        raise BadData(f"{where} are not the same questions: {len(ours)} against {len(theirs)}", advice)
    first, second = ([item.question for item in items] for items in (ours, theirs))
    if None in first or None in second:
        if not (None in first and None in second):
            return
        first, second = ([item.index for item in items] for items in (ours, theirs))
    different = (Counter(first) - Counter(second)).total()
    if different:
        raise BadData(f"{where} are not the same questions: {different} of {len(ours)} differ", advice)


# -- files ------------------------------------------------------------------------------------------------------------
def write_log(log: Log, path: str, *, text: bool = False) -> None:
    """Write ``log`` as one JSON object, whole or not at all; without ``text`` its words stay out."""
    if not text:
        log = _map_items(log, lambda item: msgspec.structs.replace(item, text=None))
    with atomic_file(path) as handle:
        handle.write(_encode_file(log))


def _encode_file(log: Log) -> bytes:
    """The header on the first line and an item a line: one JSON object that other tools can look into."""
    header = {"format": FORMAT, "version": VERSION, **msgspec.to_builtins(log)}
    del header["sets"]
    sets = [
        msgspec.json.encode(name) + b": [\n" + b",\n".join(msgspec.json.encode(item) for item in items) + b"\n]"
        for name, items in log.sets.items()
    ]
    return msgspec.json.encode(header)[:-1] + b',"sets":{\n' + b",\n".join(sets) + b"\n}}\n"


def is_ours(data: Mapping[str, Any]) -> bool:
    """Whether ``data`` is a log that ``write_log`` has written."""
    return data.get("format") == FORMAT


def read_ours(data: Mapping[str, Any], name: str) -> Log:
    """A log of ours from its JSON object; BadData with the place of what is wrong."""
    version = data.get("version")
    if version != VERSION:
        advice = f"this program reads version {VERSION}"
        raise BadData(f"version {version!r} of the log is not known", advice, file=name)
    try:
        held = msgspec.convert(data, _File)
    except (msgspec.ValidationError, RecursionError) as error:
        what, _, place = str(error).partition(" - at `")
        raise BadData(what, "the log is damaged", file=name, field=place.rstrip("`") or None) from None
    if unknown := sorted(held.sets.keys() - set(SETS)):
        raise BadData(f"no set is called {unknown[0]}", f"the sets are {', '.join(SETS)}", file=name, field="$.sets")
    for place, value in _numbers(held):
        if not math.isfinite(value):
            raise BadData(f"{value} is not a finite number", "the log is damaged", file=name, field=place)
    return Log(**{field: getattr(held, field) for field in Log.__struct_fields__})


def _numbers(log: Log) -> Iterator[tuple[str, float]]:
    for name, items in log.sets.items():
        for number, item in enumerate(items):
            for field in Item.__struct_fields__:
                value = getattr(item, field)
                for one in value if isinstance(value, tuple) else (value,):
                    if isinstance(one, float):
                        yield f"$.sets.{name}[{number}].{field}", one

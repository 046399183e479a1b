"""Stored evaluation logs of any known format: ours, TOFU's aggregated one, open-unlearning's TOFU_EVAL.json.

The others are JSON objects of per-item numbers keyed by index. They are read into the same ``Log`` as ours, so that
every formula is applied to them unchanged; what they do not hold is None.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from toolbox.shell.errors import BadData
from toolbox.shell.streams import Streams, damaged_is_bad_data, display_name, open_source
from toolbox.unlearning.logs import Item, Log, Text, is_ours, question_hash, read_ours

TOFU_PARTS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "authors",
    "eval_real_world_wo_options.json": "facts",
}
"""The parts of TOFU's aggregated log, and our names of the sets."""

_TOFU_FIELDS = {
    "loss": "avg_gt_loss",
    "paraphrase_loss": "avg_paraphrased_loss",
    "perturbed_losses": "average_perturb_loss",
    "rouge_l": "rougeL_recall",
}

_TOFU_PROMPT = re.compile(r"\s*(?:\[INST\] (.*) \[/INST\]|Question: (.*?)\n(?:Answer:)?)\s*", re.DOTALL)
"""The two prompts of TOFU's released models; the question inside makes items comparable across models."""

_OU_SETS = {"forget": "forget", "retain": "retain", "ra": "authors", "wf": "facts"}
_OU_FIELDS = {
    # open-unlearning's metric with its prefix cut off -> (our field, the key of the value)
    "Q_A_Prob": ("loss", "avg_loss"),
    "Q_A_PARA_Prob": ("paraphrase_loss", "avg_loss"),
    "Q_A_PERT_Prob": ("perturbed_losses", "avg_loss"),
    "Q_A_ROUGE": ("rouge_l", "rougeL_recall"),
    "Truth_Ratio": ("truth_ratio", "score"),
    "truth_ratio": ("truth_ratio", "score"),
    "extraction_strength": ("es", "score"),
    "exact_memorization": ("em", "score"),
}
_OU_UNPREFIXED = ("extraction_strength", "exact_memorization")  # these are of the forget set


def read_log(path: str, streams: Streams) -> Log:
    """A log in any of the known formats: ours, TOFU's aggregated one, open-unlearning's TOFU_EVAL.json.

    ``-`` is stdin; gzip and zstd are read as well. Raises: BadData (65) with the place of what is wrong.
    """
    name = display_name(path)
    data = _object(path, name, streams)
    if is_ours(data):
        return read_ours(data, name)
    if is_tofu(data):
        return read_tofu(data, name)
    if is_open_unlearning(data):
        return read_open_unlearning(data, name)
    raise BadData(
        "not a log that is known: neither ours, nor TOFU's aggregated one, nor open-unlearning's TOFU_EVAL.json",
        "a file of means alone (a summary) cannot be read: every metric is made of per-item numbers",
        file=name,
    )


def _object(path: str, name: str, streams: Streams) -> dict[str, Any]:
    with open_source(path, streams, "--from-log") as handle, damaged_is_bad_data(name):
        raw = handle.read()
    try:
        # The standard library's reader takes the NaN that Python's own writer leaves, to be named by its place.
        data = json.loads(raw)
    except RecursionError:
        raise BadData("nested too deeply", file=name) from None
    except UnicodeDecodeError:
        raise BadData("not UTF-8 text", "a log is one JSON object", file=name) from None
    except ValueError as error:
        line = getattr(error, "lineno", None)
        what = getattr(error, "msg", None) or str(error)
        raise BadData(f"not valid JSON: {what}", "a log is one JSON object", file=name, line=line) from None
    if not isinstance(data, dict):
        raise BadData(f"expected an object, got {type(data).__name__}", "a log is one JSON object", file=name)
    return data


def is_tofu(data: Mapping[str, Any]) -> bool:
    """Whether ``data`` is an aggregated log of TOFU's code."""
    return any(isinstance(data.get(part), dict) for part in TOFU_PARTS)


def is_open_unlearning(data: Mapping[str, Any]) -> bool:
    """Whether ``data`` is an evaluation log of open-unlearning (its summary has no values by index)."""
    return any(isinstance(value, dict) and "value_by_index" in value for value in data.values())


def read_tofu(data: Mapping[str, Any], name: str) -> Log:
    """TOFU's aggregated log: ``{part: {metric: {index: value}}}``. Questions are taken from the stored prompts."""
    sets = {}
    for part, set_name in TOFU_PARTS.items():
        if part not in data:
            continue
        metrics = _mapping(data[part], name, f"$.{part}")
        columns = {
            field: {
                index: _value(value, name, f"$.{part}.{metric}.{index}", many=field == "perturbed_losses")
                for index, value in _mapping(metrics[metric], name, f"$.{part}.{metric}").items()
            }
            for field, metric in _TOFU_FIELDS.items()
            if metrics.get(metric) is not None
        }
        texts = {
            index: _text(value, name, f"$.{part}.generated_text.{index}")
            for index, value in _mapping(metrics.get("generated_text") or {}, name, f"$.{part}.generated_text").items()
        }
        sets[set_name] = _items({**columns, "text": texts, "question": _hashes(texts)})
    return Log(model=name, sets=sets)


def read_open_unlearning(data: Mapping[str, Any], name: str) -> Log:
    """open-unlearning's log: ``{metric: {"agg_value", "value_by_index": {index: {key: value}}}}``.

    Its extraction strength of an item whose last token is missed is 1/T where ours is 0; what is stored stays. The
    stored truth ratio is used only where the losses of right and wrong answers are not in the file.
    """
    columns: dict[str, dict[str, dict[str, Any]]] = {}
    for metric, result in data.items():
        found = _ou_field(metric)
        if found is None or not isinstance(result, dict) or result.get("value_by_index") is None:
            continue
        set_name, field, key = found
        place = f"$.{metric}.value_by_index"
        column = {}
        for index, value in _mapping(result["value_by_index"], name, place).items():
            held = None if value is None else _mapping(value, name, f"{place}.{index}").get(key)
            column[index] = _value(held, name, f"{place}.{index}.{key}", many=field == "perturbed_losses")
        columns.setdefault(set_name, {})[field] = column
    for set_name in ("authors", "facts"):  # no paraphrase there: the answer itself stands for it
        if "loss" in columns.get(set_name, {}):
            columns[set_name].setdefault("paraphrase_loss", columns[set_name]["loss"])
    order = [set_name for set_name in _OU_SETS.values() if set_name in columns]
    return Log(model=name, sets={set_name: _items(columns[set_name]) for set_name in order})


def _ou_field(metric: str) -> tuple[str, str, str] | None:
    """``(set, field, key)`` of one of open-unlearning's metric names; None for those that are not used."""
    prefix, _, rest = metric.partition("_")
    if metric in _OU_UNPREFIXED:
        prefix, rest = "forget", metric
    if prefix not in _OU_SETS or rest not in _OU_FIELDS:
        return None
    return _OU_SETS[prefix], *_OU_FIELDS[rest]


def _items(columns: Mapping[str, Mapping[str, Any]]) -> tuple[Item, ...]:
    """Columns of numbers by index as items, in the order of the indices."""
    indices = sorted(set().union(*columns.values()), key=lambda index: (not index.isdecimal(), index.zfill(12)))
    return tuple(
        Item(index=index, **{field: column.get(index) for field, column in columns.items()}) for index in indices
    )


def _hashes(texts: Mapping[str, Text | None]) -> dict[str, str | None]:
    """Hashes of the questions inside the stored prompts; None where a prompt is of another form."""
    found: dict[str, str | None] = {}
    for index, text in texts.items():
        prompt = _TOFU_PROMPT.fullmatch(text.prompt) if text is not None else None
        found[index] = question_hash(prompt[1] or prompt[2] or "") if prompt else None
    return found


def _mapping(value: Any, name: str, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadData(f"expected an object, got {type(value).__name__}", "the log is damaged", file=name, field=place)
    return value


def _value(value: Any, name: str, place: str, *, many: bool) -> float | tuple[float, ...] | None:
    """A finite number, or (``many``) one or more of them as a tuple; None stays None."""
    if value is None:
        return None
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    if many and None in values:  # a wrong answer without a token
        return None
    numbers = tuple(_finite(one, name, place) for one in values)
    if many:
        if not numbers:
            raise BadData("an empty list of losses", "the log is damaged", file=name, field=place)
        return numbers
    if isinstance(value, list):
        raise BadData("expected a number, got a list", "the log is damaged", file=name, field=place)
    return numbers[0]


def _finite(value: Any, name: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadData(f"expected a number, got {type(value).__name__}", "the log is damaged", file=name, field=place)
    if not math.isfinite(value):
        advice = "the model that was evaluated is broken: its losses are no numbers"
        raise BadData(f"{value} is not a finite number", advice, file=name, field=place)
    return float(value)


def _text(value: Any, name: str, place: str) -> Text | None:
    """TOFU's ``[prompt, generation, reference]``."""
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 3 and all(isinstance(part, str) for part in value)):
        what = "expected three strings: prompt, generation and answer"
        raise BadData(what, "the log is damaged", file=name, field=place)
    prompt, generation, answer = (part.encode("utf-8", "replace").decode() for part in value)  # lone surrogates
    return Text(prompt=prompt, generation=generation, answer=answer)

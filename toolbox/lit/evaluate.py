"""lit-eval: the job. Predictions, or rows and a model, in; a line a figure out.

Figures of predictions need neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from toolbox.lit.ask import dropped
from toolbox.lit.chair import chair, chair_row, synonyms_of, truth
from toolbox.lit.cider import cider_d, simple_tokens
from toolbox.lit.lines import CAPTIONS, PREDICTIONS, REFERENCES, Answered, Captions
from toolbox.lit.pope import STRATEGIES, pope, read_answer, unparsable
from toolbox.lit.ptb import ptb_tokens
from toolbox.lit.rows import Counts, Reading, records_of, samples_of
from toolbox.lit.scores import Ratio, line
from toolbox.lit.vqa import vqa_accuracy
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.files import atomic_file
from toolbox.shell.lists import comma_list
from toolbox.shell.records import Record, RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, Streams, display_name

OF_PREDICTIONS = ("cider", "chair", "pope", "vqa")
OF_MODELS = ("vc", "nll", "gap")


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-eval's options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    refs: str | None = None
    compare: str | None = None
    rows_out: str | None = None
    metric: str = ""
    strict: bool = False
    tokenizer: str = "simple"
    chair_synonyms: str | None = None
    chair_drop: str = ""
    bootstrap: int = 2000
    model: str | None = None
    trust_remote_code: bool = False
    train_rows: str | None = None
    null: str = "noise"
    image_root: str | None = None
    max_image_pixels: float = 50e6
    batch_size: int = 8
    seed: int = 0
    threads: int | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The figures asked for, each once."""
        return comma_list("metric", self.metric, (*OF_PREDICTIONS, *OF_MODELS))


def check(options: Options) -> None:
    """What does not fit together."""
    mine = [name for name in options.metrics if name in OF_MODELS]
    if mine and len(mine) < len(options.metrics):
        raise UsageProblem(f"--metric {options.metric}: figures of predictions and of a model", "ask for them apart")
    if mine and options.model is None:
        raise UsageProblem(f"--metric {mine[0]} needs --model", "name the model to be judged")
    if "gap" in mine and options.train_rows is None:
        raise UsageProblem("--metric gap needs --train-rows", "rows that the model was trained on")
    if not mine and options.refs is None:
        raise UsageProblem(f"--metric {options.metrics[0]} needs --refs", "rows with captions or answers")
    if mine and options.refs:
        raise UsageProblem("--refs is for figures of predictions", "leave it out")
    names = [options.file, options.refs, options.compare, options.train_rows]
    if names.count("-") > 1:
        raise UsageProblem("only one input can be stdin (-)", "name files for the others")
    if options.rows_out is not None and not Path(options.rows_out).absolute().parent.is_dir():
        raise CannotCreate(f"--rows-out {options.rows_out}: no such directory", "make it first")


def run(options: Options, call: Invocation) -> None:
    """Judge and write."""
    check(options)
    if options.metrics[0] in OF_MODELS:
        from toolbox.lit.judge import judge_model

        judge_model(options, call)
        return
    rejected: list[bytes] = []
    reader = RecordReader(
        PREDICTIONS, renames=parse_map(options.map_fields), on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )  # fmt: skip
    mine = _predictions(options.file, call.streams, reader)
    if reader.skipped:
        call.reporter.warn(f"{display_name(options.file)}: {reader.skipped} bad rows left out")
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    if not mine:
        raise BadData("the set is empty", "give at least one prediction", file=display_name(options.file))
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        facts = {"predictions": len(mine)}
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, **facts})
        writer.close()
        return
    refs = list(records_of(str(options.refs), call.streams, RecordReader(REFERENCES), "--refs"))
    theirs = None
    if options.compare is not None:
        theirs = _predictions(options.compare, call.streams, RecordReader(PREDICTIONS))
    judge = _Judge(options, refs)
    lines = [one for name in options.metrics for one in judge.lines(name, mine, theirs)]
    for one in lines:
        writer.write(one)
    writer.close()
    for one in lines:
        shown = "none" if one["value"] is None else f"{one['value']:.4f}"
        call.reporter.note(f"{one['metric']} {shown} {one['ci']} over {one['images']} images")
    if options.rows_out:
        with atomic_file(options.rows_out) as handle:
            handle.writelines(msgspec.json.encode(row) + b"\n" for row in judge.rows)


Key = tuple[str, int | None]


def _predictions(name: str, streams: Streams, reader: RecordReader) -> dict[Key, str]:
    """Texts by id and turn. Raises: BadData for a double one."""
    found: dict[Key, str] = {}
    for record in read_records(name, streams, reader, "the predictions"):
        key = (record.id, record.value.turn)
        if record.value.id is None:
            raise record.bad("a prediction without `id`", "predictions are matched by id")
        if key in found:
            raise record.bad(f"the prediction for {record.id!r} is there twice", "keep one", "$.id")
        found[key] = record.value.text if hasattr(record.value, "text") else record.value.completion
    return found


class _Judge:
    """References, and the figures that need them. ``rows`` collects the values of single predictions."""

    def __init__(self, options: Options, refs: Sequence[Record]) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.refs: dict[str, Record] = {}
        for record in refs:
            if record.id in self.refs:
                raise record.bad(f"the id {record.id!r} is there twice", "ids must be single", "$.id")
            self.refs[record.id] = record

    def lines(self, name: str, mine: dict[Key, str], theirs: dict[Key, str] | None) -> list[dict[str, Any]]:
        """The lines of one metric."""
        compute = {"cider": self._cider, "chair": self._chair, "pope": self._pope, "vqa": self._vqa}[name]
        if theirs is not None and theirs.keys() != mine.keys():
            odd = next(iter(theirs.keys() ^ mine.keys()))
            raise BadData(f"the prediction for {odd[0]!r} is in one of the files only", "compare the same rows",
                          file=display_name(str(self.options.compare)))  # fmt: skip
        first = compute(mine, keep=True)
        second = compute(theirs, keep=False) if theirs is not None else None
        how = {"draws": self.options.bootstrap, "seed": self.options.seed}
        return [
            line(key, ratio, other=None if second is None else second[key][0], **how, **more)
            for key, (ratio, more) in first.items()
        ]

    def _keep(self, keep: bool, metric: str, key: Key, **values: Any) -> None:
        if keep:
            self.rows.append({"metric": metric, "id": key[0], "turn": key[1], **values})

    def _ref(self, key: Key, kinds: tuple[type, ...], what: str) -> Record:
        record = self.refs.get(key[0])
        if record is None:
            raise BadData(f"no reference for the prediction {key[0]!r}", "give the rows it was made for",
                          file=display_name(str(self.options.refs)))  # fmt: skip
        if not isinstance(record.value, kinds):
            raise record.bad(f"no {what} to compare with", None)
        return record

    def _captions(self, key: Key) -> tuple[Record, list[str]]:
        record = self._ref(key, CAPTIONS, "captions")
        value = record.value
        return record, value.captions if isinstance(value, Captions) else [value.caption]

    def _complete(self, mine: dict[Key, str]) -> None:
        missing = self.refs.keys() - {name for name, _ in mine}
        if missing:
            record = self.refs[min(missing)]
            raise record.bad(f"no prediction for {record.id!r}", "predict every row, or give fewer references")

    def _cider(self, mine: dict[Key, str], keep: bool) -> dict[str, tuple[Ratio, dict[str, Any]]]:
        self._complete(mine)
        pairs = [(key, *self._captions(key)) for key in mine]
        tokens = iter(self._tokens([text for key, _, texts in pairs for text in (mine[key], *texts)]))
        cut = [[next(tokens) for _ in range(1 + len(texts))] for _, _, texts in pairs]
        scores = cider_d([one for one, *_ in cut], [others for _, *others in cut])
        for (key, _, _), score in zip(pairs, scores, strict=True):
            self._keep(keep, "cider", key, value=score)
        ratio = Ratio(scores, [1.0] * len(scores), [record.value.image for _, record, _ in pairs])
        return {"cider": (ratio, {"tokenizer": self.options.tokenizer, "idf": "all references"})}

    def _tokens(self, texts: Sequence[str]) -> list[list[str]]:
        return ptb_tokens(texts) if self.options.tokenizer == "ptb" else [simple_tokens(text) for text in texts]

    def _chair(self, mine: dict[Key, str], keep: bool) -> dict[str, tuple[Ratio, dict[str, Any]]]:
        synonyms = synonyms_of(self.options.chair_synonyms, dropped(self.options.chair_drop))
        rows, images = [], []
        for key, text in mine.items():
            record, captions = self._captions(key)
            row = chair_row(text, truth(record.value.objects or (), captions, synonyms), synonyms)
            rows.append(row)
            images.append(record.value.image)
            self._keep(keep, "chair", key, mentions=row.mentions, hallucinated=row.hallucinated)
        total = chair(rows)
        more = {"recall": total["recall"], "words": total["words"], "synonyms": synonyms.sha256}
        spoken = Ratio([row.hallucinated for row in rows], [row.mentions for row in rows], images)
        whole = Ratio([float(row.hallucinated > 0) for row in rows], [1.0] * len(rows), images)
        return {"chair_i": (spoken, more), "chair_s": (whole, more)}

    def _pope(self, mine: dict[Key, str], keep: bool) -> dict[str, tuple[Ratio, dict[str, Any]]]:
        self._complete(mine)
        groups: dict[str, list[tuple[Key, str, Record]]] = {}
        for key, text in mine.items():
            record = self._ref(key, (Answered,), "yes-or-no answer")
            if record.value.answer not in ("yes", "no"):
                raise record.bad("its answer is neither yes nor no", None, "$.answer")
            groups.setdefault(str(record.data.get("strategy", "all")), []).append((key, text, record))
        found = {}
        for name in sorted(groups, key=lambda one: (STRATEGIES.index(one) if one in STRATEGIES else 9, one)):
            rows = groups[name]
            more = pope([(text, record.value.answer) for _, text, record in rows], strict=self.options.strict)
            right = []
            for key, text, record in rows:
                good = read_answer(text) == record.value.answer and not (self.options.strict and unparsable(text))
                right.append(float(good))
                self._keep(keep, "pope", key, value=float(good), unparsable=unparsable(text))
            images = [_image(record) for _, _, record in rows]
            extra = {key: value for key, value in more.items() if key != "accuracy"}
            found[f"pope-{name}"] = (Ratio(right, [1.0] * len(right), images), extra)
        return found

    def _vqa(self, mine: dict[Key, str], keep: bool) -> dict[str, tuple[Ratio, dict[str, Any]]]:
        values, images = [], []
        for key, text in mine.items():
            record = self._ref(key, REFERENCES, "answer")
            values.append(vqa_accuracy(text, self._answers(record, key[1])))
            images.append(_image(record))
            self._keep(keep, "vqa", key, value=values[-1])
        return {"vqa": (Ratio(values, [1.0] * len(values), images), {})}

    def _answers(self, record: Record, turn: int | None) -> list[str]:
        value = record.value
        if isinstance(value, Answered):
            return [value.answer] if isinstance(value.answer, str) else list(value.answer)
        if isinstance(value, CAPTIONS):
            raise record.bad("no answer to compare with", None)
        (sample,) = samples_of(record, Reading("keep", 10**6), Counts())
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        if turn is not None and not 0 <= turn < len(answers):
            raise record.bad(f"no answer of turn {turn}", None)
        return [answers[-1 if turn is None else turn]]


def _image(record: Record) -> str:
    """What rows are not independent by: their image, else themselves."""
    image = record.data.get("image") or record.data.get("images")
    return str(image) if image else record.id

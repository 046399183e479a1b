"""The heavy half of coca-probe: states from the model, layers shared among the ranks, figures gathered in order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from toolbox.coca.erase import Eraser, Moments, condition_number
from toolbox.coca.probe import Brief, Item, Options, class_names, wanted_layers
from toolbox.coca.reading import digits, fit_eraser, make_split, read_layer
from toolbox.coca.states import (
    Asked,
    Identity,
    hidden_states,
    layer_name,
    next_token_kl,
    read_states,
    reasoned,
    save_states,
)
from toolbox.models.generate import plan_batches
from toolbox.shell.command import Invocation
from toolbox.shell.errors import AlreadyReported, BadData
from toolbox.shell.records import PROMPT_SHAPES, Record, RecordReader, read_records

if TYPE_CHECKING:
    from toolbox.coca.intervention import Intervention
    from toolbox.models.load import ModelSource

PLANE_ROWS = 400
"""Rows of each class that the figure shows."""


@dataclass
class Found:
    """What rank 0 writes: rows, erasers by ``{layer}.{eraser}.part``, points of each layer's first two principal
    components with class and explained shares, and what the states were of."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    erasers: dict[str, Tensor] = field(default_factory=dict)
    plane: dict[int, dict[str, Any]] = field(default_factory=dict)
    identity: str = ""


def probe(
    options: Options, call: Invocation, source: ModelSource, records: Sequence[Record], names: Sequence[str]
) -> Found | None:
    """Everything on every rank; what was found on rank 0, None elsewhere."""
    return _Probe(options, call, source, records, names).go()


class _Probe:
    """One run in one process."""

    def __init__(
        self, options: Options, call: Invocation, source: ModelSource, records: Sequence[Record], names: Sequence[str]
    ) -> None:
        from toolbox.models.chat import Chat
        from toolbox.models.load import load_config, load_tokenizer, prepare
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.options, self.call, self.source = options, call, source
        self.accelerator = start_processes()
        self.leader = self.accelerator.is_main_process
        with self.accelerator.main_process_first():
            prepare(source, call.reporter.note)
        trust = options.trust_remote_code
        self.tokenizer = load_tokenizer(source, trust_remote_code=trust)
        self.chat = Chat(self.tokenizer, options.template, options.system)
        self.config = load_config(_plain(source, trust), trust_remote_code=trust)
        self.depth = self.config.get_text_config(decoder=True).num_hidden_layers
        self.layers = wanted_layers(options, self.depth)
        self.intervention = self._intervention()
        payload = msgspec.json.encode(self._brief(records, names)) if self.leader else None
        self.brief = msgspec.json.decode(broadcast_bytes(self.accelerator, payload), type=Brief)
        self._model: Any = None

    def go(self) -> Found | None:
        with ExitStack() as stack:
            attached = None
            if not self.brief.reuse or self.brief.kl:
                self._model = self._load()
                if self.intervention is not None:
                    attached = stack.enter_context(self.intervention.attach(self._model))
            acts, kept = self._states(attached)
            return self._read(acts, kept, attached)

    # -- what is asked ------------------------------------------------------------------------------------------------
    def _intervention(self) -> Intervention | None:
        if self.options.intervention is None:
            return None
        from toolbox.coca.intervention import load_intervention
        from toolbox.models.facts import weights_digest

        found = load_intervention(self.options.intervention)
        found.check_base(self.config, weights_digest(self.source))
        return found

    def _brief(self, records: Sequence[Record], names: Sequence[str]) -> Brief:
        classes = class_names(names)
        items = []
        for record, name in zip(records, names, strict=True):
            group, fit, test = str(record.value.group), self.options.fit_groups, self.options.test_groups
            items.append(
                Item(self._ids(record), classes.index(name), not fit or group in fit, not test or group in test)
            )
        path = self.options.states
        return Brief(items, classes, self._kl_prompts(), path is not None and Path(path).exists())

    def _ids(self, record: Record) -> list[int]:
        turns = getattr(record.value, "messages", None)
        if turns is None:
            return self.chat.prompt([{"role": "user", "content": record.value.prompt}])
        try:
            return self.chat.prompt([{"role": turn.role, "content": turn.content} for turn in turns])
        except BadData as problem:
            raise record.bad(problem.reason, problem.advice, problem.field) from None

    def _kl_prompts(self) -> list[list[int]]:
        if self.options.kl is None:
            return []
        reader = RecordReader(PROMPT_SHAPES)
        rows = list(read_records(self.options.kl, self.call.streams, reader, "--kl"))
        if not rows:
            raise BadData("the --kl set is empty", "give prompts", file=self.options.kl)
        return [self._ids(record) for record in rows]

    # -- states -------------------------------------------------------------------------------------------------------
    def _load(self) -> Any:
        from toolbox.models.load import load_model

        model = load_model(self.source, dtype=self.options.dtype, trust_remote_code=self.options.trust_remote_code)
        if self.source.kind == "adapter":
            model = model.merge_and_unload()
        return model.to(self.accelerator.device).eval()

    def _identity(self) -> Identity:
        from toolbox.models.responses import model_identity

        options = self.options
        weights = "none"
        if options.intervention is not None:
            from toolbox.weights.read import weight_files

            path = Path(options.intervention)
            files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or weight_files(path)
            weights = Identity.digest(*(hashlib.sha256(one.read_bytes()).hexdigest() for one in files))
        position = options.position if options.tag is None else f"{options.position} {options.max_new_tokens}"
        model = model_identity(self.source, trust_remote_code=options.trust_remote_code)
        rows = hashlib.sha256(msgspec.json.encode([(item.ids, item.label) for item in self.brief.items])).hexdigest()
        return Identity(
            Identity.digest(model, options.dtype), weights,
            Identity.digest(self.chat.source, options.system or ""), position, rows,
        )  # fmt: skip

    def _states(self, attached: Any) -> tuple[Tensor, Tensor]:
        """(rows kept, layers, d) on every rank, and the numbers of these rows."""
        path = self.options.states
        self.identity = self._identity()
        if self.brief.reuse:
            try:
                return read_states(str(path), self.layers, self.identity)
            except BadData as problem:  # every rank finds the same
                if self.leader:
                    raise
                raise AlreadyReported(problem.exit_code) from None
        acts, kept = self._collect(attached)
        if path is not None and self.leader:
            labels = torch.tensor([self.brief.items[row].label for row in kept.tolist()])
            save_states(path, acts, labels, kept, self.layers, self.identity)
        return acts, kept

    def _collect(self, attached: Any) -> tuple[Tensor, Tensor]:
        from toolbox.training.processes import gather_bytes

        items = self.brief.items
        batches = plan_batches([len(item.ids) for item in items], self.options.batch_size)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        width = self.config.get_text_config(decoder=True).hidden_size
        mine: list[tuple[int, bytes]] = []
        with self.call.reporter.progress("batch", len(batches)) as bar:
            for batch in batches[rank::ranks]:
                asked = self._asked([tuple(items[row].ids) for row in batch])
                there = [(row, one) for row, one in zip(batch, asked, strict=True) if one is not None]
                if there:
                    states = hidden_states(self._model, [one for _, one in there], self.layers, attached)
                    mine += [(row, one.numpy().tobytes()) for (row, _), one in zip(there, states, strict=True)]
                bar.advance(ranks)
        parts = gather_bytes(self.accelerator, msgspec.msgpack.encode(mine))
        found = sorted(pair for part in parts for pair in msgspec.msgpack.decode(part, type=list[tuple[int, bytes]]))
        if len(found) < len(items):
            self.call.reporter.warn(f"{len(items) - len(found)} rows never came to </{self.options.tag}>; left out")
        kept = torch.tensor([row for row, _ in found], dtype=torch.int64)
        self._check_kept(kept)
        flat = np.frombuffer(b"".join(block for _, block in found), dtype=np.float32)
        return torch.from_numpy(flat.reshape(len(found), len(self.layers), width).copy()), kept

    def _asked(self, prompts: Sequence[tuple[int, ...]]) -> list[Asked | None]:
        if self.options.tag is None:
            return [Asked(ids, len(ids)) for ids in prompts]
        return reasoned(
            self._model, self.tokenizer, self.chat.end_ids, prompts, self.options.tag, self.options.max_new_tokens
        )

    def _check_kept(self, kept: Tensor) -> None:
        from toolbox.coca.probe import LEAST

        counts = torch.bincount(
            torch.tensor([self.brief.items[row].label for row in kept.tolist()], dtype=torch.int64),
            minlength=len(self.brief.classes),
        )
        if int(counts.min()) < LEAST:
            problem = BadData(
                f"only {int(counts.min())} rows of {self.brief.classes[int(counts.argmin())]} came to "
                f"</{self.options.tag}>", "probe a model that writes the tag, or raise --max-new-tokens",
            )  # fmt: skip
            raise problem if self.leader else AlreadyReported(problem.exit_code)

    # -- reading ------------------------------------------------------------------------------------------------------
    def _read(self, acts: Tensor, kept: Tensor, attached: Any) -> Found | None:
        from safetensors.torch import load, save

        from toolbox.training.processes import gather_bytes

        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        items = [self.brief.items[row] for row in kept.tolist()]
        mine = Found()
        with self.call.reporter.progress("layer", len(self.layers)) as bar:
            for place in range(rank, len(self.layers), ranks):
                self._layer(mine, self.layers[place], acts[:, place], items, attached)
                bar.advance(ranks)
        payload = msgspec.msgpack.encode((mine.rows, save(mine.erasers) if mine.erasers else b"", mine.plane))
        parts = gather_bytes(self.accelerator, payload)
        if not self.leader:
            return None
        whole = Found(identity=repr(self.identity))
        for part in parts:
            rows, erasers, plane = msgspec.msgpack.decode(part, type=tuple[list[dict], bytes, dict[int, dict]])
            whole.rows += rows
            whole.erasers |= load(erasers) if erasers else {}
            whole.plane |= plane
        order = {name: place for place, name in enumerate(self.options.erasers)}
        whole.rows.sort(key=lambda row: (row["layer"], order[row["eraser"]]))
        if all(row["status"] == "constant" for row in whole.rows):
            raise BadData(
                "the states of these layers are one and the same vector for all prompts",
                "layer 0 at the template's last token always is: choose other --layers",
            )
        return whole

    def _layer(self, mine: Found, layer: int, x: Tensor, items: Sequence[Item], attached: Any) -> None:
        options = self.options
        base = {"layer": layer, "name": layer_name(layer, self.depth)}
        if not bool((x != x[0]).any()):
            mine.rows += [{**base, "eraser": name, "status": "constant"} for name in options.erasers]
            return
        labels = np.array([item.label for item in items], dtype=np.int64)
        fits, tests = (np.array([getattr(item, name) for item in items]) for name in ("fits", "tests"))
        groups = (fits, tests) if options.fit_groups else None
        splits = [
            make_split(labels, options.seed + number, int(options.splits), groups)
            for number in range(options.split_seeds)
        ]
        classes, shrinkage = len(self.brief.classes), options.shrinkage == "linear"
        found = read_layer(
            x, labels, splits, options.erasers, classes=classes, shrinkage=shrinkage,
            on_fit=fits if groups is not None else None,
        )  # fmt: skip
        first = splits[0]
        fitted_on = np.flatnonzero(fits)
        whole = Moments(x.shape[1], classes).update(x[torch.from_numpy(fitted_on)], torch.from_numpy(labels[fitted_on]))
        facts = {
            "split": first.kind, "seeds": len(splits), "cond": _finite(condition_number(whole.covariance(shrinkage))),
            "n": {"eraser": len(first.eraser), "probe": len(first.probe), "score": len(first.score)},
            "chance": digits(float(np.bincount(labels[first.score]).max() / len(first.score))),
        }  # fmt: skip
        for name in options.erasers:
            eraser = None
            if options.out is not None or self.brief.kl:
                held_out = np.setdiff1d(first.probe, first.eraser)
                on = first.eraser if name == "inlp" and len(held_out) else fitted_on
                judge = held_out if len(held_out) else first.score
                eraser, _ = fit_eraser(name, x, labels, on, judge, classes=classes, shrinkage=shrinkage)
            row = {**base, "eraser": name, "status": "ok", **facts, **found[name]}
            if name != "none" and row["rank"] == 0:
                row["status"] = "identity"
            if eraser is not None:
                row |= self._kl(eraser, layer, attached)
                if options.out is not None and name != "none":
                    parts = {"proj_left": eraser.proj_left, "proj_right": eraser.proj_right, "mean": eraser.mean}
                    mine.erasers |= {
                        f"{layer}.{name}.{key}": part.clone(memory_format=torch.contiguous_format)
                        for key, part in parts.items()
                    }
            mine.rows.append(row)
        if options.plot is not None:
            mine.plane[layer] = plane(x, labels, self.brief.classes)

    def _kl(self, eraser: Eraser, layer: int, attached: Any) -> dict[str, Any]:
        if not self.brief.kl:
            return {}
        asked = [Asked(tuple(ids), len(ids)) for ids in self.brief.kl]
        values = next_token_kl(self._model, asked, layer, eraser, attached)
        return {"kl": digits(float(np.mean(values))), "kl_n": len(values)}


def plane(x: Tensor, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """The rows' first two principal components, at most 400 of a class, and the shares of variance they explain."""
    wide = x.double()
    centred = wide - wide.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -2:].flip(1)
    axes = axes * torch.where(axes.abs().max(0).values == axes.max(0).values, 1.0, -1.0)  # a sign that does not flip
    points = centred @ axes
    shares = (values[-2:].flip(0) / values.clamp_min(0).sum()).tolist()
    shown = {
        name: [[digits(a), digits(b)] for a, b in points[torch.from_numpy(labels == number)][:PLANE_ROWS].tolist()]
        for number, name in enumerate(classes)
    }
    return {"points": shown, "shares": [digits(share) for share in shares]}


def _finite(value: float) -> float | None:
    return digits(value) if np.isfinite(value) else None


def _plain(source: ModelSource, trust: bool) -> ModelSource:
    from toolbox.models.load import base_model

    return base_model(source, trust_remote_code=trust)

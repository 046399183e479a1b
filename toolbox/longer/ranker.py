"""The whole model: tables, event and candidate vectors, a sequence module, the head; built from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from toolbox.longer.features import EventEncoder, Head
from toolbox.longer.method import Cache, History, Longer
from toolbox.longer.tables import DenseTables

TOKENS = ("longer", "transformer", "hstu")
"""Architectures in which the user is a token of the sequence; for the others its vector is part of the context."""
ARCHITECTURES = ("longer", "transformer", "hstu", "din", "sumpool", "base")


class Config(msgspec.Struct, kw_only=True, frozen=True):
    """What a model directory's ``config.json`` says: sizes, choices, vocabularies by their number of rows."""

    model_type: str = "longer"
    arch: str = "longer"
    dim: int = 32
    max_len: int = 2048
    merge: int = 8
    inner_layers: int = 1
    queries: int = 100
    query_strategy: str = "recent"
    layers: int = 1
    heads: int | None = None
    cls: int = 1
    uid: bool = False
    readout: str = "target"
    time_delta: bool = True
    position: bool = True
    dropout: float = 0.0
    attention: str = "sdpa"
    positive_rate: float = 0.5
    vocabulary: dict[str, int]
    """Rows of each table, by feature: ``item``, ``user``, side features, ``event.*``, ``context.*``."""
    side: tuple[str, ...] = ()
    event_side: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    schema: str = ""
    """Hash of the data's schema: features, vocabularies, time unit."""


@dataclass(frozen=True)
class Batch:
    """Requests as tensors. Ids: 0 is padding. B requests, L history columns (newest last), R candidate columns.

    ``valid`` is None where no history is padded; ``labels`` and ``labelled`` are None when scoring.
    """

    item: Tensor
    sides: Mapping[str, Tensor]
    delta: Tensor
    valid: Tensor | None
    user: Tensor
    candidate: Tensor
    candidate_sides: Mapping[str, Tensor]
    context: Mapping[str, Tensor]
    labels: Tensor | None = None
    labelled: Tensor | None = None

    def to(self, device: Any) -> Batch:
        """The same on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return {key: one.to(device, non_blocking=True) for key, one in value.items()} if value is not None else None

        return Batch(**{name: move(getattr(self, name)) for name in self.__dataclass_fields__})


class Ranker(nn.Module):
    """P(label | history, candidate) as logits; ``user_side`` and ``candidate_logits`` are its two halves."""

    def __init__(self, config: Config, *, tables: nn.Module | None = None, recompute: str = "none") -> None:
        super().__init__()
        self.config = config
        rows, widths = table_sizes(config)
        self.tables = tables if tables is not None else DenseTables(rows, widths)
        self.events = None
        if config.arch != "base":
            self.events = EventEncoder(
                config.dim, config.max_len, position=config.position, time=config.time_delta
            )  # fmt: skip
        self.net = _sequence(config, recompute)
        self.head = Head(config.dim, self.net.output_width, config.positive_rate)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, R), one history pass for all candidates of a request, all tables looked up at once."""
        vectors = self.tables.look_up({**self._history_uses(batch), **self._candidate_uses(batch)})
        candidates, bias = self._candidates(vectors, batch)
        return self._logits(self._cache(vectors, batch), candidates, bias)

    def user_side(self, batch: Batch) -> Cache:
        """What all candidates of a request share."""
        return self._cache(self.tables.look_up(self._history_uses(batch)), batch)

    def candidate_logits(self, cache: Cache, batch: Batch) -> Tensor:
        """Logits (B, R) of candidates against a cache."""
        return self._logits(cache, *self._candidates(self.tables.look_up(self._candidate_uses(batch)), batch))

    def _logits(self, cache: Cache, candidates: Tensor, bias: Tensor) -> Tensor:
        return self.head(self.net.score(cache, candidates), candidates, bias)

    def _history_uses(self, batch: Batch) -> dict[str, tuple[str, Tensor]]:
        if self.events is None:
            return {}
        uses = {"past item": ("item", batch.item)}
        uses |= {f"past {name}": (name, batch.sides[name]) for name in self.config.side}
        uses |= {f"past event.{name}": (f"event.{name}", batch.sides[name]) for name in self.config.event_side}
        if self.config.uid and self.config.arch in TOKENS:
            uses["user token"] = ("user", batch.user)
        return uses

    def _candidate_uses(self, batch: Batch) -> dict[str, tuple[str, Tensor]]:
        uses = {"target item": ("item", batch.candidate), "bias": ("item_bias", batch.candidate)}
        uses |= {f"target {name}": (name, batch.candidate_sides[name]) for name in self.config.side}
        uses |= {f"context {name}": (f"context.{name}", batch.context[name]) for name in self.config.context}
        if self.config.uid and self.config.arch not in TOKENS:
            uses["context user"] = ("user", batch.user)
        return uses

    def _cache(self, vectors: Mapping[str, Tensor], batch: Batch) -> Cache:
        return {} if self.events is None else self.net.prefill(self._history(vectors, batch))

    def _history(self, vectors: Mapping[str, Tensor], batch: Batch) -> History:
        """Event vectors x_e and the user's."""
        assert self.events is not None
        summed = _total(vectors, "past ")
        return History(self.events(summed, batch.delta), batch.valid, batch.delta, vectors.get("user token"))

    def _candidates(self, vectors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """[t_v ; c_r] (B, R, 2d) and the item bias b_v (B, R)."""
        target = _total(vectors, "target ")
        around = torch.zeros_like(target)
        if any(use.startswith("context ") for use in vectors):
            around = _total(vectors, "context ")[:, None].expand_as(target)
        return torch.cat((target, around), -1), vectors["bias"].squeeze(-1)

    def joint_logits(self, batch: Batch) -> Tensor:
        """Logits (B, R) without any sharing: each candidate with its whole history by the plain path."""
        vectors, bias = self._candidates(self.tables.look_up(self._candidate_uses(batch)), batch)
        columns = []
        for column in range(batch.candidate.shape[1]):
            one = vectors[:, column]
            if isinstance(self.net, Longer):
                past = self._history(self.tables.look_up(self._history_uses(batch)), batch)
                columns.append(self.net.forward_joint(past, one))
            else:
                columns.append(self.net.score(self.user_side(batch), one[:, None])[:, 0])
        return self.head(torch.stack(columns, 1), vectors, bias)


def _total(vectors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The sum of the vectors whose use begins so."""
    first, *rest = [vector for use, vector in vectors.items() if use.startswith(prefix)]
    for vector in rest:
        first = first + vector
    return first


def table_sizes(config: Config) -> tuple[dict[str, int], dict[str, int]]:
    """Rows and widths of the tables that this architecture reads."""
    used = ["item", *config.side, *(f"context.{name}" for name in config.context)]
    if config.arch != "base":
        used += [f"event.{name}" for name in config.event_side]
    if config.uid:
        used.append("user")
    rows = {name: config.vocabulary[name] for name in used}
    widths = dict.fromkeys(rows, config.dim)
    return {**rows, "item_bias": config.vocabulary["item"]}, {**widths, "item_bias": 1}


def _sequence(config: Config, recompute: str) -> Any:
    from toolbox.longer.peers.base import Base
    from toolbox.longer.peers.din import Din
    from toolbox.longer.peers.hstu import Hstu
    from toolbox.longer.peers.sumpool import SumPool
    from toolbox.longer.peers.transformer import Transformer

    shared: dict[str, Any] = {
        "cls": config.cls, "uid": config.uid, "read_cls": config.readout == "target+cls", "dropout": config.dropout,
        "recompute": recompute, "flex": config.attention == "flex", "heads": config.heads,
    }  # fmt: skip
    match config.arch:
        case "longer":
            return Longer(
                config.dim, merge=config.merge, inner_layers=config.inner_layers, queries=config.queries,
                strategy=config.query_strategy, layers=config.layers, **shared,
            )  # fmt: skip
        case "transformer":
            return Transformer(config.dim, config.max_len, **shared)
        case "hstu":
            return Hstu(config.dim, config.max_len, uid=config.uid)
        case "din":
            return Din(config.dim)
        case "sumpool":
            return SumPool(config.dim)
    return Base()


def as_json(config: Config) -> dict[str, Any]:
    """The configuration as it is written to ``config.json``."""
    return msgspec.to_builtins(config)

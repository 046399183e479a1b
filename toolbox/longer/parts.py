"""What a run is made of: the model's configuration, the optimisers, the names on disk. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolbox.longer.dataset import Manifest
from toolbox.longer.options import Choices, Options

if TYPE_CHECKING:
    from toolbox.longer.ranker import Config, Ranker


def make_config(options: Options, manifest: Manifest, choices: Choices) -> Config:
    """The model's configuration."""
    from toolbox.longer.ranker import Config

    return Config(
        arch=options.arch, dim=options.dim, max_len=choices.max_len,
        merge=options.merge if options.arch == "longer" else 1, inner_layers=options.inner_layers,
        queries=choices.queries, query_strategy=options.query_strategy, layers=options.layers, heads=choices.heads,
        cls=choices.cls, uid=choices.uid, readout=options.readout, time_delta=options.time_delta,
        position=options.position, dropout=options.dropout, attention=choices.attention,
        positive_rate=manifest.positive_rate["train"], vocabulary=manifest.vocabulary, side=tuple(manifest.side),
        event_side=tuple(manifest.event_side), context=tuple(manifest.context), schema=manifest.schema,
    )  # fmt: skip


def stored_name(name: str, config: Config) -> str:
    """The name of a parameter in the file: the narrow tables beside TorchRec's are called as in plain tables."""
    from toolbox.longer.ranker import table_sizes

    prefix, inside, rest = name.partition("tables.plain.table_")
    if prefix or not inside:
        return name
    rows, widths = table_sizes(config)
    narrow = [place for place, table in enumerate(rows) if widths[table] == 1]
    number, _, tail = rest.partition(".")
    return f"tables.table_{narrow[int(number)]}.{tail}"


def make_optimizers(model: Ranker, options: Options) -> list[Any]:
    """AdamW for the dense part, weight decay on its linear maps only; row-wise Adagrad for the tables.

    ``sgd``: plain SGD for both, whose steps do not magnify rounding.
    """
    import torch
    from torch import nn

    from toolbox.longer.tables import RowwiseAdagrad

    tables = list(model.tables.parameters())
    maps = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    dense = [p for name, p in model.named_parameters() if not name.startswith("tables.")]
    groups = [
        {"params": [p for p in dense if id(p) in maps], "weight_decay": options.weight_decay},
        {"params": [p for p in dense if id(p) not in maps], "weight_decay": 0.0},
    ]
    table_group = [{"params": tables, "scale": options.emb_lr / options.lr}]
    if options.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=options.lr), torch.optim.SGD(table_group, lr=options.emb_lr)]
    adam = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    return [adam, RowwiseAdagrad(table_group, lr=options.emb_lr)]

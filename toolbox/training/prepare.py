"""Getting rows, a model and an optimiser ready for training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Row
from toolbox.training.language import TrainOptions

if TYPE_CHECKING:
    import torch

    from toolbox.models.chat import Chat, Encoded


def encode_rows(
    chat: Chat,
    rows: Sequence[Row],
    name: str,
    options: TrainOptions,
    warn: Callable[[str], None],
    loss_on: str | None = None,
) -> tuple[list[Encoded], list[int]]:
    """The rows of the set ``name`` as tokens, and the places of these rows in ``rows``.

    What is longer than ``--max-length`` is cut there, or left out and counted (``options.long_rows``). ``loss_on``
    stands for ``--loss-on``.

    A row that the template refuses or that has no labelled token is bad data, or left out with ``--on-bad skip``.
    ``warn`` is told how many rows were left out and how many were cut.
    """
    encoded, kept, left_out, cut, long = [], [], [], 0, 0
    for place, row in enumerate(rows):
        try:
            whole = _encode_row(chat, row, loss_on or options.loss_on)
            if options.long_rows == "skip" and len(whole.ids) > options.max_length:
                long += 1
                continue
            one = whole.cut(options.max_length)
            if not one.n_labelled:
                raise BadData(
                    f"no labelled token within --max-length {options.max_length}",
                    "raise --max-length, or leave such rows out with --on-bad skip",
                )
        except BadData as problem:
            if options.on_bad == "fail":
                where = {"file": row.file, "line": row.line, "field": problem.field}
                raise BadData(problem.reason, problem.advice, **where) from None
            left_out.append(row.id)
            continue
        encoded.append(one)
        kept.append(place)
        cut += len(one.ids) < len(whole.ids)
    if left_out:
        warn(f"{name}: {len(left_out)} rows that cannot be learned from left out (ids {', '.join(left_out[:5])})")
    if cut:
        warn(f"{name}: {cut} rows cut at --max-length {options.max_length}; what is behind is neither used nor scored")
    if long:
        warn(f"{name}: {long} rows longer than --max-length {options.max_length} left out")
    if not encoded:
        raise BadData(f"the {name} set has no row to learn from", "raise --max-length, or try another --template")
    return encoded, kept


def _encode_row(chat: Chat, row: Row, loss_on: str) -> Encoded:
    if row.text is not None:
        return chat.encode_text(row.text)
    assert row.messages is not None
    return chat.encode(row.messages, loss_on=loss_on)


def without_dropout(model: torch.nn.Module) -> None:
    """Switch dropout off: with it a step would depend on how its window is split."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def choose_parameters(model: torch.nn.Module, pattern: str | None) -> None:
    """Freeze every parameter whose name does not match ``pattern``."""
    if pattern is None:
        return
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UsageProblem(f"--train-params {pattern}: {error}", "a Python regular expression") from None
    names = [name for name, _ in model.named_parameters()]
    if not any(wanted.search(name) for name in names):
        example = names[len(names) // 2]
        raise UsageProblem(f"--train-params {pattern}: matches no parameter", f"names look like {example}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(wanted.search(name)))


def make_optimizer(model: torch.nn.Module, options: TrainOptions, lr: float) -> torch.optim.Optimizer:
    """AdamW (betas .9/.999, eps 1e-8) or plain SGD; weight decay on matrices only.

    A parameter may say otherwise: ``parameter.decays`` (bool), ``parameter.lr_scale`` (times the learning rate).
    """
    import torch

    members: dict[tuple[bool, float], list[Any]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        decays = getattr(parameter, "decays", parameter.ndim >= 2)
        members.setdefault((decays, getattr(parameter, "lr_scale", 1.0)), []).append(parameter)
    groups = [
        {"params": members[decays, scale], "weight_decay": options.weight_decay if decays else 0.0, "scale": scale}
        for decays, scale in sorted(members, reverse=True)
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

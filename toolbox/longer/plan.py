"""``longer-train --dry-run``: what a run would read, cost and need, by formula."""

from __future__ import annotations

from typing import Any

import torch

from toolbox.longer import costs
from toolbox.longer.data import RequestPlan, Requests
from toolbox.longer.method import Longer
from toolbox.longer.objective import AUTO_LENGTH
from toolbox.longer.ranker import Config, Ranker

_ACTIVATION_BYTES = 32
"""Saved for backward for each number of an event's vector, roughly: measured at d = 32 and K = 4 or 8."""


def sizes_of(config: Config, length: int | None = None) -> costs.Sizes:
    """The sizes that the cost formulas take."""
    length = config.max_len if length is None else length
    if config.arch == "transformer":
        return costs.Sizes(length, config.dim, 1, 0, length, 1, config.uid + config.cls)
    return costs.Sizes(
        length, config.dim, config.merge, config.inner_layers, config.queries, config.layers, config.uid + config.cls
    )


def parameters(config: Config) -> dict[str, Any]:
    """Parameters by part, from the module itself (no memory is taken for them)."""
    with torch.device("meta"):
        model = Ranker(config)
    tables = sum(p.numel() for p in model.tables.parameters())
    parts = {"events": model.events, "sequence": model.net, "head": model.head}
    dense = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    found: dict[str, Any] = {"dense": sum(dense.values()), "tables": tables, "parts": dense}
    if isinstance(model.net, Longer):
        inner = len(model.net.merge.blocks) * costs.block_parameters(config.dim)
        blocks = (1 + len(model.net.selves)) * costs.block_parameters(model.net.width)
        found["blocks_by_formula"] = {"inner": inner, "cross and self": blocks}
    return found


def flops_per_label(config: Config, length: float, candidates: float) -> float | None:
    """Training FLOPs (3 × forward) of the sequence part a label; None for peers without a formula of their own."""
    if config.arch not in ("longer", "transformer"):
        return None
    read = config.cls if config.readout == "target+cls" else 0
    sizes = sizes_of(config, max(1, round(length)))
    return 3 * costs.flops_per_label(sizes, max(1.0, candidates), executed=True, read_rows=read)


def facts(config: Config, requests: Requests, plan: RequestPlan, batch: int) -> dict[str, Any]:
    """Everything ``--dry-run`` tells."""
    counted = parameters(config)
    candidates = float(requests.candidates.mean())
    length = float(requests.length.mean())
    found: dict[str, Any] = {
        "requests": len(requests),
        "labels": int(requests.candidates.sum()),
        "history_events": int(requests.length.sum()),
        "mean_history": round(length, 1),
        "mean_candidates": round(candidates, 2),
        "steps": plan.steps,
        "parameters": counted,
        "flops_per_label": flops_per_label(config, length, candidates),
    }
    if config.arch == "longer":
        sizes = sizes_of(config)
        read = config.cls if config.readout == "target+cls" else 0
        dim, merge = config.dim, config.merge
        found |= {
            "layer_flops": {
                "plain": costs.plain_layer_flops(config.max_len, dim),
                "merged": costs.merged_layer_flops(config.max_len, dim, merge),
                "change": round(costs.merged_ratio(config.max_len, dim, merge) - 1, 4),
            },
            "request_flops": {
                "paper": costs.request_flops(sizes),
                "executed": costs.request_flops(sizes, executed=True, read_rows=read),
            },
            "candidate_flops": costs.candidate_flops(sizes),
            "merging_saves_above_events": costs.break_even_length(dim, merge),
            "merge_of_fewest_flops": round(costs.best_merge(config.max_len, dim), 2),
            "cache_bytes": {"fp32": costs.cache_bytes(sizes, 4), "bf16": costs.cache_bytes(sizes, 2)},
        }
    events = min(AUTO_LENGTH, batch * int(requests.length.max()))
    found["memory_bytes"] = 16 * counted["dense"] + 4 * counted["tables"] + events * config.dim * _ACTIVATION_BYTES * 4
    return found

"""legit-score: learned graphs in, their distances to the truth out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toolbox.legit.graphs import Graph, read_graphs, read_truth
from toolbox.legit.method import project_to_dag
from toolbox.legit.metrics import acyclic, judge
from toolbox.legit.records import GRAPH_SHAPES
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank


@dataclass(frozen=True, kw_only=True)
class Options:
    """legit-score's options."""

    file: str = "-"
    truth: str = ""
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    seed: int = 0


def run(options: Options, call: Invocation) -> None:
    """One line a graph. A cyclic estimate is projected, and the line says so."""
    if process_rank() != 0:
        return
    rejected: list[bytes] = []
    reader = RecordReader(
        GRAPH_SHAPES, renames=parse_map(options.map_fields), on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )  # fmt: skip
    writer = JsonlWriter(call.streams)
    graphs = 0
    for graph in read_graphs(options.file, call.streams, reader):
        true = read_truth(options.truth, graph.names, call.streams)
        graphs += 1
        if not call.dry_run:
            writer.write(scored(graph, true))
    if reader.skipped:
        call.reporter.warn(f"{reader.skipped} bad rows left out")
        if options.rejects is not None:
            write_rejects(options.rejects, rejected)
    if not graphs:
        raise BadData(
            "the input is empty", "legit-fit writes graphs", file="stdin" if options.file == "-" else options.file
        )
    if call.dry_run:
        writer.write({"event": "plan", "command": call.command, "graphs": graphs, "settings": call.settings})
    writer.close()


def scored(graph: Graph, true: np.ndarray) -> dict[str, Any]:
    """The line of one graph. The projection that its lines tell is used where it is a DAG, else one is made."""
    dag, dropped = graph.in_dag, int((graph.raw & ~graph.in_dag).sum())
    if not acyclic(dag):
        found, gone = project_to_dag(torch.from_numpy(graph.raw), torch.from_numpy(graph.p))
        dag, dropped = found.numpy(), len(gone)
    return {
        **judge(true, graph.raw, dag), "nodes": len(graph.names), "acyclic": acyclic(graph.raw), "dropped": dropped,
    }  # fmt: skip

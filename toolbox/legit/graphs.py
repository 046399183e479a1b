"""Graphs as lines: a header with the nodes, then one line an edge; and the true graph, from wherever it comes."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.legit.learner import Belief
from toolbox.legit.metrics import acyclic
from toolbox.legit.network import packaged_networks, read_network
from toolbox.legit.records import GRAPH_SHAPES, Edge, GraphHeader
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.records import Record, RecordReader, read_records
from toolbox.shell.streams import Streams


@dataclass(frozen=True)
class Graph:
    """A named graph: ``raw`` as it was learned, ``p`` its edge probabilities (0 where a line has none), ``place`` for
    messages. ``in_dag`` is its projection where the lines tell one."""

    names: tuple[str, ...]
    raw: NDArray[np.bool_]
    p: NDArray[np.float64]
    in_dag: NDArray[np.bool_]
    place: str


def graph_lines(
    names: Sequence[str], belief: Belief, rows: int, *, all_pairs: bool = False
) -> Iterator[dict[str, Any]]:
    """The header, then the edges by row and column; ``all_pairs`` tells every ordered pair."""
    dropped = [[names[i], names[j]] for i, j in belief.dropped]
    yield {"record": "graph", "nodes": list(names), "acyclic": not dropped, "dropped": dropped, "rows": rows}
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            if i == j or not (all_pairs or belief.raw[i, j]):
                continue
            line = {
                "source": source,
                "target": target,
                "p": float(belief.p[i, j]),
                "p_edge": float(belief.p_edge[i, j]),
                "p_orient": float(belief.p_orient[i, j]),
                "in_dag": bool(belief.dag[i, j]),
            }
            yield {**line, "in_graph": bool(belief.raw[i, j])} if all_pairs else line


def read_graphs(name: str, streams: Streams, reader: RecordReader) -> Iterator[Graph]:
    """The graphs of a stream, each ended by the next header. BadData (65): an edge of other nodes, or no header."""
    header: Record | None = None
    edges: list[Edge] = []
    for record in read_records(name, streams, reader, "the graphs"):
        if isinstance(record.value, GraphHeader):
            if header is not None:
                yield _graph(header, edges)
            if len(set(record.value.nodes)) < len(record.value.nodes) or not record.value.nodes:
                raise record.bad("the nodes need names, each once", None, "$.nodes")
            header, edges = record, []
            continue
        if header is None:
            raise record.bad(
                "an edge without a graph before it", 'the first line is {"record": "graph", "nodes": [...]}'
            )
        edge: Edge = record.value
        for field, node in (("$.source", edge.source), ("$.target", edge.target)):
            if node not in header.value.nodes:
                raise record.bad(f"{node} is no node of the graph", None, field)
        if edge.source == edge.target:
            raise record.bad(f"{edge.source} would cause itself", None, "$.target")
        edges.append(edge)
    if header is not None:
        yield _graph(header, edges)


def _graph(header: Record, edges: Sequence[Edge]) -> Graph:
    names = tuple(sorted(header.value.nodes))
    place = {name: index for index, name in enumerate(names)}
    raw = np.zeros((len(names), len(names)), dtype=bool)
    p, in_dag = np.zeros(raw.shape), np.zeros_like(raw)
    for edge in edges:
        at = place[edge.source], place[edge.target]
        raw[at] = edge.in_graph
        in_dag[at] = edge.in_graph and edge.in_dag
        p[at] = 1.0 if edge.p is None else edge.p
    return Graph(names, raw, p, in_dag, f"{header.file}:{header.line or header.index + 1}")


def read_truth(name: str, names: Sequence[str], streams: Streams) -> NDArray[np.bool_]:
    """The true graph over ``names`` in their order: a network's, or the edges in a .jsonl or .csv file.

    Raises: MissingInput (66); BadData (65) for a cycle, and for node sets that differ, with the difference.
    """
    if name not in packaged_networks() and name.endswith((".csv", ".jsonl", ".json")):
        if not Path(name).is_file():
            raise MissingInput(f"{name}: no such file", "--truth takes a network, or a file of edges")
        found = _csv_graph(name, names) if name.endswith(".csv") else _one_graph(name, streams)
    else:
        network = read_network(name)
        found = Graph(network.names, network.adjacency, np.zeros(0), network.adjacency, name)
    if set(found.names) != set(names):
        missing, extra = sorted(set(found.names) - set(names)), sorted(set(names) - set(found.names))
        parts = [f"{what} {', '.join(some[:8])}" for what, some in (("lacks", missing), ("adds", extra)) if some]
        raise BadData(f"the estimate is of other nodes than {name}: it {' and '.join(parts)}", "compare like with like")
    place = [found.names.index(one) for one in names]
    true = found.raw[np.ix_(place, place)]
    if not acyclic(true):
        raise BadData("the true graph has a directed cycle", "a causal graph of this kind has none", file=name)
    return true


def _one_graph(name: str, streams: Streams) -> Graph:
    found = list(read_graphs(name, streams, RecordReader(GRAPH_SHAPES)))
    if len(found) != 1:
        raise BadData(f"{len(found)} graphs where one is expected", None, file=name)
    return found[0]


def _csv_graph(name: str, names: Sequence[str]) -> Graph:
    """Edges as ``source,target`` lines. A CSV file cannot tell isolated nodes: those of the estimate are taken."""
    known = sorted(names)
    raw = np.zeros((len(known), len(known)), dtype=bool)
    with open(name, encoding="utf-8-sig", newline="") as handle:
        try:
            for number, row in enumerate(csv.reader(handle), 1):
                cells = [cell.strip() for cell in row]
                if not any(cells) or (number == 1 and [cell.lower() for cell in cells[:2]] in _HEADS):
                    continue
                if len(cells) < 2 or cells[0] not in known or cells[1] not in known or cells[0] == cells[1]:
                    what = f"not an edge between two nodes of the estimate: {','.join(cells)[:80]}"
                    raise BadData(what, "source,target", file=name, line=number)
                raw[known.index(cells[0]), known.index(cells[1])] = True
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadData(f"not a CSV file: {error}", "source,target", file=name) from None
    return Graph(tuple(known), raw, raw.astype(np.float64), raw, name)


_HEADS = (["source", "target"], ["from", "to"])

"""The lines that go through the legit commands: data rows, variables, targets, graphs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from toolbox.shell.records import Text

Stage = Literal["warmup", "bootstrap", "resample", "plan", "numeric"]
"""What chose a target: the model's first list, its second, one of these again, a given list, or a score."""


class DataRow(msgspec.Struct, kw_only=True):
    """One measurement of all variables; ``targets`` names the one that was set by the experimenter, if any."""

    needs: ClassVar[tuple[str, ...]] = ("values",)
    values: dict[str, Any]
    targets: list[str] = []
    round: int | None = None
    occurrence: int | None = None


class VariableRow(msgspec.Struct, kw_only=True):
    """One variable: what it is called, what it is, its states, and whether and at what cost it can be set."""

    needs: ClassVar[tuple[str, ...]] = ("name",)
    name: Text
    description: str | None = None
    states: list[str] | None = None
    domain: str | None = None
    cost: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    allowed: bool = True


class AskedTarget(msgspec.Struct, kw_only=True):
    """What ``legit-sim --from`` reads of a target row."""

    needs: ClassVar[tuple[str, ...]] = ("target",)
    target: Text
    round: int | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=10**8)] | None = None
    values: str = "uniform"
    occurrence: Annotated[int, msgspec.Meta(ge=0)] = 0


class TargetRow(msgspec.Struct, kw_only=True):
    """The next experiment, and who asked for it."""

    round: int
    target: str
    stage: Stage
    strategy: str
    score: float | None
    rank: int
    n: int
    values: str
    occurrence: int
    votes: int | None
    seed: int
    fallback: str | None


class GraphHeader(msgspec.Struct, kw_only=True):
    """The first line of a graph: its nodes, isolated ones too."""

    needs: ClassVar[tuple[str, ...]] = ("record", "nodes")
    record: Literal["graph"]
    nodes: list[Text]
    acyclic: bool | None = None
    dropped: list[list[str]] = []
    rows: int | None = None


class Edge(msgspec.Struct, kw_only=True):
    """One edge of the graph whose header came before; ``in_graph`` false marks a pair that is told and not an edge."""

    needs: ClassVar[tuple[str, ...]] = ("source", "target")
    source: Text
    target: Text
    p: float | None = None
    p_edge: float | None = None
    p_orient: float | None = None
    in_dag: bool = True
    in_graph: bool = True


GRAPH_SHAPES: tuple[type[msgspec.Struct], ...] = (GraphHeader, Edge)


class GraphScore(msgspec.Struct, kw_only=True):
    """One estimated graph, judged."""

    shd: int
    shd_dag: int
    shd_empty: int
    sid: int
    sid_normalised: float
    bsf: float
    tpr: float | None
    fdr: float | None
    f1: float | None
    skeleton_f1: float | None
    edges: int
    true_edges: int
    nodes: int
    acyclic: bool
    dropped: int


class RoundEvent(msgspec.Struct, kw_only=True):
    """A round of a loop: who asked for what, and the graph after its rows; figures only where the truth is known."""

    event: Literal["round"]
    strategy: str
    seed: int
    round: int
    target: str
    stage: Stage
    score: float | None
    votes: int | None
    fallback: str | None
    rows: int
    edges: int
    acyclic: bool
    dropped: int
    shd: int | msgspec.UnsetType = msgspec.UNSET
    shd_dag: int | msgspec.UnsetType = msgspec.UNSET
    sid: int | msgspec.UnsetType = msgspec.UNSET
    bsf: float | msgspec.UnsetType = msgspec.UNSET


class RunEvent(msgspec.Struct, kw_only=True):
    """A whole design."""

    event: Literal["run"]
    strategy: str
    seed: int
    rounds: int
    rows: int
    edges: int
    picks: dict[str, int]
    diversity: float
    stages: dict[str, int]
    fallbacks: dict[str, int]
    shd: int | msgspec.UnsetType = msgspec.UNSET
    aushd: float | msgspec.UnsetType = msgspec.UNSET

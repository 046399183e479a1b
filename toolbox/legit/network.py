"""Discrete Bayesian networks: read from BIF, kept in the user's cache, sampled with interventions.

pgmpy reads BIF files, and its wheel carries the usual benchmark networks. Importing it costs seconds, so a file is
parsed once and then kept as safetensors under its SHA-256; the packaged files are found without importing it.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.shell.atomic import atomic_file
from toolbox.shell.errors import BadData, CannotCreate, MissingInput

MOST_STATES = 127
"""States are held as int8."""

_TOLERANCE = 1e-4
"""Of a column's sum: files round probabilities to some digits."""

_LARGEST = 64 << 20
_CACHE_FORMAT = 1
_VARIABLE = re.compile(r"variable\s+[^{]+\{[^}]*?type\s+\w+\s*\[\s*(\d+)\s*\]")
_PROBABILITY = re.compile(r"probability\s*\(([^)|]*)\|?([^)]*)\)")


@dataclass(frozen=True)
class Network:
    """A Bayesian network over named variables in alphabetical order: files list theirs in causal order, a giveaway.

    ``parents[n]`` are places in ``names``; ``tables[n]`` is [combinations, C_n] float64, the first parent's state
    varying slowest, every row a distribution.
    """

    names: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    tables: tuple[NDArray[np.float64], ...]

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """The variables, parents before children."""
        done: list[int] = []
        while len(done) < len(self.names):
            ready = [n for n, above in enumerate(self.parents) if n not in done and set(above) <= set(done)]
            if not ready:
                raise BadData("the network has a directed cycle", "a Bayesian network has none")
            done += ready
        return tuple(done)

    @functools.cached_property
    def adjacency(self) -> NDArray[np.bool_]:
        """The true graph, bool [N, N], row = cause."""
        graph = np.zeros((len(self.names), len(self.names)), dtype=bool)
        for child, above in enumerate(self.parents):
            graph[list(above), child] = True
        return graph

    @functools.cached_property
    def _steps(self) -> tuple[NDArray[np.float64], ...]:
        """Cumulative tables whose last state of positive probability closes at exactly 1."""
        steps = []
        for table in self.tables:
            cumulative = table.cumsum(1)
            last = table.shape[1] - 1 - (table[:, ::-1] > 0).argmax(1)
            cumulative[np.arange(table.shape[1])[None, :] >= last[:, None]] = 1.0
            steps.append(cumulative)
        return tuple(steps)

    def sample(
        self, noise: NDArray[np.float64], target: int | None = None, value: int | None = None
    ) -> NDArray[np.int8]:
        """Rows [n, N] by inverse distribution functions of ``noise`` in [0, 1) [n, N], parents first.

        Under do(``target``) its column is ``value``, or uniform over its states; all else follows. Variables that do
        not descend from the target are the same for the same noise.
        """
        rows = np.zeros(noise.shape, dtype=np.int8)
        for node in self.order:
            size = len(self.states[node])
            if node == target:
                rows[:, node] = (
                    np.minimum((noise[:, node] * size).astype(np.int8), size - 1) if value is None else value
                )
                continue
            place = np.zeros(len(noise), dtype=np.int64)
            for parent in self.parents[node]:
                place = place * len(self.states[parent]) + rows[:, parent]
            rows[:, node] = (noise[:, node, None] >= self._steps[node][place]).sum(1)
        return rows


def keyed_generator(seed: int, target: str | None, occurrence: int = 0) -> np.random.Generator:
    """The randomness of one experiment: a function of (seed, the target's name, how often it was a target before).

    So rows do not depend on what was asked before, and strategies are compared on the same draws.
    """
    name = "" if target is None else hashlib.sha256(target.encode()).hexdigest()
    key = hashlib.sha256(f"{seed}/{name}/{occurrence}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key, "big")))


def draw_rows(
    network: Network, n: int, seed: int, target: int | None = None, occurrence: int = 0, value: int | None = None
) -> NDArray[np.int8]:
    """``n`` rows [n, N] of one experiment, or observed ones; the first rows do not depend on ``n``."""
    name = None if target is None else network.names[target]
    noise = keyed_generator(seed, name, occurrence).random((n, len(network.names)))
    return network.sample(noise, target, value)


# -- files ------------------------------------------------------------------------------------------------------------
def packaged_networks() -> dict[str, Path]:
    """The BIF files of pgmpy's wheel by name, found without importing it; empty without pgmpy."""
    found = importlib.util.find_spec("pgmpy")
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / "utils" / "example_models"
    return {path.name.removesuffix(".bif.gz"): path for path in sorted(folder.glob("*.bif.gz"))}


def list_networks() -> list[dict[str, Any]]:
    """A record a packaged network: name, nodes, edges, the most states of a variable. Read off the text, unparsed."""
    records = []
    for name, path in packaged_networks().items():
        text = _text(path.read_bytes(), str(path))
        sizes = [int(size) for size in _VARIABLE.findall(text)]
        edges = sum(len([one for one in above.split(",") if one.strip()]) for _, above in _PROBABILITY.findall(text))
        records.append({"name": name, "nodes": len(sizes), "edges": edges, "max_states": max(sizes, default=0)})
    return records


def find_network(name: str) -> Path:
    """The file that ``--network`` names: a packaged network, else a BIF file. MissingInput (66) where there is none."""
    packaged = packaged_networks()
    if name in packaged:
        return packaged[name]
    path = Path(name)
    if path.is_file():
        return path
    known = ", ".join(key for key in ("asia", "child", "insurance", "alarm", "sachs") if key in packaged)
    advice = f"packaged are {known}, ... (legit-sim --list); or give --network FILE.bif" if known else (
        "pgmpy's packaged networks are not here: give --network FILE.bif"
    )  # fmt: skip
    raise MissingInput(f"{name}: no such network", advice)


def read_network(name: str) -> Network:
    """The network called ``name``, from the cache when its file was parsed before.

    Raises: MissingInput (66), BadData (65) for a file that is no discrete Bayesian network.
    """
    path = find_network(name)
    content = path.read_bytes()
    if len(content) > _LARGEST:
        raise BadData(f"larger than {_LARGEST:,} bytes", "is this a BIF file?", file=str(path))
    kept = _cache_path(hashlib.sha256(content).hexdigest())
    network = None if kept is None else _from_cache(kept)
    if network is None:
        network = parse_bif(_text(content, str(path)), str(path))
        if kept is not None:
            _to_cache(kept, network)
    return network


def parse_bif(text: str, file: str) -> Network:
    """The network in the BIF ``text``; BadData (65) where it is none, a table is incomplete or does not sum to 1."""
    if "probability" not in text or "variable" not in text:
        raise BadData("not a network in the BIF format", "it has `variable` and `probability` blocks", file=file)
    try:
        from pgmpy.readwrite import BIFReader
    except ImportError as error:
        raise MissingInput(f"pgmpy cannot be imported ({error})", "pip install 'pgmpy>=1.1,<1.3'") from None
    try:
        reader = BIFReader(string=text)
        names = tuple(sorted(reader.variable_names))
        place = {name: index for index, name in enumerate(names)}
        states = tuple(tuple(reader.variable_states[name]) for name in names)
        parents = tuple(tuple(place[one] for one in reader.variable_parents[name]) for name in names)
        tables = [np.ascontiguousarray(np.asarray(reader.variable_cpds[name], dtype=np.float64).T) for name in names]
    except Exception as error:  # a parser of text from outside raises whatever it trips over
        raise BadData(f"not a network that can be read: {type(error).__name__}: {error}", None, file=file) from None
    _check(names, states, parents, tables, file)
    network = Network(names, states, parents, tuple(table / table.sum(1, keepdims=True) for table in tables))
    try:
        _ = network.order
    except BadData as problem:
        raise BadData(problem.what, problem.advice, file=file) from None
    return network


def _check(
    names: Sequence[str],
    states: Sequence[tuple[str, ...]],
    parents: Sequence[tuple[int, ...]],
    tables: Sequence[NDArray[np.float64]],
    file: str,
) -> None:
    if len(set(names)) < len(names):
        raise BadData("a variable is there twice", None, file=file)
    for name, own, above, table in zip(names, states, parents, tables, strict=True):
        if not 2 <= len(own) <= MOST_STATES or len(set(own)) < len(own):
            raise BadData(f"{name} has {len(own)} states", f"2 to {MOST_STATES} different ones are needed", file=file)
        wanted = (int(np.prod([len(states[one]) for one in above], dtype=np.int64)), len(own))
        if table.shape != wanted or not np.isfinite(table).all() or (table < 0).any():
            raise BadData(f"the table of {name} is not {wanted[0]} x {wanted[1]} probabilities", None, file=file)
        if np.abs(table.sum(1) - 1).max() > _TOLERANCE:
            raise BadData(f"a column in the table of {name} does not sum to 1", "complete the table", file=file)


def _text(content: bytes, file: str) -> str:
    try:
        raw = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        return raw.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise BadData(f"damaged gzip data: {error}", "make the file anew", file=file) from None
    except UnicodeDecodeError:
        raise BadData("not UTF-8 text", "is this a BIF file?", file=file) from None


# -- the cache --------------------------------------------------------------------------------------------------------
def _cache_path(digest: str) -> Path | None:
    from toolbox.models.load import cache_root

    try:
        return cache_root() / f"bif-{_CACHE_FORMAT}" / f"{digest}.safetensors"
    except CannotCreate:  # no home: the network is parsed every time
        return None


def _to_cache(path: Path, network: Network) -> None:
    from safetensors.numpy import save

    told = {"names": network.names, "states": network.states, "parents": network.parents}
    content = save({f"{n:05d}": table for n, table in enumerate(network.tables)}, {"network": json.dumps(told)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as handle:
            handle.write(content)
    except (OSError, CannotCreate):  # a cache that cannot be written costs time only
        return


def _from_cache(path: Path) -> Network | None:
    """The kept network; None where it is not there or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            told = json.loads((handle.metadata() or {})["network"])
            tables = tuple(handle.get_tensor(f"{n:05d}") for n in range(len(told["names"])))
        return Network(
            tuple(told["names"]), tuple(map(tuple, told["states"])), tuple(map(tuple, told["parents"])), tables
        )
    except (OSError, KeyError, ValueError, SafetensorError):
        return None

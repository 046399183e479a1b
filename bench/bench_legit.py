"""Design of experiments: the graph step in its three forms, a round, and what a simulator call costs."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Iterator

from bench.common import ROOT, Figure, alternate, process_seconds, ratios


def _alarm(settled: bool, graphs: int):
    """Networks, rows and sampled graphs of Alarm's size, at a flat belief or at a settled one."""
    import torch

    from toolbox.legit.conditionals import Conditionals
    from toolbox.legit.method import edge_probabilities, sample_graphs
    from toolbox.legit.network import draw_rows, read_network

    network = read_network("alarm")
    draw = torch.Generator().manual_seed(0)
    model = Conditionals([len(own) for own in network.states], generator=draw)
    gamma = torch.zeros(len(network.names), len(network.names))
    theta = torch.zeros_like(gamma)
    if settled:
        true = torch.from_numpy(network.adjacency)
        gamma = torch.where(true | true.t(), 5.0, -6.0)
        theta = torch.where(true, 5.0, torch.where(true.t(), -5.0, 0.0))
    rows = torch.from_numpy(draw_rows(network, 32, 0, 0))
    return model, rows, sample_graphs(edge_probabilities(gamma, theta), graphs, draw)


def forms(quick: bool) -> Iterator[Figure]:
    """Alarm, 100 graphs x 32 rows, one target: gather, dense, unique parent sets; CPU time, and how far they differ."""
    import torch

    from toolbox.legit.conditionals import FORMS

    torch.set_num_threads(1)
    graphs = 4 if quick else 100
    for name, settled in (("flat", False), ("settled", True)):
        inputs = _alarm(settled, graphs)
        found = {form: function(*inputs, 0) for form, function in FORMS.items()}
        apart = max(float((found[form] - found["gather"]).abs().max()) for form in ("dense", "unique"))
        yield Figure(f"legit-forms-apart-{name}", apart, "nats", target="<= 1e-6",
                     note="largest difference of the forms from the gather form")  # fmt: skip
        calls = {form: functools.partial(function, *inputs, 0) for form, function in FORMS.items()}
        fast = alternate(1 if quick else 7, {form: calls[form] for form in ("dense", "unique")})
        slow = alternate(1 if quick else 2, {"gather": calls["gather"]}, warm=False)
        if not settled:
            shortest = min(len(slow["gather"]), len(fast["dense"]))
            yield Figure.of("legit-dense", ratios(slow["gather"], fast["dense"][:shortest]), "x",
                            ratio_of="gather / dense", target=">= 5", note="Alarm, 100 graphs x 32 rows")  # fmt: skip
        yield Figure.of(f"legit-unique-{name}", ratios(fast["dense"], fast["unique"]), "x", ratio_of="dense / unique",
                        target=">= 5" if settled else ">= 1.2", note=f"{name} belief")  # fmt: skip
        yield Figure.of(f"legit-step-{name}", [1000 * one for one in fast["unique"]], "CPU ms", note="unique")


def commands(quick: bool) -> Iterator[Figure]:
    """True processes: help, and a simulator whose network is kept."""
    repeats = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TOOLBOX_CACHE", folder)
        words = [sys.executable, str(ROOT / "bin/legit-sim"), "--network", "asia", "-n", "1000"]
        process_seconds(words)
        seconds: dict[str, list[float]] = {}
        seconds["help"] = [
            process_seconds([sys.executable, str(ROOT / "bin/legit-loop"), "--help"]) for _ in range(repeats)
        ]
        seconds["sim"] = [process_seconds(words) for _ in range(repeats)]
    yield Figure.of("legit-loop-help", seconds["help"], "CPU s", target="<= 0.2")
    yield Figure.of("legit-sim-kept", seconds["sim"], "CPU s", target="<= 1.5", note="1000 rows of Asia")


def legit(quick: bool) -> Iterator[Figure]:
    """All of it."""
    yield from forms(quick)
    yield from commands(quick)


BENCHES = {"legit": legit}

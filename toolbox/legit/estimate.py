"""How long a design will take, before it is begun: a rough count of what its steps multiply."""

from __future__ import annotations

from collections.abc import Sequence

from toolbox.legit.design import DesignOptions

_RATE = 12e9
"""Floating-point operations a CPU second of one core, as these products reach on ordinary machines."""

_OVERHEAD = 1.5e-3
"""CPU seconds of a step beside its products; more variables mean more calls."""

_SETTLED = 0.3
"""Share of the sampled graphs that give a child a parent set of its own, over a whole design."""


def cpu_seconds(sizes: Sequence[int], options: DesignOptions) -> float:
    """CPU seconds of one run, within a factor of two or three: for plans, not for promises."""
    learner, scores = options.learner, options.scores
    count, most, hidden = len(sizes), max(sizes), learner.hidden
    layer = 2 * (hidden * hidden + hidden * most)
    distribution = 3 * count * learner.batch * (layer + 2 * count * most * hidden) / _RATE + _OVERHEAD
    sets = max(1.0, _SETTLED * min(learner.num_graphs, 2 ** (count - 1)))
    per_row = count * sets * (layer + 2 * count * hidden) / _RATE
    graph = learner.batch / 2 * per_row + _OVERHEAD * (1 + count / 8)
    imagined = scores.imagined_graphs * count * scores.imagined_rows
    rating = {"git": 1.0, "git-privileged": 1.0, "cbed": 0.3, "ait": 0.1}.get(options.stages.numeric, 0.0)
    once = learner.obs_iters * distribution
    each = learner.model_iters * distribution + learner.graph_iters * graph + rating * imagined * per_row
    return once + options.rounds * each

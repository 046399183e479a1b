"""Costs: the paper's figures, the real module's parameters, and counted operations."""

from __future__ import annotations

import pytest
import torch

from toolbox.longer import costs
from toolbox.longer.method import Block, History, Longer


def test_the_papers_example_of_merging():
    plain, merged = costs.plain_layer_flops(2048, 32), costs.merged_layer_flops(2048, 32, 4)
    assert (round(plain / 1e6, 1), round(merged / 1e6, 1)) == (587.2, 335.5)
    assert round(merged / plain - 1, 3) == -0.429
    assert costs.merged_ratio(2048, 32, 4) == pytest.approx(merged / plain)


def test_merging_saves_above_six_d_k_only_and_most_at_its_best():
    assert costs.break_even_length(32, 8) == 1536
    assert costs.merged_ratio(1536, 32, 8) == pytest.approx(1)
    assert costs.merged_ratio(512, 32, 4) > 1
    best = costs.best_merge(12288, 32)
    assert best == pytest.approx(8)
    ratios = {merge: costs.merged_ratio(12288, 32, merge) for merge in (4, 8, 16)}
    assert min(ratios, key=ratios.get) == 8


def test_the_papers_table_of_flops_as_ratios():
    """Nine figures of their own; two factors are fitted, so this is plausibility, not proof."""
    first = costs.PAPER_TABLE["no merge, all 2000 queries"]
    ours = {name: costs.paper_gflops(*row[:3]) for name, row in costs.PAPER_TABLE.items()}
    off = {
        name: abs(ours[name] / ours["no merge, all 2000 queries"] / (row[3] / first[3]) - 1)
        for name, row in costs.PAPER_TABLE.items()
    }
    assert max(off.values()) < 0.06
    assert sum(value < 0.015 for value in off.values()) == len(off) - 1


@pytest.mark.parametrize("width", [8, 32, 128])
def test_parameters_of_a_block(width):
    assert costs.block_parameters(width) == sum(p.numel() for p in Block(width, 1).parameters())


@pytest.mark.parametrize(("layers", "read_cls", "inner"), [(1, False, 1), (0, True, 0), (2, True, 1)])
def test_counted_operations_agree_with_the_formula(layers, read_cls, inner):
    """Under the plain attention kernel, whose products the counter sees."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    net = Longer(16, merge=4, inner_layers=inner, queries=24, layers=layers, cls=1, uid=True, read_cls=read_cls).eval()
    history = History(torch.randn(2, 256, 16), None, torch.zeros(2, 256, dtype=torch.int64), torch.randn(2, 16))
    sizes = costs.Sizes(256, 16, 4, inner, 24, layers, 2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cache = net.prefill(history)
    expected = 2 * sum(costs.request_flops(sizes, executed=True, read_rows=int(read_cls)).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.score(cache, torch.randn(2, 10, 32))
    one = sum(costs.candidate_flops(sizes).values()) + 2 * 32 * net.width  # and the projection of [t_v ; c_r]
    assert counter.get_total_flops() == pytest.approx(20 * one, rel=0.02)
    kept = sum(t.numel() for name, t in cache.items() if name[0] in "kv")
    assert kept * 4 == 2 * costs.cache_bytes(sizes)


def test_cache_of_ten_thousand_events():
    assert costs.cache_bytes(costs.Sizes(10_000, 32, 8, 1, 100, 1, 0), 2) == pytest.approx(1.38e6, rel=0.01)

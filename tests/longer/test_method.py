"""The sequence part: equal to a slow oracle, and invariant where the method says so."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.longer.oracle import candidate_row
from toolbox.longer.costs import block_parameters
from toolbox.longer.method import STRATEGIES, Block, History, Longer, query_rows

DIM, MOST = 6, 24


def make(seed: int = 0, **more) -> Longer:
    torch.manual_seed(seed)
    settings = {"merge": 4, "inner_layers": 1, "queries": 3, "heads": 2, "uid": True, "cls": 2, **more}
    net = Longer(DIM, **settings)
    with torch.no_grad():
        for parameter in net.parameters():  # norms and biases too, which start at 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def histories(lengths, width: int, seed: int = 1, uid: bool = True, dtype=torch.float32, junk: float = 7.0):
    """Left-padded events; what stands in the padding must not matter."""
    generator = torch.Generator().manual_seed(seed)
    events = torch.full((len(lengths), width, DIM), junk, dtype=dtype)
    for row, length in enumerate(lengths):
        events[row, width - length :] = torch.randn(length, DIM, generator=generator).to(dtype)
    valid = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    users = torch.randn(len(lengths), DIM, generator=generator).to(dtype) if uid else None
    return History(events, valid, torch.zeros_like(valid, dtype=torch.int64), users)


CASES = [
    {"strategy": strategy, "merge": merge, "inner_layers": inner, "layers": layers, "cls": cls, "uid": uid,
     "read_cls": read, "queries": queries}
    for (strategy, merge), (inner, layers, cls, uid, read, queries) in zip(
        itertools.product(STRATEGIES, (1, 4, 8)),
        itertools.cycle([(1, 1, 1, True, False, 2), (0, 2, 2, False, True, 3), (1, 0, 0, True, False, 1),
                         (0, 1, 1, False, False, 3), (1, 2, 2, True, True, 2)]),
        strict=False,
    )
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['strategy']}-K{c['merge']}-N{c['layers']}")
def test_outputs_and_gradients_equal_the_oracle(case):
    net = make(**case)
    merge = case["merge"]
    lengths = sorted({0, 1, merge - 1, merge, merge + 1, 2 * merge + 1, MOST} & set(range(MOST + 1)))
    history = histories(lengths, MOST, uid=case["uid"])
    candidates = torch.randn(len(lengths), 2, 2 * DIM, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(net.output_width, generator=torch.Generator().manual_seed(3))

    cached = net.score(net.prefill(history), candidates)
    joint = torch.stack([net.forward_joint(history, candidates[:, r]) for r in range(2)], 1)
    p = {name: value.detach().double().requires_grad_() for name, value in net.named_parameters()}
    settings = {
        "merge": merge, "inner": case["inner_layers"], "inner_heads": 1, "heads": 2, "queries": case["queries"],
        "most": MOST // merge, "strategy": case["strategy"], "layers": case["layers"], "read_cls": case["read_cls"],
    }  # fmt: skip
    slow = torch.stack([
        torch.stack([
            candidate_row(
                p, history.events[b, MOST - length :].double(),
                None if history.uid is None else history.uid[b].double(), candidates[b, r].double(), settings,
            )
            for r in range(2)
        ])
        for b, length in enumerate(lengths)
    ])  # fmt: skip
    assert slow.shape == (len(lengths), 2, net.output_width)
    torch.testing.assert_close(cached.double(), slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joint.double(), slow, rtol=1e-5, atol=1e-5)

    (slow.tanh() @ weights.double()).sum().backward()
    for one in (cached, joint):
        net.zero_grad()
        (one.tanh() @ weights).sum().backward()
        for name, parameter in net.named_parameters():
            expected = p[name].grad
            if expected is None:  # a row that nobody reads
                assert parameter.grad is None or not parameter.grad.any()
                continue
            # Queries of the last layer's user rows exist in the slow version only where the candidate's do too.
            torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-4, msg=name)


def test_without_padding_no_mask_is_needed_and_the_result_is_the_same():
    for strategy in STRATEGIES:
        net = make(strategy=strategy, queries=2)
        full = histories([8, 8], 8)
        candidates = torch.randn(2, 3, 2 * DIM)
        bare = History(full.events, None, full.delta, full.uid)
        torch.testing.assert_close(
            net.score(net.prefill(bare), candidates), net.score(net.prefill(full), candidates), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_other_requests_and_other_candidates_do_not_show(strategy):
    net = make(strategy=strategy).eval()
    candidates = torch.randn(1, 5, 2 * DIM)
    short = histories([9], 12)
    alone = net.score(net.prefill(short), candidates)
    wide = History(
        torch.cat((torch.full((1, 12, DIM), 3.0), short.events), 1),
        torch.cat((torch.zeros(1, 12, dtype=torch.bool), short.valid), 1), torch.zeros(1, 24, dtype=torch.int64),
        short.uid,
    )  # fmt: skip
    other = histories([24, 3], 24, seed=5)
    batch = History(
        torch.cat((wide.events, other.events)), torch.cat((wide.valid, other.valid)),
        torch.cat((wide.delta, other.delta)), torch.cat((wide.uid, other.uid)),
    )  # fmt: skip
    together = net.score(net.prefill(batch), candidates.expand(3, -1, -1))[:1]
    single = torch.cat([net.score(net.prefill(short), candidates[:, [r]]) for r in range(5)], 1)
    for found in (net.score(net.prefill(wide), candidates), together, single):
        assert float((found - alone).detach().abs().max()) < 1e-5 * float(alone.detach().abs().max())


def test_a_newer_event_never_changes_a_fully_older_merged_row():
    net = make(queries=6).eval()
    events = torch.randn(1, 16, DIM)
    delta = torch.zeros(1, 16, dtype=torch.int64)
    users = torch.randn(1, DIM)
    before = net.prefill(History(events, None, delta, users))
    changed = events.clone()
    changed[:, 12:] = torch.randn(1, 4, DIM)  # the newest group
    after = net.prefill(History(changed, None, delta, users))
    assert torch.equal(before["k0"][:, :, :3], after["k0"][:, :, :3])
    assert not torch.equal(before["k0"][:, :, 3], after["k0"][:, :, 3])
    assert torch.equal(before["k1"][:, :, :3], after["k1"][:, :, :3])  # nor behind the cross layer: the mask is causal


def test_the_history_reaches_further_than_the_queries():
    """Cutting the history to k tokens before keys and values would make a short model of it."""
    net = make(queries=1, merge=1, inner_layers=0).eval()
    history = histories([20], 20)
    candidate = torch.randn(1, 1, 2 * DIM)
    changed = History(history.events.clone(), history.valid, history.delta, history.uid)
    changed.events[:, 0] = 5 * torch.randn(DIM)
    assert not torch.equal(net.score(net.prefill(history), candidate), net.score(net.prefill(changed), candidate))


@pytest.mark.parametrize("width", [6, 24, 48])
def test_a_block_has_the_parameters_of_the_formula(width):
    assert sum(p.numel() for p in Block(width, 1).parameters()) == block_parameters(width)


def test_query_rows_by_hand():
    valid = torch.arange(10) >= torch.tensor([[0], [4], [8]])  # 10, 6 and 2 valid rows
    assert query_rows("recent", valid, 4).tolist() == [[6, 7, 8, 9]] * 3
    # n=10, k=4: 9 - floor(j 10/4) = 9, 7, 4, 2; n=6: 5 - floor(j 6/4) = 5, 4, 2, 1, behind 4 rows of padding
    assert query_rows("uniform", valid, 4).tolist() == [[2, 4, 7, 9], [5, 6, 8, 9], [6, 7, 8, 9]]
    # the last 2, and of the other 8: 7, 3; of the other 4: 3, 1
    assert query_rows("recent+uniform", valid, 4).tolist() == [[3, 7, 8, 9], [5, 7, 8, 9], [6, 7, 8, 9]]
    assert query_rows("recent+uniform", valid, 1).tolist() == [[9]] * 3


@pytest.mark.parametrize("recompute", ["attention", "blocks"])
def test_recomputing_changes_neither_the_loss_nor_a_gradient(recompute):
    found = []
    for how in ("none", recompute):
        net = make(recompute=how).train()
        loss = net.score(net.prefill(histories([24, 5], 24)), torch.ones(2, 3, 2 * DIM)).square().sum()
        loss.backward()
        found.append((loss, [p.grad for p in net.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_flex_attention_takes_the_same_mask():
    """On a CPU it runs forward only, slowly; training with it is for CUDA."""
    plain, flex = make(strategy="uniform").eval(), make(strategy="uniform", flex=True).eval()
    with torch.no_grad():
        history, candidates = histories([24, 9, 0], 24), torch.ones(3, 2, 2 * DIM)
        torch.testing.assert_close(
            flex.score(flex.prefill(history), candidates), plain.score(plain.prefill(history), candidates),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_modules_hold_no_hidden_state():
    assert not list(make().buffers())
    assert all(isinstance(p, nn.Parameter) for p in make().parameters())

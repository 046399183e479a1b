"""The peers against plain loops, with the invariances that all share; tables and their optimiser."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from toolbox.longer.features import EventEncoder, Head, time_bucket
from toolbox.longer.method import History
from toolbox.longer.peers.base import Base
from toolbox.longer.peers.din import Din
from toolbox.longer.peers.hstu import Hstu
from toolbox.longer.peers.sumpool import SumPool
from toolbox.longer.peers.transformer import Transformer
from toolbox.longer.tables import DenseTables, RowwiseAdagrad

DIM, WIDE = 6, 12


def history(lengths=(12, 5, 0), width: int = WIDE, seed: int = 0) -> History:
    generator = torch.Generator().manual_seed(seed)
    events = torch.full((len(lengths), width, DIM), 9.0)
    delta = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        events[row, width - length :] = torch.randn(length, DIM, generator=generator)
        delta[row, width - length :] = torch.sort(torch.randint(1, 500, (length,), generator=generator)).values.flip(0)
    valid = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return History(events, valid, delta, torch.randn(len(lengths), DIM, generator=generator))


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    make = {
        "base": Base,
        "sumpool": lambda: SumPool(DIM),
        "din": lambda: Din(DIM),
        "transformer": lambda: Transformer(DIM, WIDE, uid=True),
        "hstu": lambda: Hstu(DIM, WIDE, uid=True),
    }
    net = make[name]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


PEERS = ("base", "sumpool", "din", "transformer", "hstu")


@pytest.mark.parametrize("name", PEERS)
def test_padding_and_other_candidates_do_not_show(name):
    net, short = build(name), history()
    candidates = torch.randn(3, 4, 2 * DIM)
    whole = net.score(net.prefill(short), candidates)
    assert whole.shape == (3, 4, net.output_width)
    wide = History(
        nn.functional.pad(short.events, (0, 0, 4, 0), value=3.0), nn.functional.pad(short.valid, (4, 0), value=False),
        nn.functional.pad(short.delta, (4, 0)), short.uid,
    )  # fmt: skip
    torch.testing.assert_close(net.score(net.prefill(wide), candidates), whole, rtol=1e-5, atol=1e-5)
    alone = torch.cat([net.score(net.prefill(short), candidates[:, [r]]) for r in range(4)], 1)
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


def test_sum_pooling_and_din_equal_their_formulas():
    one, candidates = history(), torch.randn(3, 2, 2 * DIM)
    pool, din = build("sumpool"), build("din")
    pooled, weighed = pool.score(pool.prefill(one), candidates), din.score(din.prefill(one), candidates)

    def prelu(x, a):
        return torch.where(x > 0, x, a * x)

    for b, n in enumerate((12, 5, 0)):
        events = one.events[b, WIDE - n :]
        torch.testing.assert_close(pooled[b, 0], events.sum(0) / math.sqrt(n + 1))
        for r in range(2):
            target, total = candidates[b, r, :DIM], torch.zeros(DIM)
            for x in events:
                h = torch.cat((x, target, x - target, x * target))
                h = prelu(h @ din.first.weight.T + din.first.bias, din.act1.weight)
                h = prelu(h @ din.second.weight.T + din.second.bias, din.act2.weight)
                total = total + (h @ din.third.weight.T + din.third.bias) * x
            torch.testing.assert_close(weighed[b, r], total / math.sqrt(n + 1), rtol=1e-4, atol=1e-5)


def test_hstu_equals_its_formula_row_by_row():
    net, one, candidates = build("hstu"), history(), torch.randn(3, 1, 2 * DIM)
    found = net.score(net.prefill(one), candidates)
    silu = nn.functional.silu
    for b, n in enumerate((12, 5, 0)):
        rows = [*one.events[b, WIDE - n :], net.uid(one.uid[b]), net.target(candidates[b, 0])]
        age = [*one.delta[b, WIDE - n :].tolist(), 0, 0]
        x = torch.stack(rows)
        for layer in net.layers:
            u, v, q, k = silu(layer.into(layer.norm(x))).chunk(4, -1)
            attended = []
            for i in range(len(rows)):
                total = torch.zeros(DIM)
                for j in range(i + 1):
                    bias = layer.distance[i - j] + layer.elapsed[int(math.log2(1 + age[j] - age[i]))]
                    total = total + silu(q[i] @ k[j] + bias) / WIDE * v[j]
                attended.append(total)
            x = x + layer.out(layer.after(torch.stack(attended)) * u)
        torch.testing.assert_close(found[b, 0], x[-1], rtol=1e-4, atol=1e-5)


def test_time_buckets_are_exact_at_powers_of_two():
    delta = torch.tensor([0, 1, 2, 3, 6, 7, 8, 2**20 - 2, 2**20 - 1, 2**40])
    assert time_bucket(delta).tolist() == [0, 1, 1, 2, 2, 3, 3, 19, 20, 31]


def test_positions_count_from_the_newest_event():
    torch.manual_seed(0)
    encoder = EventEncoder(DIM, 8)
    summed, delta = torch.randn(1, 5, DIM), torch.ones(1, 5, dtype=torch.int64)
    longer = nn.functional.pad(summed, (0, 0, 3, 0)), nn.functional.pad(delta, (3, 0))
    torch.testing.assert_close(encoder(*longer)[:, 3:], encoder(summed, delta))
    bare = EventEncoder(DIM, 8, position=False, time=False)
    assert {name.split(".")[0] for name, _ in bare.named_parameters()} == {"first", "second"}


def test_the_head_begins_at_the_training_rate_and_stays_in_fp32():
    head = Head(DIM, 0, 0.2)
    with torch.no_grad():
        head.second.weight.zero_()
        logits = head(torch.zeros(1, 2, 0), torch.randn(1, 2, 2 * DIM), torch.zeros(1, 2))
    assert torch.sigmoid(logits).tolist()[0] == pytest.approx([0.2, 0.2])
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            head(torch.zeros(1, 2, 0), torch.randn(1, 2, 2 * DIM).bfloat16(), torch.zeros(1, 2)).dtype == torch.float32
        )


def test_rowwise_adagrad_equals_a_loop_for_sparse_and_dense_gradients_and_duplicates():
    ids = [torch.tensor([3, 5, 3, 1]), torch.tensor([5, 5]), torch.tensor([1, 2])]
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        tables = DenseTables({"item": 8}, {"item": 4}, sparse=sparse)
        optimizer = RowwiseAdagrad(tables.parameters(), lr=0.1, eps=1e-8)
        for step, chosen in enumerate(ids):
            optimizer.zero_grad()
            vectors = tables.look_up({"x": ("item", chosen)})["x"]
            (vectors * torch.arange(1, 5) * (step + 1)).sin().sum().backward()
            optimizer.step()
        results.append(tables.table_0.weight.detach().clone())
    assert torch.equal(results[0], results[1])

    torch.manual_seed(0)
    weight = DenseTables({"item": 8}, {"item": 4}).table_0.weight.detach().double()
    start, sums = weight.clone(), torch.zeros(8, dtype=torch.float64)
    scale = torch.arange(1, 5).double()
    for step, chosen in enumerate(ids):
        gradient = torch.zeros_like(weight)
        for row in chosen.tolist():
            gradient[row] += torch.cos(weight[row] * scale * (step + 1)) * scale * (step + 1)
        for row in set(chosen.tolist()):
            sums[row] += (gradient[row] ** 2).mean()
            weight[row] -= 0.1 * gradient[row] / (sums[row].sqrt() + 1e-8)
    torch.testing.assert_close(results[0].double(), weight, rtol=1e-5, atol=1e-6)
    untouched = [0, 4, 6, 7]
    assert torch.equal(results[0][untouched], start[untouched].float())

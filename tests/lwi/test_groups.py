"""The algebra of permutations, and relabelling against loops over single entries."""

from __future__ import annotations

import itertools

import pytest
import torch

from toolbox.lwi.expand import expand
from toolbox.lwi.groups import compose, identity, invert, random_relabelling, relabel
from toolbox.lwi.spec import parse_spec

SPEC = {
    "sizes": {"kv": "3", "q": "4", "v": "5"},
    "tensors": {
        "q": ["kv/q[kv]/-", "r"],
        "v": ["kv/v[kv]", "r"],
        "o": ["r", "kv/q[kv]/v[kv]"],
        "fused": ["f|f|kv/-", "r*2"],
        "b": ["f"],
    },
}
SHAPES = {"q": (24, 7), "v": (15, 7), "o": (7, 60), "fused": (23, 14), "b": (10,)}


@pytest.fixture(scope="module")
def plan():
    return expand(parse_spec(SPEC, "test.yaml"), SHAPES, {})


def entry(name, perms, position):
    """The old position of one entry of one axis, by the definition: (g, j) gets (kv[g], q[g][j])."""
    kv, q, v, f, r = (perms[key].tolist() for key in ("kv", "q", "v", "f", "r"))
    if name == "kv/q/-":
        g, rest = divmod(position, 8)
        return kv[g] * 8 + q[g][rest // 2] * 2 + rest % 2
    if name == "kv/v":
        g, j = divmod(position, 5)
        return kv[g] * 5 + v[g][j]
    if name == "kv/q/v":
        g, rest = divmod(position, 20)
        return kv[g] * 20 + q[g][rest // 5] * 5 + v[g][rest % 5]
    if name == "f|f|kv/-":
        if position < 20:
            return position // 10 * 10 + f[position % 10]
        return 20 + kv[position - 20]
    if name == "r*2":
        return r[position // 2] * 2 + position % 2
    return {"r": r, "f": f}[name][position]


def test_relabelling_is_the_definition_entry_by_entry(plan):
    perms = random_relabelling(plan, 3)
    axes = {"q": ("kv/q/-", "r"), "v": ("kv/v", "r"), "o": ("r", "kv/q/v"), "fused": ("f|f|kv/-", "r*2"), "b": ("f",)}
    for key, shape in SHAPES.items():
        old = torch.randn(shape)
        new = relabel(plan, plan.tensors[key], old, perms)
        for place in itertools.product(*map(range, shape)):
            before = tuple(entry(name, perms, i) for name, i in zip(axes[key], place, strict=True))
            assert new[place] == old[before]


def test_composition_and_inverse_are_those_of_what_they_do(plan):
    first, then = random_relabelling(plan, 1), random_relabelling(plan, 2)
    for key, shape in SHAPES.items():
        old = torch.randn(shape)
        tensor = plan.tensors[key]
        step = relabel(plan, tensor, relabel(plan, tensor, old, first), then)
        assert torch.equal(relabel(plan, tensor, old, compose(plan, first, then)), step)
        assert torch.equal(relabel(plan, tensor, relabel(plan, tensor, old, first), invert(plan, first)), old)
    at_rest = identity(plan)
    assert all(torch.equal(one, at_rest[name]) for name, one in compose(plan, first, invert(plan, first)).items())
    assert all(torch.equal(one, first[name]) for name, one in compose(plan, first, identity(plan)).items())
    # A part of the groups: the others stay, and children follow their parent.
    kv = {"kv": then["kv"]}
    old = torch.randn(SHAPES["o"])
    step = relabel(plan, plan.tensors["o"], relabel(plan, plan.tensors["o"], old, first), kv)
    assert torch.equal(relabel(plan, plan.tensors["o"], old, compose(plan, first, kv)), step)


def test_a_random_member_is_no_involution_and_the_seeds_own(plan):
    for seed in range(20):
        drawn = random_relabelling(plan, seed)
        for name, perm in drawn.items():
            for row in perm.reshape(-1, perm.shape[-1]):
                assert sorted(row.tolist()) == list(range(len(row)))
                assert not torch.equal(row[row], torch.arange(len(row))), name
    again = random_relabelling(plan, 3)
    assert all(torch.equal(again[name], one) for name, one in random_relabelling(plan, 3).items())
    assert any(not torch.equal(again[name], one) for name, one in random_relabelling(plan, 4).items())


def test_groups_are_independent_where_they_share_no_tensor(plan):
    assert (
        plan.components({"f", "kv", "q", "v", "r"}) == [("kv", "q", "v", "f", "r")]
        or len(plan.components({"f", "kv", "q", "v", "r"})) == 1
    )
    assert [set(one) for one in plan.components({"q", "f"})] == [{"q"}, {"f"}]
    assert {frozenset(one) for one in plan.components({"q", "v", "f"})} == {frozenset("qv"), frozenset("f")}

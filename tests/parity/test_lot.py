"""lot-eval's numbers against plain loops, scipy, and votes that others have stored."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr

from toolbox.lot.compare import compare, difference, grid_gain, token_cost
from toolbox.lot.lines import CELLS, Item, Row
from toolbox.lot.metrics import (
    Resampling,
    accuracy_column,
    average_accuracy,
    bbq,
    bias_score,
    column,
    con_column,
    consistency,
    rate,
)
from toolbox.lot.votes import tally

LANDSCAPE = Path(__file__).resolve().parents[3] / "shared" / "data" / "thoughts" / "landscape"
DRAWS = 200
HOW = Resampling(DRAWS, seed=5)


def bbq_rows(seed: int, samples: int = 1) -> list[Row]:
    """BBQ-like questions in templates, answered at random with a leaning."""
    draw = random.Random(seed)
    rows = []
    for i in range(240):
        condition, polarity = draw.choice(["ambig", "disambig"]), draw.choice(["neg", "nonneg"])
        item = Item(f"{i}", f"g{i // 8}", None, None, draw.choice(["Age", "Religion"]), condition, polarity)
        gold = "unknown" if condition == "ambig" else draw.choice(["target", "other"])
        for _ in range(samples):
            role = draw.choices(["target", "other", "unknown", None], [4, 3, 3, 1])[0]
            rows.append(Row(item, "cot", answer=role, role=role, correct=role == gold))
    return rows


def loop_bias(rows: list[Row], weights: Counter, scaled: bool) -> float:
    """s by its definition: one answer after the other, each as often as its group was drawn."""
    biased = known = right = read = 0
    for row in rows:
        times = weights[row.item.group]
        if row.answer is None:
            continue
        read += times
        right += times * row.correct
        if row.role == "unknown":
            continue
        known += times
        if row.item.polarity == "neg":
            biased += times * (row.role == "target")
        else:
            biased += times * (row.role == "other")
    score = 2 * biased / known - 1
    return (1 - right / read) * score if scaled else score


def resamples(rows: list[Row]) -> list[Counter]:
    """The bootstrap's draws, one by one, from the same generator."""
    groups = list(dict.fromkeys(row.item.group for row in rows))
    picks = np.random.Generator(np.random.PCG64(HOW.seed)).integers(0, len(groups), size=(DRAWS, len(groups)))
    return [Counter(groups[pick] for pick in draw) for draw in picks]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("condition", ["ambig", "disambig"])
def test_bbq_scores_and_their_intervals_are_those_of_a_plain_loop(condition, samples):
    rows = [row for row in bbq_rows(7, samples) if row.item.condition == condition]
    scaled = condition == "ambig"
    found = bias_score(rows, HOW, scaled=scaled)
    assert found.estimate == pytest.approx(loop_bias(rows, Counter({row.item.group: 1 for row in rows}), scaled))
    bounds = np.quantile([loop_bias(rows, weights, scaled) for weights in resamples(rows)], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(bounds))


def test_every_category_of_bbq_is_judged_as_if_alone():
    rows = bbq_rows(8)
    found = bbq(rows, HOW)
    for name, part in found.categories.items():
        alone = [row for row in rows if row.item.category == name]
        for condition, score in (("ambig", part.s_amb), ("disambig", part.s_dis)):
            there = [row for row in alone if row.item.condition == condition]
            once = Counter({row.item.group: 1 for row in there})
            assert score.estimate == pytest.approx(loop_bias(there, once, condition == "ambig"))
            right = sum(bool(row.correct) for row in there)
            assert getattr(part, condition).estimate == pytest.approx(right / len(there))
    assert set(found.categories) == {"Age", "Religion"}


# -- intervals and tests ----------------------------------------------------------------------------------------------
def variants(seed: int, group: int | None) -> tuple[list[Row], list[Row]]:
    draw = random.Random(seed)
    items = [Item(str(i), None if group is None else f"g{i // group}") for i in range(60)]
    return tuple(
        [Row(item, name, answer="a", correct=draw.random() < share) for item in items]
        for name, share in (("lot2", 0.7), ("cot", 0.5))
    )


def test_the_paired_interval_is_that_of_a_plain_loop_over_groups():
    ours, base = variants(3, group=4)
    gains = {a.item.id: a.correct - b.correct for a, b in zip(ours, base, strict=True)}
    means = []
    for weights in resamples(ours):
        total = times = 0
        for row in ours:
            total += weights[row.item.group] * gains[row.item.id]
            times += weights[row.item.group]
        means.append(total / times)
    found = difference(accuracy_column(ours), accuracy_column(base), HOW)
    assert found.estimate == pytest.approx(sum(gains.values()) / 60)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    alone = rate(accuracy_column(ours), HOW)
    shares = [
        sum(weights[row.item.group] * row.correct for row in ours) / sum(weights[row.item.group] for row in ours)
        for weights in resamples(ours)
    ]
    assert (alone.group_low, alone.group_high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))


@pytest.mark.parametrize("seed", range(20))
def test_mcnemar_is_the_binomial_test_on_discordant_items(seed):
    ours, base = variants(seed, group=None)
    better = sum(a.correct and not b.correct for a, b in zip(ours, base, strict=True))
    worse = sum(b.correct and not a.correct for a, b in zip(ours, base, strict=True))
    one = compare(
        accuracy_column(ours), accuracy_column(base), HOW, by={}, metric="accuracy", variant="lot2", baseline="cot"
    )
    assert (one.test, one.better, one.worse) == ("mcnemar", better, worse)
    assert one.p == pytest.approx(binomtest(better, better + worse, 0.5).pvalue)


def test_sign_flips_of_few_groups_are_counted_one_by_one():
    ours, base = variants(4, group=6)
    sums = defaultdict(int)
    for a, b in zip(ours, base, strict=True):
        sums[a.item.group] += a.correct - b.correct
    reached = [
        abs(sum(gain if pattern >> k & 1 else -gain for k, gain in enumerate(sums.values()))) >= abs(sum(sums.values()))
        for pattern in range(2 ** len(sums))
    ]
    one = compare(
        accuracy_column(ours), accuracy_column(base), HOW, by={}, metric="accuracy", variant="lot2", baseline="cot"
    )
    assert (one.test, one.p) == ("sign-flip", pytest.approx(sum(reached) / len(reached)))


def test_wilson_is_the_root_of_its_equation():
    """The bounds are where (p - share)² = z² p (1 - p) / n."""
    z = 1.959963984540054
    for right in (0, 1, 7, 30, 60):
        items = [Item(str(i)) for i in range(60)]
        found = rate(column(items, [i < right for i in range(60)], whole=True), HOW)
        for bound in (found.low, found.high):
            assert (bound - right / 60) ** 2 == pytest.approx(z * z * bound * (1 - bound) / 60, abs=1e-12)


def test_the_cost_of_a_gain_is_scipys_correlation():
    draw = random.Random(1)
    sides = [
        [
            Row(
                Item(f"{cell}{i}", str(i), cell=cell),
                name,
                answer="a",
                correct=draw.random() < 0.6,
                tokens=draw.randrange(90),
            )
            for cell in CELLS
            for i in range(25)
        ]
        for name in ("echo", "cot")
    ]
    gains, extra = [], []
    for cell in CELLS:
        ours, base = ([row for row in rows if row.item.cell == cell] for rows in sides)
        gains.append(sum(row.correct for row in ours) / 25 - sum(row.correct for row in base) / 25)
        extra.append(sum(row.tokens for row in ours) / 25 - sum(row.tokens for row in base) / 25)
    found, wanted = token_cost(grid_gain(*sides, HOW)), pearsonr(extra, gains)
    assert (found.r, found.p, found.n) == (pytest.approx(wanted.statistic), pytest.approx(wanted.pvalue), 9)


def test_con_is_that_of_a_loop_over_pairs():
    draw = random.Random(2)
    rows = []
    for i in range(80):
        for side in ("pro", "anti"):
            item = Item(f"{i}/{side}", str(i), side)
            answers = [draw.choice(["nurse", "cook", None]) for _ in range(draw.choice([1, 2, 3]))]
            rows += [Row(item, "cot", answer=one, chosen=one, correct=one == "cook") for one in answers]
    shares = []
    for i in range(80):
        pro, anti = ([row.chosen for row in rows if row.item.id == f"{i}/{side}"] for side in ("pro", "anti"))
        same = [one == other and one is not None for one in pro for other in anti]
        shares.append(sum(same) / len(same))
    assert con_column(rows).values.tolist() == pytest.approx(shares)
    found = consistency(rows, HOW)
    assert found.con.estimate == pytest.approx(math.fsum(shares) / 80)
    assert found.delta == pytest.approx(abs(found.pro.estimate - found.anti.estimate))


# -- votes ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stored() -> dict[tuple[str, str, str], dict]:
    """The votes that were computed of the stored paths, by model, set and method."""
    path = LANDSCAPE / "fixture_votes.json"
    if not path.is_file():
        pytest.skip(f"the stored votes are not here ({path})")
    return {(one["model"], one["dataset"], one["method"]): one for one in json.loads(path.read_text())}


@pytest.fixture(scope="module")
def settings() -> dict[tuple[str, str, str], list[Row]]:
    """32,000 paths of 64 settings."""
    path = LANDSCAPE / "verifier_votes.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the stored paths are not here ({path})")
    found = defaultdict(list)
    with gzip.open(path) as handle:
        for one in map(json.loads, handle):
            row = Row(
                Item(one["id"]), one["variant"], one["model"], one["pred"],
                correct=one["pred"] == one["answer"], score=one["score"], keep=one["keep"],
            )  # fmt: skip
            found[one["model"], one["dataset"], one["variant"]].append(row)
    return found


def test_votes_are_the_stored_ones_in_all_64_settings(stored, settings):
    assert len(stored) == len(settings) == 64
    assert sum(map(len, settings.values())) == 32_000
    kinds = {
        "vote": ("plurality", True), "vote_noblank": ("plurality", False),
        "weighted_vote": ("weighted", True), "mask_vote": ("mask", True),
    }  # fmt: skip
    equal = Counter()
    for name, rows in settings.items():
        for key, (kind, blank) in kinds.items():
            found = tally(kind, rows, Resampling(1, 0), blank=blank).accuracy.estimate
            equal[key] += found == pytest.approx(stored[name][key], abs=1e-12)
        equal["average_accuracy"] += average_accuracy(rows) == pytest.approx(
            stored[name]["average_accuracy"], abs=1e-12
        )
    assert equal == dict.fromkeys((*kinds, "average_accuracy"), 64)


def test_votes_through_the_command_are_the_stored_ones(tool, stored):
    done = tool(
        "lot-eval", "--by", "model,dataset", "--vote", "plurality,weighted,mask", "--blank", "count",
        "--bootstrap", 1, LANDSCAPE / "verifier_votes.jsonl.gz",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.rows) == 64
    for row in done.rows:
        wanted = stored[row["by"]["model"], row["by"]["dataset"], row["variant"]]
        votes = {kind: score["accuracy"]["estimate"] for kind, score in row["votes"].items()}
        assert votes == pytest.approx(
            {"plurality": wanted["vote"], "weighted": wanted["weighted_vote"], "mask": wanted["mask_vote"]}
        )
        assert row["average_accuracy"] == pytest.approx(wanted["average_accuracy"])

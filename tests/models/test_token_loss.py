"""l of labelled tokens equals the loss of full logits, whatever the chunk, and costs less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.tiny import tiny_model
from toolbox.models.chat import Encoded
from toolbox.models.head import SoftTarget
from toolbox.models.token_loss import HiddenState, TokenLoss, collate
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


def test_an_adapted_head_is_refused():
    model = tiny_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UsageProblem, match="plain linear"):
        TokenLoss(model)


def batch_of(*lengths):
    return collate(encoded(list(lengths)), 0)


def full_logits(model, batch):
    return model(input_ids=batch.ids).logits.flatten(0, 1)[batch.where]


@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_the_reference_is_the_copy_or_the_model_without_its_adapters(kind):
    model = tiny_model(1).double()
    before = copy.deepcopy(model).requires_grad_(False)
    if kind == "adapter":
        from toolbox.models.adapters import add_lora

        head = TokenLoss(add_lora(model, r=2))
        trained = [p for p in head.parameters() if p.requires_grad]
    else:
        head = TokenLoss(model, reference=before)
        trained = list(model.parameters())
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn_like(parameter)
    batch = batch_of(9, 4)
    loss, nll = head(batch.ids, batch.where, batch.labels, SoftTarget("reference"))
    current = model.get_base_model() if hasattr(model, "get_base_model") else model
    p, q = (full_logits(one, batch).log_softmax(-1) for one in (current, before))
    torch.testing.assert_close(loss, (q.exp() * (q - p)).sum(-1))
    torch.testing.assert_close(nll, -p.gather(1, batch.labels[:, None]).squeeze(1))
    loss.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    assert before.lm_head.weight.grad is None


def test_without_a_reference_a_comparison_is_refused():
    batch = batch_of(5)
    with pytest.raises(ValueError, match="reference"):
        TokenLoss(tiny_model())(batch.ids, batch.where, batch.labels, SoftTarget("reference"))


@pytest.mark.parametrize("layer", [0, 1])
def test_hidden_states_are_those_of_the_labelled_tokens(layer):
    model = tiny_model(3)
    head = TokenLoss(model, reference=copy.deepcopy(model))
    batch = batch_of(7, 3)
    found, _ = head(batch.ids, batch.where, batch.labels, HiddenState(layer))
    # The last of transformers' hidden states is behind the final norm, the others are layer outputs.
    layers = []
    hooks = [one.register_forward_hook(lambda _, __, out: layers.append(out)) for one in model.model.layers]
    model(input_ids=batch.ids)
    for hook in hooks:
        hook.remove()
    expected = layers[layer][0] if isinstance(layers[layer], tuple) else layers[layer]
    torch.testing.assert_close(found, expected.flatten(0, 1)[batch.where + 1])
    assert torch.equal(batch.ids.flatten()[batch.where + 1], batch.labels)
    with torch.no_grad():
        for parameter in model.model.layers[layer].parameters():
            parameter += 0.1
    moved, same = head(batch.ids, batch.where, batch.labels, HiddenState(layer, reference=True))
    torch.testing.assert_close(same, found.detach())
    assert not torch.allclose(moved, same)
    assert moved.requires_grad
    assert not same.requires_grad

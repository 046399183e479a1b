"""Getting rows and optimisers ready: long rows left out, and parameters that say how they are to be trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import tiny_tokenizer
from toolbox.models.chat import Chat
from toolbox.shell.errors import BadData
from toolbox.shell.records import Row
from toolbox.training.language import TrainOptions
from toolbox.training.prepare import encode_rows, make_optimizer


def options(**more):
    return TrainOptions(model="m", out="o", weight_decay=0.1, **more)


def test_rows_that_are_too_long_are_cut_or_left_out():
    rows = [Row(str(n), None, "x" * n, "", "f", n) for n in (3, 30, 5)]
    told = []
    cut, places = encode_rows(Chat(tiny_tokenizer()), rows, "train", options(max_length=10), told.append)
    assert ([len(one.ids) for one in cut], places) == ([4, 10, 6], [0, 1, 2])
    skipping = options(max_length=10, long_rows="skip")
    kept, places = encode_rows(Chat(tiny_tokenizer()), rows, "train", skipping, told.append)
    assert ([len(one.ids) for one in kept], places) == ([4, 6], [0, 2])
    assert "1 rows cut" in told[0]
    assert "1 rows longer than --max-length 10 left out" in told[1]
    with pytest.raises(BadData, match="no row to learn from"):
        encode_rows(Chat(tiny_tokenizer()), rows[1:2], "train", skipping, told.append)


def test_matrices_decay_and_a_parameter_may_say_otherwise():
    model = nn.Module()
    model.matrix, model.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    model.kept, model.slow = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    model.kept.decays, model.slow.lr_scale = False, 0.5
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    groups = make_optimizer(model, options(), 1e-3).param_groups
    found = {(group["weight_decay"], group["scale"]): {id(p) for p in group["params"]} for group in groups}
    assert found == {
        (0.1, 1.0): {id(model.matrix)},
        (0.1, 0.5): {id(model.slow)},
        (0.0, 1.0): {id(model.bias), id(model.kept)},
    }

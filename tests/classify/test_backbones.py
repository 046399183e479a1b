"""The built-in backbones: the published sizes, plain transformers classes, and the formula of a block."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification

from toolbox.classify.backbones import BACKBONES, backbone_config, new_backbone


@pytest.mark.parametrize(
    ("name", "millions"),
    [("cifar-resnet8", 0.078), ("cifar-resnet20", 0.27), ("cifar-resnet32", 0.47), ("preact-resnet18", 11.2)],
)
def test_the_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(backbone_config(name, [str(i) for i in range(10)]))
    assert sum(one.numel() for one in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", ["cifar-resnet8", "preact-resnet18"])
def test_a_saved_backbone_comes_back_through_the_auto_classes_with_its_labels(name, tmp_path):
    config = backbone_config(name, ["cat", "dog", "eel"], widths=[4, 6, 8, 10][: len(BACKBONES[name]["depths"])])
    model = new_backbone(config, 3).eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["id2label"]) == (
        BACKBONES[name]["model_type"],
        {"0": "cat", "1": "dog", "2": "eel"},
    )
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(pixel_values=pixels).logits, again(pixel_values=pixels).logits)
    assert AutoConfig.from_pretrained(tmp_path).widths == config.widths
    labels = torch.tensor([0, 2])
    wanted = F.cross_entropy(model(pixel_values=pixels).logits, labels)
    assert torch.equal(model(pixel_values=pixels, labels=labels).loss, wanted)


def test_the_seed_decides_the_weights_and_leaves_torchs_generator_alone():
    config = backbone_config("cifar-resnet8", ["a", "b"], widths=[2, 3, 4])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (new_backbone(config, seed).stem["convolution"].weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def norm(hidden, layer):
    shape = (1, -1, 1, 1)
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    return (hidden - layer.running_mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize(("name", "depths"), [("cifar-resnet8", [1, 1, 1]), ("preact-resnet18", [2, 2, 2, 2])])
def test_the_forward_pass_is_the_papers(name, depths):
    """Both papers' residual units written out by hand in float64; the second and later stages halve the image."""
    model = new_backbone(backbone_config(name, ["a", "b"], widths=[4, 6, 8, 10][: len(depths)]), 0).double().eval()
    for parameter in model.state_dict().values():
        if parameter.is_floating_point():
            parameter.add_(0.1 * torch.rand_like(parameter))
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    hidden = F.conv2d(pixels, model.stem["convolution"].weight, padding=1)
    preact = name.startswith("preact")
    if not preact:
        hidden = norm(hidden, model.stem["norm"]).relu()
    for s, depth in enumerate(depths):
        for b in range(depth):
            block, stride = model.stages[s]["blocks"][b], 2 if s and not b else 1
            seen = norm(hidden, block.norm1).relu() if preact else hidden
            skip = hidden
            if stride == 2:
                skip = F.conv2d(seen, block.shortcut.convolution.weight, stride=2)
                skip = skip if preact else norm(skip, block.shortcut.norm)
            inner = F.conv2d(seen, block.conv1.weight, stride=stride, padding=1)
            inner = F.conv2d(norm(inner, block.norm2 if preact else block.norm1).relu(), block.conv2.weight, padding=1)
            hidden = inner + skip if preact else (norm(inner, block.norm2) + skip).relu()
    hidden = norm(hidden, model.norm).relu() if preact else hidden
    logits = F.linear(hidden.mean((2, 3)), model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(pixel_values=pixels).logits, logits, rtol=1e-10, atol=1e-12)


def test_sizes_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="one positive number of each a stage"):
        backbone_config("cifar-resnet8", ["a"], widths=[4, 8])

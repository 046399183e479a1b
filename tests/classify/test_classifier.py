"""Classifiers by name or directory: heads that fit are kept, others drawn anew; pixels as stored."""

from __future__ import annotations

import json

import pytest
import torch

from toolbox.classify.classifier import NAMED, PREPROCESSOR, Pixels, find_classifier, load_classifier, stored_pixels
from toolbox.shell.errors import BadData, MissingInput

DEFAULT = Pixels(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_the_names_are_those_of_the_backbones():
    from toolbox.classify.backbones import BACKBONES

    assert set(NAMED) == set(BACKBONES)


def test_a_saved_classifier_comes_back_and_another_head_is_drawn_anew(tmp_path):
    model, anew = load_classifier("cifar-resnet8", None, ["a", "b", "c"], image_size=16, seed=3)
    assert not anew
    model.save_pretrained(tmp_path / "m")
    source = find_classifier(str(tmp_path / "m"))
    again, anew = load_classifier("m", source, ["a", "b", "c"], image_size=16, seed=9)
    assert not anew
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
    turned, anew = load_classifier("m", source, ["c", "b", "a"], image_size=16, seed=9)
    assert not anew
    assert torch.equal(turned.classifier.weight, model.classifier.weight.flip(0))
    wider, anew = load_classifier("m", source, ["c", "d", "a", "b"], image_size=16, seed=9)
    assert anew
    for one, two in zip(wider.classifier.parameters(), model.classifier.parameters(), strict=True):
        assert torch.equal(one[[2, 3, 0]], two)
    for labels in (["a", "b"], ["a", "b", "d"]):
        other, anew = load_classifier("m", source, labels, image_size=16, seed=9)
        assert anew
        assert other.classifier.out_features == len(labels)
        assert not torch.equal(other.classifier.weight[:2], model.classifier.weight[:2])
        assert torch.equal(other.stem["convolution"].weight, model.stem["convolution"].weight)
    twice = [load_classifier("m", source, ["a", "b"], image_size=16, seed=5)[0].classifier.weight for _ in "ab"]
    assert torch.equal(*twice)


def test_missing_weights_are_refused_and_a_missing_head_is_drawn_anew(tmp_path):
    model, _ = load_classifier("cifar-resnet8", None, ["a", "b"], image_size=16, seed=3)
    whole = model.state_dict()
    for name, dropped in {"body": "stem.convolution.weight", "head": "classifier.weight"}.items():
        kept = {key: value for key, value in whole.items() if key != dropped}
        model.save_pretrained(tmp_path / name, state_dict=kept)
    with pytest.raises(BadData, match=r"1 tensors are missing or of another size, stem\.convolution\.weight"):
        load_classifier("m", find_classifier(str(tmp_path / "body")), ["a", "b"], image_size=16, seed=9)
    assert load_classifier("m", find_classifier(str(tmp_path / "head")), ["a", "b"], image_size=16, seed=9)[1]


def test_pixels_are_stored_and_found(tmp_path):
    model, _ = load_classifier("cifar-resnet8", None, ["a", "b"], image_size=16, seed=0)
    model.save_pretrained(tmp_path)
    source = find_classifier(str(tmp_path))
    assert stored_pixels(source, None, DEFAULT) == DEFAULT
    stored = Pixels(24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    stored.write(tmp_path)
    assert stored_pixels(source, None, DEFAULT) == stored
    assert stored_pixels(source, 48, DEFAULT).size == 48
    image = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    assert stored.prepare(image)[0, :, 0, 0].tolist() == pytest.approx([0.25, 0, -1 / 6], abs=1e-6)
    (tmp_path / PREPROCESSOR).write_text(json.dumps({"image_mean": 3}))
    with pytest.raises(BadData, match="not what an image processor stores"):
        stored_pixels(source, None, DEFAULT)


def test_what_is_no_classifier_is_refused(tmp_path, tiny):
    with pytest.raises(BadData, match="no image classifier"):
        load_classifier("tiny", find_classifier(str(tiny)), ["a", "b"], image_size=16, seed=0)
    with pytest.raises(MissingInput):
        find_classifier("cifar-resnet9")

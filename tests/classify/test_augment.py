"""Augmentation image by image against plain slicing, and what a judge counts."""

from __future__ import annotations

import pytest
import torch

from toolbox.classify.augment import (
    CIFAR_MEAN,
    CIFAR_STD,
    colour,
    crop_at,
    cutout,
    flip,
    flip_where,
    normalise,
    pad_crop,
    weak,
)
from toolbox.classify.backbones import backbone_config, new_backbone
from toolbox.classify.evaluate import accuracy, among, confusion, predict, prediction_rows
from toolbox.classify.images import Images
from toolbox.classify.manifest import Sample


@pytest.fixture
def images():
    return torch.randint(1, 256, (40, 3, 7, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def test_each_image_is_cut_at_its_own_place(images):
    found = pad_crop(images, 2, seeded())
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    places = []
    for one, whole in zip(found, padded, strict=True):
        here = [(y, x) for y in range(5) for x in range(5) if torch.equal(one, whole[:, y : y + 7, x : x + 5])]
        assert len(here) == 1
        places += here
    assert len(set(places)) > 10
    assert torch.equal(pad_crop(images, 2, seeded()), found)
    assert torch.equal(pad_crop(images, 0, seeded()), images)


def test_half_of_the_images_are_mirrored(images):
    found = flip(images, seeded())
    mirrored = [torch.equal(one, whole.flip(2)) for one, whole in zip(found, images, strict=True)]
    assert all(m or torch.equal(one, whole) for m, one, whole in zip(mirrored, found, images, strict=True))
    assert 10 < sum(mirrored) < 30


def test_a_square_goes_black_and_nothing_else_changes(images):
    found = cutout(images, 3, seeded())
    for one, whole in zip(found, images, strict=True):
        black = (one == 0).all(0)
        assert torch.equal(one[:, ~black], whole[:, ~black])
        rows, columns = black.any(1).nonzero().flatten(), black.any(0).nonzero().flatten()
        assert 1 <= len(rows) <= 3
        assert 1 <= len(columns) <= 3
        assert black.sum() == len(rows) * len(columns)
        assert rows.tolist() == list(range(int(rows[0]), int(rows[-1]) + 1))


def test_colour_of_strength_zero_is_nothing_and_a_grey_image_stays_grey(images):
    assert torch.equal(colour(images, 0.0, seeded()), images)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    found = colour(grey, 0.4, seeded())
    assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found, grey)
    assert weak(images, seeded()).shape == images.shape


def test_normalising_is_the_definition(images):
    wanted = (images[3, 1, 2, 4].double() / 255 - CIFAR_MEAN[1]) / CIFAR_STD[1]
    assert normalise(images)[3, 1, 2, 4].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_judging_counts_what_is_there():
    model = new_backbone(backbone_config("cifar-resnet8", ["a", "b", "c"], widths=[2, 3, 4]), 0).train()
    pixels = torch.randint(0, 256, (11, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    logits = predict(model, pixels, batch_size=4)
    assert model.training
    assert torch.allclose(logits, predict(model, pixels), atol=1e-5)
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    best = logits.argmax(1)
    table = confusion(best, targets, 3)
    assert [[int(((targets == t) & (best == p)).sum()) for p in range(3)] for t in range(3)] == table.tolist()
    told = accuracy(best, targets)
    assert told["accuracy"] == pytest.approx(int(table.diagonal().sum()) / 11)
    assert told["ci"][0] <= told["accuracy"] <= told["ci"][1]
    only = among(logits, [2, 0])
    assert only.tolist() == [0 if row[0] >= row[2] else 2 for row in logits.tolist()]
    samples = tuple(Sample(str(n), "x", "abc"[t], {"extra": n}, "m") for n, t in enumerate(targets.tolist()))
    rows = list(prediction_rows(Images(samples, pixels, targets, ("a", "b", "c")), logits))
    assert [row["extra"] for row in rows] == list(range(11))
    assert sum(row["correct"] for row in rows) == int(table.diagonal().sum())


def test_places_and_mirrors_may_be_given():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    moved = crop_at(images, 1, torch.tensor([1, 0]), torch.tensor([1, 2]))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, 1:, :3], images[1, :, :3, 1:])
    assert not moved[1, :, 0].any()
    assert not moved[1, :, :, 3].any()
    mirrored = flip_where(images, torch.tensor([True, False]))
    assert torch.equal(mirrored[0], images[0].flip(2))
    assert torch.equal(mirrored[1], images[1])

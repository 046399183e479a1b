"""Manifests of every kind, and everything that is refused, with its place."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from toolbox.classify.idx import read_idx
from toolbox.classify.images import load_images
from toolbox.classify.manifest import IMAGE_SHAPES, read_manifest, sorted_labels
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.records import RecordReader
from toolbox.shell.streams import Streams

STREAMS = Streams(stdin_fd=0, stdout_fd=1)


def picture(seed=0, mode="RGB", size=(6, 4)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number, (kind, mode) in enumerate([("cat", "RGB"), ("cat", "L"), ("dog", "P"), ("dog", "RGBA"), ("dog", "1")]):
        (tmp_path / "pets" / kind).mkdir(parents=True, exist_ok=True)
        picture(number, mode).save(tmp_path / "pets" / kind / f"{number}.png")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "pets"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_folder_a_class_is_read_in_a_fixed_order(folder):
    found = read_manifest(str(folder), STREAMS)
    assert [sample.id for sample in found.samples] == ["cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", "dog/4.png"]
    assert found.labels == ("cat", "dog")
    images = load_images(found, 4)
    assert images.pixels.shape == (5, 3, 4, 4)
    assert images.targets.tolist() == [0, 0, 1, 1, 1]
    grey = images.pixels[1]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    # The middle of an image that has the right height already, untouched.
    wanted = torch.from_numpy(np.asarray(picture(0))[:, 1:5].copy()).permute(2, 0, 1)
    assert torch.equal(images.pixels[0], wanted)
    assert images.take([3, 0]).targets.tolist() == [1, 0]
    with pytest.raises(BadData, match="holds no images in sub-folders"):
        read_manifest(str(folder / "cat"), STREAMS)


def test_rows_name_files_data_digits_and_idx_and_keep_their_fields(folder, tmp_path):
    rows = [
        {"image": "pets/cat/0.png", "label": 10, "extra": [1], "split": "val", "task": 2},
        {"image": "data:image/png;base64," + base64.b64encode(png(picture(7))).decode(), "label": 9},
        {"image": "digits:17", "label": "2", "id": "x"},
        {"image": "idx:numbers.gz#1", "label": 9},
    ]
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "numbers.gz").write_bytes(
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + values.tobytes())
    )
    found = read_manifest(write(tmp_path / "m.jsonl", rows), STREAMS)
    assert found.labels == ("2", "9", "10")
    assert [sample.id for sample in found.samples] == ["1", "2", "x", "4"]
    assert found.samples[0].data == rows[0]
    assert (found.samples[0].split, found.samples[0].task) == ("val", "2")
    images = load_images(found, 3)
    from sklearn.datasets import load_digits

    full = load_images(found, 8).pixels[2, 0].double()
    assert torch.allclose(full, torch.from_numpy(load_digits().images[17]) * 255 / 16, atol=0.5)
    assert images.pixels[3, 0].tolist() == [[12, 13, 14], [16, 17, 18], [20, 21, 22]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no images"),
        ([{"image": "a", "label": 1}, {"image": "b", "label": 1}], "has one class only, '1'"),
        ([{"image": "a", "label": 1, "id": "z"}, {"image": "b", "label": 2, "id": "z"}], ":2: the id 'z' stands at"),
        ([{"image": "../a", "label": 1}], "m.jsonl:1: $.image: the path '../a' leaves the root"),
        ([{"image": "/etc/passwd", "label": 1}], "leaves the root"),
        ([{"image": "idx:../x#1", "label": 1}], "leaves the root"),
        ([{"image": "a"}], "expected image+label"),
        ([{"image": "a", "label": 1.5}], "$.label: Expected `int | str`, got `float`"),
        ([{"image": "", "label": 1}], "$.image"),
    ],
)
def test_bad_manifests_are_told_with_their_place(tmp_path, rows, says):
    with pytest.raises(BadData) as caught:
        read_manifest(write(tmp_path / "m.jsonl", rows), STREAMS)
    assert says in caught.value.what


def test_images_that_cannot_be_had_are_counted_and_the_first_five_named_or_left_out(tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF\n")
    (tmp_path / "good.png").write_bytes(png(picture()))
    names = ["torn.jpg", "page.png", "missing.png", "digits:1797", "data:image/png;base64,@@", "data:text/html,x",
             "idx:good.png#0", "good.png"]  # fmt: skip
    rows = [{"image": name, "label": n % 2} for n, name in enumerate(names)]
    found = read_manifest(write(tmp_path / "m.jsonl", rows[:6] + rows[7:]), STREAMS)
    with pytest.raises(BadData) as caught:
        load_images(found, 4)
    assert caught.value.what.startswith(f"{tmp_path}/m.jsonl:1: 6 of 7 images: torn.jpg cannot be decoded")
    assert "missing.png is missing" in caught.value.what
    assert "and 1 more" in caught.value.what
    skipped = []
    images = load_images(found, 4, skip=lambda raw, problem: skipped.append((json.loads(raw), problem.what)))
    assert [sample.image for sample in images.samples] == ["good.png"]
    assert [row["image"] for row, _ in skipped] == names[:6]
    rejected = []
    reader = RecordReader(IMAGE_SHAPES, on_bad="skip", rejects=lambda raw, problem: rejected.append(json.loads(raw)))
    rows = [{"image": "good.png", "label": 1}, {"image": "../x", "label": 2}, {"image": "good.png", "label": 3}]
    kept = read_manifest(write(tmp_path / "n.jsonl", rows), STREAMS, reader)
    assert (len(kept.samples), kept.skipped, rejected) == (2, 1, [rows[1]])


def test_digits_and_mnists_folders_need_no_manifest(tmp_path):
    digits = read_manifest("digits", STREAMS)
    assert (len(digits.samples), digits.labels) == (1797, tuple("0123456789"))
    parts = [{one.id for one in read_manifest(f"digits#{name}", STREAMS).samples} for name in ("train", "test")]
    assert [len(part) for part in parts] == [1438, 359]
    assert parts[0] | parts[1] == {one.id for one in digits.samples}
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 5), dtype=np.uint8)
    for stem, labels in (("train", [1, 0, 1]), ("t10k", [0, 1, 0])):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + struct.pack(">3I", 3, 5, 5) + images.tobytes()
        )
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes(labels))
        )
    for source, expected in ((f"idx:{tmp_path}", ["1", "0", "1"]), (f"idx:{tmp_path}#test", ["0", "1", "0"])):
        found = read_manifest(source, STREAMS)
        assert [sample.label for sample in found.samples] == expected
        assert torch.equal(load_images(found, 5).pixels[:, 0], torch.from_numpy(images))
    with pytest.raises(MissingInput, match="no such directory"):
        read_manifest("idx:/nowhere", STREAMS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match="has no train-images"):
        read_manifest(f"idx:{tmp_path}/empty", STREAMS)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x09\x01\0\0\0\1x", b"\0\0\x08\x01\0\0\0\5xy", b"\0\0\x08\x01\0\0\0\1xyz", b"\x1f\x8b\x08torn",
     b"\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"],
)  # fmt: skip
def test_damaged_idx_files_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadData):
        read_idx(str(tmp_path / "x"))


def test_labels_are_sorted_by_value_or_by_letter():
    assert sorted_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sorted_labels(["10", "9", "b"]) == ("10", "9", "b")

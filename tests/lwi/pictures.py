"""Tiny labelled images: a bright quarter tells the class. As rows with data URIs, or as tensors."""

from __future__ import annotations

import base64
import io

import numpy as np

CLASSES = ("ant", "bee", "cat", "dog")
SIZE = 8


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Bytes (count, SIZE, SIZE, 3), and the class of each."""
    random = np.random.default_rng(seed)
    labels = [place % len(CLASSES) for place in range(count)]
    images = random.integers(0, 90, (count, SIZE, SIZE, 3), dtype=np.uint8)
    half = SIZE // 2
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(label, 2)
        image[top * half : (top + 1) * half, left * half : (left + 1) * half] += 120
    return images, labels


def uri(image: np.ndarray) -> str:
    """The image as a PNG in a data URI."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def picture_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of a manifest."""
    images, labels = drawn(count, seed)
    return [
        {
            "id": f"{CLASSES[label]}-{place}",
            "image": uri(image),
            "label": CLASSES[label],
            "group": label // 2,
            "x": place,
        }
        for place, (image, label) in enumerate(zip(images, labels, strict=True))
    ]

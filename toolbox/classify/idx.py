"""Files in MNIST's format: four bytes of magic, the sizes as big-endian 32-bit numbers, then one byte a value.

Source: Y. LeCun's description of the MNIST files. Magic is 0, 0, 8 (unsigned byte), and the number of dimensions.
"""

from __future__ import annotations

import functools
import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from toolbox.shell.errors import BadData, MissingInput

_MOST_BYTES = 4 << 30


@functools.lru_cache(maxsize=4)
def read_idx(path: str) -> np.ndarray:
    """The values of one file, plain or gzipped, as uint8. Raises: MissingInput (66), BadData (65)."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        opener = gzip.open if zipped else open
        with opener(path, "rb") as handle:  # type: ignore[operator]
            head = handle.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
                raise BadData("is not a file of bytes in MNIST's format", "train-images-idx3-ubyte is one", file=path)
            sizes = struct.unpack(f">{head[3]}I", handle.read(4 * head[3]))
            wanted = math.prod(sizes)
            if wanted > _MOST_BYTES:
                raise BadData(f"tells of {wanted:,} values", "is it damaged?", file=path)
            values = handle.read(wanted + 1)
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file", "check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise BadData(f"damaged: {error}", "copy or download it again", file=path) from None
    if len(values) != wanted:
        more = "more" if len(values) > wanted else f"{len(values):,}"
        raise BadData(f"tells of {wanted:,} values and holds {more}", "copy or download it again", file=path)
    return np.frombuffer(values, dtype=np.uint8).reshape(sizes)


def idx_pair(folder: Path, stem: str) -> tuple[str, np.ndarray]:
    """The path of a folder's images (``train`` or ``t10k``), and their labels. Raises as ``read_idx``."""
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        for name in (f"{stem}-{kind}", f"{stem}-{kind}.gz", f"{stem}-{kind.replace('-idx', '.idx')}"):
            if (folder / name).is_file():
                found.append(str(folder / name))
                break
        else:
            raise MissingInput(f"{folder}: has no {stem}-{kind}", "a folder of MNIST's four files is expected")
    images, labels = read_idx(found[0]), read_idx(found[1])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise BadData(f"{images.shape} images beside {labels.shape} labels", "do they belong together?", file=found[0])
    return found[0], labels

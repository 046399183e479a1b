"""Images that rows name: found below one root, checked before they are decoded, brought to RGB.

The root is a directory, a tar or a zip; of archives single members are read, nothing is unpacked. Nothing is ever
fetched, and no name leads out of the root.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from toolbox.lit.rows import EASY_VQA, Sample, easy_vqa_folder
from toolbox.shell.errors import BadData, MissingInput

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""What Pillow may try: image formats, no documents, no external programs."""

MOST_BYTES = 256 << 20
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


class Unreadable(Exception):
    """An image that may not be opened, is missing or cannot be decoded; the text says why."""


class ImageStore:
    """The images below ``root`` (None: the current directory).

    ``most_pixels`` is held against the size in the header, before anything is decoded: Pillow alone says nothing at
    81 million pixels and fails only at 179. ``warn`` is told of animations, of which the first frame is taken.

    Raises: MissingInput (66) for a root that is not there, BadData (65) for an archive that cannot be read.
    """

    def __init__(
        self, root: str | None, most_pixels: float = 50e6, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self.root, self.most_pixels, self._warn = root, most_pixels, warn
        self._read: Callable[[str], bytes] = self._from_folder
        self._folder = Path(root or ".")
        self._handle: io.BufferedReader | None = None
        if root is None or self._folder.is_dir():
            self._real = os.path.realpath(self._folder)
        elif not self._folder.is_file():
            raise MissingInput(f"--image-root {root}: no such file or directory", "a directory, a .tar or a .zip")
        elif zipfile.is_zipfile(root):
            self._open_zip(root)
        else:
            self._open_tar(root)

    def bytes_of(self, name: str) -> bytes:
        """The file as it is stored. Raises: Unreadable."""
        if name.startswith("data:"):
            return _from_data_uri(name)
        if name.startswith(EASY_VQA):
            return _easy_vqa_image(name)
        if name.startswith(("/", "\\")) or ".." in Path(name).parts:
            raise Unreadable("leads out of the image root")
        try:
            return self._read(name)
        except FileNotFoundError:
            raise Unreadable("is missing") from None
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise Unreadable(f"cannot be read ({str(error)[:80]})") from None

    def open(self, name: str) -> Image:
        """The image as RGB: turned as its EXIF says, transparency on white, the first frame. Raises: Unreadable."""
        return self.decode(self.bytes_of(name), name)

    def decode(self, content: bytes, name: str) -> Image:
        """``open`` for bytes that are there already."""
        from PIL import Image as images

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", images.DecompressionBombWarning)
                with images.open(io.BytesIO(content), formats=FORMATS) as image:
                    if image.width * image.height > self.most_pixels:
                        raise Unreadable(f"{image.width} x {image.height} pixels, more than --max-image-pixels")
                    if getattr(image, "n_frames", 1) > 1:
                        self._warn(f"{name[:80]}: an animation, its first frame is taken")
                        image.seek(0)
                    return _to_rgb(image)
        except images.DecompressionBombError:  # what Pillow itself refuses to open
            raise Unreadable("hundreds of millions of pixels, more than --max-image-pixels") from None
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise Unreadable(f"cannot be decoded ({str(error)[:80]})") from None

    def of(self, sample: Sample) -> list[Image]:
        """The images of a row. Raises: BadData (65) with its place."""
        found = []
        for name in sample.images:
            try:
                found.append(self.open(name))
            except Unreadable as reason:
                raise sample.bad(f"{name[:80]}: {reason}", "check --image-root", "$.image") from None
        return found

    # -- roots --------------------------------------------------------------------------------------------------------
    def _from_folder(self, name: str) -> bytes:
        path = os.path.realpath(self._folder / name)
        if os.path.commonpath([path, self._real]) != self._real:
            raise Unreadable("leads out of the image root")
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("is no file")
        if status.st_size > MOST_BYTES:
            raise Unreadable(f"has {status.st_size:,} bytes")
        return Path(path).read_bytes()

    def _open_tar(self, root: str) -> None:
        try:
            with tarfile.open(root, "r:") as archive:
                members = {one.name.removeprefix("./"): (one.offset_data, one.size) for one in archive if one.isreg()}
        except (tarfile.TarError, EOFError):
            raise BadData("neither a directory nor a plain .tar or .zip", "unpack it", file=root) from None
        self._handle = open(root, "rb")  # noqa: SIM115

        def read(name: str) -> bytes:
            place = members.get(name.removeprefix("./"))
            if place is None:
                raise FileNotFoundError
            if place[1] > MOST_BYTES:
                raise Unreadable(f"has {place[1]:,} bytes")
            return os.pread(self._handle.fileno(), place[1], place[0])  # type: ignore[union-attr]

        self._read = read

    def _open_zip(self, root: str) -> None:
        archive = zipfile.ZipFile(root)
        names = {one.filename.removeprefix("./"): one for one in archive.infolist() if not one.is_dir()}

        def read(name: str) -> bytes:
            member = names.get(name.removeprefix("./"))
            if member is None:
                raise FileNotFoundError
            if member.file_size > MOST_BYTES:
                raise Unreadable(f"has {member.file_size:,} bytes")
            return archive.read(member)

        self._read = read


def _to_rgb(image: Image) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        white = images.new("RGBA", turned.size, (255, 255, 255, 255))
        return images.alpha_composite(white, turned).convert("RGB")
    if turned.mode.startswith(("I", "F")):  # 16 bits and more: Pillow's own conversion would cut at 255
        scale = 257.0 if turned.getextrema()[1] > 255 else 1.0
        return turned.point(lambda value: value / scale).convert("L").convert("RGB")
    return turned.convert("RGB")


def _from_data_uri(name: str) -> bytes:
    header = _DATA_URI.match(name)
    if header is None:
        raise Unreadable("a data URI must be image/...;base64")
    try:
        return base64.b64decode(name[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Unreadable("its base64 is damaged") from None


def _easy_vqa_image(name: str) -> bytes:
    found = re.fullmatch(r"easy-vqa:(train|test)/([0-9]{1,6})\.png", name)
    path = easy_vqa_folder() / found[1] / "images" / f"{found[2]}.png" if found else None
    if path is None or not path.is_file():
        raise Unreadable("is no image of easy-VQA")
    return path.read_bytes()

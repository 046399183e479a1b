"""The option groups that commands over rows with images share."""

from __future__ import annotations

import click

from toolbox.shell.params import Decorator, Number, PathType, option, together


class RowsType(PathType):
    """A file of rows, or the name of an installed data set."""

    def absolute(self, value: str, base: str) -> str:
        return value if value.startswith("easy-vqa:") else super().absolute(value, base)


def image_options(*, per_row: bool = True) -> Decorator:
    """Where images lie, and what is too large."""
    more = [
        option("--max-images-per-row", group="Input/Output", type=Number(1, whole=True), default=8,
               help="Most images of a row.")
    ] if per_row else []  # fmt: skip
    return together(
        option("--image-root", group="Input/Output", type=PathType("DIR"),
               help="Directory, .tar or .zip that image names are looked up in (default: here)."),
        option("--max-image-pixels", group="Input/Output", type=Number(1), default=50e6,
               help="Largest image, by the size in its header."),
        *more,
    )  # fmt: skip


def vision_model_options(*, default: str | None = "efficientnet-lite0+smollm2", required: bool = True) -> Decorator:
    """Which image-text model; without a default it is ``required`` or not."""
    return together(
        option("--model", "-m", group="Model", type=_ModelType("MODEL", model=True), default=default,
               required=default is None and required,
               help="Directory or hub id of an image-text model, or efficientnet-lite0+smollm2 (embedded parts)."),
        option("--trust-remote-code", group="Model", is_flag=True, recipe=False,
               help="Run code that comes with the model."),
    )  # fmt: skip


class _ModelType(PathType):
    def absolute(self, value: str, base: str) -> str:
        return value if value == "efficientnet-lite0+smollm2" else super().absolute(value, base)


def label_options() -> Decorator:
    """Which tokens are learned from."""
    return together(
        option("--mode", group="Method", type=click.Choice(["vit", "im", "lit-system", "lit"]), default="lit",
               help="vit: answers; im: all text; lit-system: answers and instructions; lit: without boilerplate."),
        option("--task-templates", group="Method", type=TemplatesType("FILE"), default="auto",
               help="Boilerplate sentences: auto (found in the rows), none, or a list of lit-templates."),
        option("--min-share", group="Method", type=Number(0, 1), default=0.15,
               help="auto: share of user turns from which a sentence is boilerplate."),
        option("--split", group="Method", default="newline,punct,colon", metavar="LIST",
               help="Where sentences end."),
        option("--text-only-instructions", group="Method", type=click.Choice(["on", "off"]), default="on",
               help="off: rows without an image are learned from as in vit."),
        option("--image-position", group="Method", type=click.Choice(["first", "keep"]), default="first",
               help="first: an image moves to the front of its user turn."),
        option("--control-tokens", group="Method", type=click.Choice(["escape", "reject", "keep"]), default="escape",
               help="A text that spells a control token: make it plain text, refuse the row, or leave it."),
    )  # fmt: skip


class TemplatesType(PathType):
    """A file, or auto, or none."""

    def absolute(self, value: str, base: str) -> str:
        return value if value in ("auto", "none") else super().absolute(value, base)

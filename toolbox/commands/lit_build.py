"""lit-build: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.design_options import threads_option
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows that words and images are taken from, and of what is told of the model."""
    from toolbox.lit.lines import CAPTIONS, TURNS, Built, Plan
    from toolbox.shell.records import json_schema

    return {"input": json_schema((*TURNS, *CAPTIONS)), "output": json_schema([Built, Plan])}


@command(
    "lit-build",
    schema=schema,
    examples=[
        "lit-build --out base",
        "lit-build --lm scratch --vocab-from chats.jsonl --image-root photos --calibrate chats.jsonl \\\n"
        "    --image-size 96 --out small",
    ],
)
@groups.record_options()
@vision.image_options(per_row=False)
@option("--out", group="Input/Output", type=PathType("DIR"), required=True, help="Directory of the model.")
@option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output.")
@option("--vision", group="Model", type=PathType("TOWER", model=True), default="efficientnet-lite0",
        help="efficientnet-lite0 (ImageNet weights), or the directory of a vision transformer.")  # fmt: skip
@option("--lm", group="Model", type=PathType("MODEL", model=True), default="smollm2",
        help="Directory, hub id, .gguf file, smollm2, or scratch: a small random Llama.")  # fmt: skip
@option("--connector", group="Method", type=click.Choice(["mlp2x_gelu", "linear"]), default="mlp2x_gelu",
        help="What leads from the tower to the language model.")  # fmt: skip
@option("--image-size", group="Method", type=Number(28, whole=True), default=224,
        help="Pixels a side, of the embedded tower: 224 gives 49 tokens, 96 gives 9.")  # fmt: skip
@option("--calibrate", group="Method", type=vision.RowsType("ROWS"),
        help="Standardise the embedded tower's channels over the images of these rows (2,000 at most).")  # fmt: skip
@option("--vocab-from", group="Method", type=vision.RowsType("ROWS"),
        help="The words of the scratch model's tokenizer (- is stdin).")  # fmt: skip
@option("--lm-dim", group="Method", type=Number(4, whole=True), default=96, help="Width of the scratch model.")
@option("--lm-layers", group="Method", type=Number(1, whole=True), default=2, help="Its layers.")
@option("--lm-heads", group="Method", type=Number(1, whole=True), default=4, help="Its heads.")
@groups.seed_option("Seed of the connector and of the scratch model.")
@threads_option()
def main(call: Invocation, **values: Any) -> None:
    """Put a vision tower, a fresh connector and a language model together as a LLaVA model.

    The connector is random: align it with lit-tune --stage pretrain first. With a tower of transformers (CLIP, SigLIP,
    DINOv2) plain transformers loads the directory; with the embedded tower it needs trust_remote_code=True.
    """
    from toolbox.lit.build import Options, run

    run(Options(**values), call)

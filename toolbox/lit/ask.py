"""lit-pope: the job. Images with objects or captions in, yes-or-no questions out. No torch, no numpy."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from toolbox.lit.chair import Synonyms, mentions, synonyms_of
from toolbox.lit.lines import LABELLED, Objects
from toolbox.lit.pope import Corpus, question_of
from toolbox.shell.command import Invocation
from toolbox.shell.records import Record, RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, display_name


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-pope's options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    strategy: tuple[str, ...] = ("random",)
    per_image: int = 3
    question: str = "Is there {a} {object} in the image?"
    suffix: str = ""
    chair_synonyms: str | None = None
    chair_drop: str = ""
    seed: int = 0


@dataclass(frozen=True)
class _Image:
    id: str
    name: str
    objects: tuple[str, ...]


def run(options: Options, call: Invocation) -> None:
    """Read all images, then ask."""
    synonyms = synonyms_of(options.chair_synonyms, dropped(options.chair_drop))
    rejected: list[bytes] = []
    reader = RecordReader(
        LABELLED, renames=parse_map(options.map_fields), on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )  # fmt: skip
    images: list[_Image] = []
    empty = 0
    corpus = Corpus()
    for record in read_records(options.file, call.streams, reader):
        objects = tuple(sorted(_objects(record, synonyms)))
        corpus.add(objects)
        empty += not objects
        if objects:
            images.append(_Image(record.id, record.value.image, objects))
    if reader.skipped:
        call.reporter.warn(f"{display_name(options.file)}: {reader.skipped} bad rows left out")
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        facts = {"images": len(images), "without_objects": empty, "objects": len(corpus.counts)}
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, **facts})
        writer.close()
        return
    asked = 0
    for image in images:
        for row in _questions(image, corpus, options):
            writer.write(row)
            asked += 1
    writer.close()
    left = f"; {empty} images without a known object left out" if empty else ""
    call.reporter.note(f"{asked} questions about {len(images)} images and {len(corpus.counts)} objects{left}")


def dropped(text: str) -> frozenset[str]:
    """``--chair-drop`` as words."""
    return frozenset(word.strip().lower() for word in text.split(",") if word.strip())


def _objects(record: Record, synonyms: Synonyms) -> set[str]:
    value = record.value
    if isinstance(value, Objects):
        return {
            synonyms.classes.get(name.strip().lower(), name.strip().lower()) for name in value.objects if name.strip()
        }
    texts = value.captions if hasattr(value, "captions") else [value.caption]
    return {name for text in texts for name in mentions(text, synonyms)}


def _questions(image: _Image, corpus: Corpus, options: Options) -> list[dict[str, Any]]:
    """Present and absent objects in equal numbers; the draw depends on the seed and the image's id alone."""
    rows = []
    for strategy in options.strategy:
        draw = random.Random(f"{options.seed}/{image.id}")
        present = draw.sample(image.objects, min(options.per_image, len(image.objects)))
        absent = corpus.absent(image.objects, strategy, len(present), draw)
        for answer, names in (("yes", present), ("no", absent)):
            for name in names:
                text = question_of(options.question, name)
                content = [
                    {"type": "image"},
                    {"type": "text", "text": f"{text}{options.suffix}"},
                ]
                rows.append({
                    "id": f"{image.id}/{strategy}/{name}", "image": image.name,
                    "messages": [{"role": "user", "content": content}], "answer": answer, "object": name,
                    "strategy": strategy,
                })  # fmt: skip
    return rows

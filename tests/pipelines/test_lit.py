"""The pipelines of docs/lit.md with real pipes: a model from parts, its connector aligned, tuned, asked, judged."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest

from tests.conftest import SHARED
from tests.lit.vlms import picture, shared_tower
from tests.server import ROOT

ASK = "Provide a one-sentence caption for the provided image."
FORMAT = "Answer the question using a single word or phrase."


@pytest.fixture
def here(tmp_path):
    """Captions and conversations about pictures in a tar, and a tiny vision tower."""
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for i in range(4):
            picture(i).save(tmp_path / "one.png")
            archive.add(tmp_path / "one.png", f"{i}.png")
    captions = [
        {"id": f"p{i}", "image": f"{i}.png", "captions": [f"A {'dog' if i % 2 else 'cat'} runs.", f"Grass {i}"]}
        for i in range(4)
    ]
    chats = [
        {"id": f"p{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": f"<image>\nWhat is it?\n{FORMAT}"}, {"from": "gpt", "value": "A dog"},
            {"from": "human", "value": ASK}, {"from": "gpt", "value": "A dog runs."},
        ]}
        for i in range(4)
    ]  # fmt: skip
    for name, rows in (("captions", captions), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"sentence": one}) + "\n" for one in (ASK, FORMAT)))
    shutil.copytree(shared_tower(), tmp_path / "tower")
    return tmp_path


def test_the_whole_pipeline_from_parts_to_figures(here, sh):
    done = sh(
        f"""
        lit-build --vision tower --lm scratch --lm-dim 16 --lm-heads 2 --vocab-from chats.jsonl --out base
        lit-templates chats.jsonl > found.jsonl
        lit-tune captions.jsonl --image-root photos.tar --stage pretrain --model base --out s1 | tail -n 1
        lit-inspect chats.jsonl --image-root photos.tar --model s1 --task-templates list.jsonl --counts | head -n 1
        lit-tune chats.jsonl --image-root photos.tar --model s1 --task-templates list.jsonl --out lit | tail -n 1
        lit-generate captions.jsonl --image-root photos.tar --model lit --prompt '{ASK}' --max-new-tokens 6 |
          tee said.jsonl | lit-eval --metric cider,chair --refs captions.jsonl
        lit-pope captions.jsonl > pope.jsonl
        lit-generate pope.jsonl --image-root photos.tar --model lit --max-new-tokens 2 |
          lit-eval --metric pope --refs pope.jsonl
        """,
        here,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    built, aligned, seen, tuned, *figures = rows
    assert built["image_tokens"] == 4
    assert aligned["loss_instruction"] is None
    assert tuned["loss_instruction"] > 0
    assert seen["counts"]["image"] == 4
    assert seen["counts"]["task-template"] > 10
    assert [row["metric"] for row in figures] == ["cider", "chair_i", "chair_s", "pope-random"]
    found = [json.loads(line) for line in (here / "found.jsonl").read_text().splitlines()]
    assert [row["count"] for row in found] == [4, 4, 4]
    used = [json.loads(line) for line in (here / "lit" / "task_templates.jsonl").read_text().splitlines()]
    assert {row["sentence"] for row in used} == {ASK, FORMAT}


@pytest.mark.slow
def test_the_recipe_of_flickr8k_runs_on_a_few_rows(here, sh):
    data = SHARED / "lit"
    if not data.is_dir():
        pytest.skip(f"images with language are not here ({data})")
    base = "--vision tower --lm scratch --lm-dim 16 --lm-heads 2 --vocab-from chats.jsonl"
    script = f"bash {ROOT}/recipes/lit/flickr8k.sh {data}"
    done = sh(script, here, ROWS="6", SEEDS="0", OUT="out", BASE=base, MORE="--precision fp32")
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert len(table) == 4 * (3 + 3 + 1 + 2)
    assert sum("against vit" in line for line in table) >= 3 * 2

"""lit-generate: the same text as transformers' own decoding, whatever the batch; which turn is answered."""

from __future__ import annotations

import numpy as np
import torch

from tests.contract.commands import lines
from tests.lit.vlms import chats, data_uri, picture
from toolbox.models.load import find_model
from toolbox.models.spans import Aligner
from toolbox.models.vision_generate import end_ids
from toolbox.models.vlm import load_processor, load_vlm


def test_answers_are_those_of_transformers_own_decoding_for_every_batch_size(tool, llava):
    rows = chats(5)
    found = [tool("lit-generate", "--model", llava, "--max-new-tokens", "6", "--batch-size", size, stdin=lines(rows))
             for size in ("1", "4")]  # fmt: skip
    assert found[0].code == 0, found[0].err
    assert [row["text"] for row in found[0].rows] == [row["text"] for row in found[1].rows]
    source = find_model(str(llava))
    model, aligner = load_vlm(source), Aligner(load_processor(source))
    for number, row in enumerate(found[0].rows):
        turns = []
        for place, turn in enumerate(rows[number]["conversations"]):
            text = turn["value"].removeprefix("<image>\n")
            parts = (None, text) if "image" in rows[number] and place == 0 else (text,)
            turns.append(({"human": "user", "gpt": "assistant"}[turn["from"]], parts))
        images = [picture(number)] if "image" in rows[number] else []
        prompt = aligner.align(turns[:-1], images, generation=True)
        inputs = {name: torch.tensor(np.array(value)) for name, value in prompt.inputs.items()}
        ids = torch.tensor([prompt.ids])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, max_new_tokens=6,
                             do_sample=False, eos_token_id=list(end_ids(aligner)))[0, len(prompt.ids) :]  # fmt: skip
        ended = int(out[-1]) in end_ids(aligner)
        text = aligner.tokenizer.decode(out[: len(out) - ended], skip_special_tokens=False)
        assert row["text"] == text
        assert row["tokens"] == len(out)


def test_every_turn_a_prompt_for_images_and_rows_that_ask_nothing(tool, llava):
    words = ["lit-generate", "--model", llava, "--max-new-tokens", "3"]
    turns = tool(*words, "--all-turns", stdin=lines(chats(2)))
    assert [(row["id"], row["turn"], row["prompt"]) for row in turns.rows] == [
        ("c0", 0, "What is thing 0?"), ("c1", 0, "What is thing 1? Why?"), ("c1", 1, "Sure?"),
    ]  # fmt: skip
    alone = lines([{"id": "a", "image": data_uri(1)}, {"id": "b", "image": data_uri(2), "captions": ["x", "y"]}])
    asked = tool(*words, "--prompt", "What?", stdin=alone)
    assert [(row["id"], row["prompt"]) for row in asked.rows] == [("a", "What?"), ("b", "What?")]
    refused = tool(*words, stdin=alone)
    assert (refused.code, refused.out) == (65, b"")
    assert "stdin:1: a row with no question" in refused.err

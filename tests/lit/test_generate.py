"""lit-generate: the same text as transformers' own decoding, whatever the batch; which turn is answered; endpoints that
see, logs, stored responses; questions of the model's own."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.contract.commands import lines
from tests.lit.vlms import MARKED, chats, data_uri, picture, processor
from tests.loopback import Answer, Loopback, said
from toolbox.lit.answer_local import Ask
from toolbox.lit.images import ImageStore
from toolbox.lit.lines import TURNS
from toolbox.lit.propose import Proposing, question_in
from toolbox.lit.questions import Question, data_of
from toolbox.lit.rows import Counts, Message, Reading, Sample, samples_of
from toolbox.models.generate import Completion, Decoding, TextRequest
from toolbox.models.load import find_model
from toolbox.models.spans import Aligner, Kind
from toolbox.models.vision_generate import end_ids, opened_turn
from toolbox.models.vlm import load_processor, load_vlm
from toolbox.shell.records import RecordReader


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


# -- endpoints, logs, stored responses --------------------------------------------------------------------------------
def test_an_endpoint_gets_the_images_and_its_log_stands_for_it(tool, tmp_path):
    def answer(seen):
        content = seen.body["messages"][-1]["content"]
        if isinstance(content, str):
            return Answer(said(seen, f"heard {content}"))
        image, text = content
        if "Why" in text["text"]:
            return Answer({"error": {"message": "too many words"}}, status=400)
        kind, data = image["image_url"]["url"].split(";base64,")
        size = Image.open(io.BytesIO(base64.b64decode(data))).size
        return Answer(said(seen, f"{kind} {size[0]}x{size[1]} {text['text']}"))

    rows = [row for row in chats(9) if len(row["conversations"]) == 2]  # 0, 2, 4, 6, 8: the last has no image
    log = tmp_path / "said.jsonl"
    with Loopback(answer) as server:
        words = ["lit-generate", "--backend", "openai", "--model", "m", "--log", log, "--on-bad", "skip"]
        done = tool(*words, "--base-url", server.url, stdin=lines(rows))
        assert done.code == 0, done.err
        assert [(row["id"], row["text"]) for row in done.rows] == [
            ("c0", "data:image/png 40x32 What is thing 0?"), ("c2", "heard What is thing 2? Why? Why?"),
            ("c4", "data:image/png 40x32 What is thing 4?"), ("c8", "heard What is thing 8?"),
        ]  # fmt: skip
        assert "1 bad rows left out" in done.err
        assert all((row["logprob"], row["tokens"]) == (None, len(row["text"])) for row in done.rows)
        asked = len(server.seen)
        good = [row for row in rows if row["id"] != "c6"]
        again = tool(*words, "--resume", "--base-url", server.url, stdin=lines(good))
        assert (again.code, again.out, len(server.seen)) == (0, done.out, asked), again.err
        strict = tool(*words[:5], "--base-url", server.url, stdin=lines(rows))
        assert strict.code == 65
        assert "stdin:4: the endpoint refuses this row: 400: too many words" in strict.err
        broken = tool(*words[:5], "--base-url", server.url, stdin=lines(good) + b"{oops")
        assert (broken.code, broken.out) == (65, done.out), broken.err
        assert "stdin:5: not valid JSON" in broken.err
    stored = tool("lit-generate", "--backend", "replay", "--replay", log, stdin=lines(good))
    assert (stored.code, stored.out) == (0, done.out), stored.err
    missing = tool("lit-generate", "--backend", "replay", "--replay", log, "--dry-run", stdin=lines(rows))
    assert (missing.rows[0]["answers"], missing.rows[0]["missing"]) == (5, 1)


def test_a_local_run_goes_on_with_its_log_and_is_replayed_byte_for_byte(tool, llava, tmp_path):
    log, text = tmp_path / "log", lines(chats(5))
    words = ["lit-generate", "--model", llava, "--max-new-tokens", "4", "--batch-size", "2", "--all-turns"]
    whole = tool(*words, "--log", log, "--temperature", "1", stdin=text)
    assert whole.code == 0, whole.err
    kept = log.read_bytes().splitlines(keepends=True)
    assert len(kept) == len(whole.rows) == 7
    log.write_bytes(b"".join(kept[:3]) + kept[3][:40])  # killed while it wrote the fourth
    resumed = tool(*words, "--log", log, "--resume", "--temperature", "1", stdin=text)
    assert (resumed.code, resumed.out) == (0, whole.out), resumed.err
    assert "3 responses from" in resumed.err
    assert sorted(log.read_bytes().splitlines(keepends=True)) == sorted(kept)
    stored = tool("lit-generate", "--all-turns", "--backend", "replay", "--replay", log, stdin=text)
    assert (stored.code, stored.out) == (0, whole.out), stored.err
    other = tool(*words, "--log", log, "--resume", stdin=text)  # greedy: none of these responses is of this run
    assert other.out != whole.out
    assert len(log.read_bytes().splitlines()) == 14


def test_options_of_one_backend_are_refused_at_another(tool, llava):
    for more, says in (
        (["--backend", "openai", "--model", "m"], "needs an address"),
        (["--backend", "openai", "--base-url", "http://x", "--model", "m", "--propose", "2"], "--propose has no use"),
        (["--backend", "replay"], "needs --replay FILE"), (["--base-url", "http://x"], "--base-url has no use"),
        (["--resume"], "--resume goes on with a log"), (["--propose", "2", "--temperature", "0"], "equal questions"),
        (["--propose", "2", "--prompt", "x"], "leave --prompt"), (["--suffix", "x"], "it needs --propose"),
    ):  # fmt: skip
        done = tool("lit-generate", *more, stdin=lines(chats(1)))
        assert (done.code, done.out) == (2, b""), (more, done.err)
        assert says in done.err


def test_an_image_is_sent_as_it_lies_unless_a_model_here_would_see_it_otherwise(tmp_path):
    plain, turned, clear = (tmp_path / name for name in ("plain.jpg", "turned.jpg", "clear.png"))
    picture(1).resize((30, 20)).save(plain)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).resize((30, 20)).save(turned, exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear)
    store = ImageStore(str(tmp_path))
    assert data_of(store, "plain.jpg") == ("jpeg", plain.read_bytes())
    for name, size in (("turned.jpg", (20, 30)), ("clear.png", (4, 4))):
        kind, content = data_of(store, name)
        assert (kind, Image.open(io.BytesIO(content)).size) == ("png", size)
    assert Image.open(io.BytesIO(data_of(store, "clear.png")[1])).getpixel((0, 0)) == (255, 255, 255)


# -- questions of the model's own -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MARKED)
def test_an_open_turn_is_what_every_question_about_the_image_begins_with(kind):
    aligner = Aligner(processor(kind))
    opened = opened_turn(aligner, [picture()])
    assert Kind.IMAGE in opened.kinds
    assert Kind.INSTRUCTION not in opened.kinds
    for text in ("What is it?", "Is there a dog?", "A"):
        asked = aligner.align([("user", (None, text))], [picture()], generation=True)
        assert asked.ids[: len(opened.ids)] == opened.ids
        assert asked.kinds[len(opened.ids)] == Kind.INSTRUCTION


def completion(text: str, reason: str = "stop") -> Completion:
    return Completion(text, reason, 1, 1, (-1.0,))


def test_a_proposal_is_its_first_question_and_has_an_end():
    assert question_in(completion(" What is it? Tell me", "length")) == "What is it?"
    assert question_in(completion("Describe the image.")) == "Describe the image."
    for text, reason in (("Describe the", "length"), (" ", "stop"), ("?", "length")):
        assert question_in(completion(text, reason)) is None


def test_proposals_become_rows_to_learn_from_and_what_is_left_out_is_counted():
    class Scripted:
        """Says what is written here, to any prompt."""

        aligner, store = Aligner(processor()), ImageStore(None)

        def complete(self, asked: list[Ask], decoding: Decoding, *, opens: bool = False) -> list[Completion]:
            if opens:
                said = ["What?", "What? Now", "Who is", "An <image>?", "Where?", "What?", "Why?", "How?", "", "When?"]
                return [completion(text, "length") for text in said]
            texts = [f"{one.request.key} {one.sample.messages[-1].text!r}" for one in asked]
            return [completion(" " if "How" in text else text) for text in texts]

    pictures = [
        Question(Sample(name, (Message("user", (None,)),), (data_uri(1),), "x", n, n), 0, None, None)
        for n, name in enumerate("ab", 1)
    ]
    proposing = Proposing(Scripted(), 5, "\nIn a word.", Decoding(), Decoding(), logged=False)  # type: ignore[arg-type]
    rows = proposing.rows(pictures)
    assert [(row["id"], row["messages"][0]["content"]) for row in rows] == [
        (name, f"<image>\n{text}\nIn a word.")
        for name, text in (("a/0", "What?"), ("a/4", "Where?"), ("b/0", "What?"), ("b/1", "Why?"), ("b/4", "When?"))
    ]
    assert rows[0]["messages"][1]["content"] == "a/0 'What?\\nIn a word.'"
    assert vars(proposing.left) == {"unfinished": 2, "repeated": 1, "unusable": 1, "unanswered": 1}
    records = RecordReader(TURNS)(io.BufferedReader(io.BytesIO(lines(rows))), "rows")  # type: ignore[arg-type]
    read = [one for record in records for one in samples_of(record, Reading(), Counts())]
    assert [one.messages[0].parts for one in read[:1]] == [(None, "What?\nIn a word.")]
    assert proposing.left.told() == "2 unfinished, 1 repeated, 1 unusable, 1 unanswered"
    assert TextRequest("a", "proposed", 0, "").key == "a/proposed/0"


def test_proposals_do_not_depend_on_batches_and_go_on_with_a_log(tool, llava, tmp_path):
    alone = lines([{"id": "a", "image": data_uri(1)}, chats(1)[0]])
    words = ["lit-generate", "--model", llava, "--propose", "6", "--max-new-tokens", "40", "--top-p", "0.9"]
    one = tool(*words, "--batch-size", "1", "--log", tmp_path / "log", stdin=alone)
    assert one.code == 0, one.err
    assert one.rows
    assert {row["lit"]["source"] for row in one.rows} <= {"a", "c0"}
    text = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(b"".join(text[:-2]))
    other = tool(*words, "--batch-size", "5", "--log", tmp_path / "log", "--resume", stdin=alone)
    assert (other.code, other.out) == (0, one.out), other.err
    bare = tool(*words, stdin=lines([chats(3)[2]]))
    assert bare.code == 65
    assert "no image to ask about" in bare.err

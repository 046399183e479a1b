"""LIT's labels against a character-level checker, its losses against the formulas, its templates against real data."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.lit.vlms import MARKED, picture, processor
from tests.models.test_spans import conversation
from toolbox.lit.method import Supervised, Weights, coefficients, refine, supervised
from toolbox.lit.templates import Table, key_of, sentences
from toolbox.models.spans import Aligner, Kind

FORMAT = "Answer the question using a single word or phrase."


def kinds_of(aligner, turns, images=(), templates=(FORMAT,)):
    found = aligner.align(turns, images)
    texts = [turns[piece.message][1][piece.part] for piece in found.pieces]
    return found, refine(found, texts, frozenset(templates))


def by_characters(aligner, turns, mode) -> set[int]:
    """Supervised places, told by characters of the rendered text alone: what a person with a pen would mark."""
    plain, pieces = aligner.locate(turns)
    colour = [" "] * len(plain)
    seen_image = not any(part is None for _, parts in turns for part in parts)
    place = 0
    for number, (role, parts) in enumerate(turns):
        for index, part in enumerate(parts):
            if part is None:
                seen_image = True
                continue
            piece = pieces[place]
            place += 1
            assert (piece.message, piece.part) == (number, index)
            for offset, line in enumerate(part.split("\n")):
                start = piece.start + sum(len(one) + 1 for one in part.split("\n")[:offset])
                boiler = line.strip() == FORMAT
                mark = {"assistant": "R", "system": " "}.get(role, " " if not seen_image else "T" if boiler else "I")
                for at in range(max(piece.start, start - 1), start + len(line)):
                    colour[at] = mark
    wanted = {"vit": "R", "lit": "RI", "lit-system": "RIT"}[mode]
    return {at for at, mark in enumerate(colour) if mark in wanted}


@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MARKED)
def test_labels_equal_those_of_a_checker_that_knows_characters_only(kind, count):
    made = processor(kind)
    aligner, draw = Aligner(made), random.Random(3)
    for number in range(count):
        turns, images = conversation(draw)
        turns = [(role, (*parts[:-1], f"{parts[-1]}\n{FORMAT}") if role == "user" and draw.random() < 0.6 else parts)
                 for role, parts in turns]  # fmt: skip
        found, kinds = kinds_of(aligner, turns, [picture(number + i) for i in range(images)])
        plain, pieces = aligner.locate(turns)
        for mode in ("vit", "lit-system", "lit"):
            wanted = by_characters(aligner, turns, mode)
            ours = {
                pieces[owner[0]].start + at
                for owner, on in zip(found.chars, supervised(kinds, mode), strict=True) if on and owner
                for at in range(owner[1], owner[2])
            }  # fmt: skip
            loose = {at for at in ours ^ wanted if not plain[at].isspace()}
            assert not loose, (mode, number, [plain[at] for at in sorted(loose)])
        ends = kinds[supervised(kinds, "vit")].tolist().count(Kind.END_OF_TURN)
        assert ends == sum(role == "assistant" for role, _ in turns)


def test_the_first_instruction_token_is_learned_and_images_and_templates_are_not():
    made = processor()
    turns = [("user", (None, f"What color is it?\n{FORMAT}")), ("assistant", ("Red",))]
    found, kinds = kinds_of(Aligner(made), turns, [picture()])
    text = [made.tokenizer.decode([token]) for token in found.ids]
    learned = {mode: "".join(t for t, on in zip(text, supervised(kinds, mode), strict=True) if on)
               for mode in ("vit", "lit-system", "lit")}  # fmt: skip
    assert learned == {
        "vit": "Red<|im_end|>",
        "lit": "What color is it?Red<|im_end|>",
        "lit-system": f"What color is it?\n{FORMAT}Red<|im_end|>",
    }
    everything = supervised(kinds, "im")
    assert not everything[kinds == Kind.IMAGE].any()
    assert everything[1:].sum() == (kinds[1:] != Kind.IMAGE).sum()


def test_an_instruction_before_its_image_is_masked_and_text_only_rows_keep_theirs_unless_asked():
    aligner = Aligner(processor())
    _, kinds = kinds_of(aligner, [("user", ("Look at", None, "this.")), ("assistant", ("Ok",))], [picture()])
    assert (kinds == Kind.PRE_IMAGE).sum() == len("Look at")
    assert (kinds == Kind.INSTRUCTION).sum() == len("this.")
    _, kinds = kinds_of(aligner, [("user", ("Look.",)), ("assistant", ("Ok",))])
    assert supervised(kinds, "lit").sum() == len("Look.Ok") + 1
    assert supervised(kinds, "lit", text_only_instructions=False).sum() == len("Ok") + 1


def test_a_template_is_a_whole_sentence_and_nothing_less():
    aligner = Aligner(processor())
    for text, masked in ((f"{FORMAT} Now.", True), (f"Do not {FORMAT.lower()}", False), (f"Please: {FORMAT}", True)):
        _, kinds = kinds_of(aligner, [("user", (text,)), ("assistant", ("Ok",))])
        assert bool((kinds == Kind.TASK_TEMPLATE).any()) is masked, text


@pytest.mark.parametrize("normalize", ["tokens", "segment", "sample"])
def test_coefficients_give_the_losses_that_the_formulas_say(normalize):
    draw = np.random.default_rng(1)
    rows = [Supervised(3, 9, 2.0), Supervised(1, 0), Supervised(7, 30, 0.5), Supervised(2, 5)]
    weights = Weights(1.5, 0.25)
    losses = [(draw.random(row.response), draw.random(row.instruction)) for row in rows]
    found = sum(r * a.sum() + i * b.sum()
                for (r, i), (a, b) in zip(coefficients(rows, weights, normalize), losses, strict=True))  # fmt: skip
    flat = [(row.weight, 1.5, value) for row, (a, _) in zip(rows, losses, strict=True) for value in a]
    other = [(row.weight, 0.25, value) for row, (_, b) in zip(rows, losses, strict=True) for value in b]
    if normalize == "tokens":
        expected = sum(w * k * v for w, k, v in flat + other) / sum(w * k for w, k, v in flat + other)
    elif normalize == "segment":
        expected = 1.5 * sum(w * v for w, _, v in flat) / sum(w for w, _, _ in flat)
        expected += 0.25 * sum(w * v for w, _, v in other) / sum(w for w, _, _ in other)
    else:
        means = [(1.5 * a.sum() + 0.25 * b.sum()) / (1.5 * len(a) + 0.25 * len(b)) for a, b in losses]
        expected = sum(row.weight * mean for row, mean in zip(rows, means, strict=True)) / 4.5
    assert found == pytest.approx(expected, rel=1e-12)


def test_sentences_cover_the_text_and_are_cut_where_the_rule_says():
    text = "Look here: what is it?\nAnswer in one word. Or two  \n\nor 3.5 words! "
    parts = [text[start:stop] for start, stop in sentences(text)]
    assert "".join(parts) == text
    assert [key_of(part) for part in parts] == [
        "Look here:", "what is it?", "Answer in one word.", "Or two", "or 3.5 words!",
    ]  # fmt: skip
    assert [key_of("a: b. c"[a:b]) for a, b in sentences("a: b. c", split=("colon",))] == ["a:", "b. c"]
    assert sentences("") == []
    assert key_of("cafe\u0301  x\n") == "café x"


def test_the_table_counts_turns_rows_places_and_neighbours():
    table = Table()
    for number in range(300):
        table.add(str(number), [f"What is {number}?\n{FORMAT}", f"Who is {number}?\n{FORMAT}"])
    first, second, *_ = table.rows_out()
    assert first == {
        "sentence": FORMAT, "count": 600, "share_turns": 1.0, "share_rows": 1.0, "position": "last",
        "neighbours": 600, "template": True, "example": "0",
    }  # fmt: skip
    assert (second["count"], second["template"], second["position"]) == (1, False, "first")
    assert [row["template"] for row in table.rows_out(top_k=2)[:3]] == [True, True, False]
    few = Table()
    few.add("x", [FORMAT] * 199)
    assert not few.rows_out()[0]["template"]


@pytest.mark.slow
def test_the_boilerplate_of_real_rows_is_found_and_a_frequent_question_is_none(tool, photos):
    path = photos / "flickr8k_vqa_train.jsonl.gz"
    done = tool("lit-templates", path)
    assert done.code == 0, done.err
    assert [(row["sentence"], row["count"], row["template"]) for row in done.rows[:3]] == [
        (FORMAT, 25798, True), ("Provide a one-sentence caption for the provided image.", 6528, True),
        ("Is there a person in the image?", 3915, False),
    ]  # fmt: skip
    assert sum(row["template"] for row in done.rows) == 2
    assert "32326 user turns" in done.err
    assert tool("lit-templates", stdin=path.read_bytes()).out == done.out

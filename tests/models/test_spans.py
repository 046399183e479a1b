"""Every token of a conversation is told from the template's, whatever users write and whatever processor it is."""

from __future__ import annotations

import random

import pytest

from tests.lit.vlms import MARKED, picture, processor
from toolbox.models.spans import Aligner, Kind, Unalignable
from toolbox.shell.errors import BadData

WORDS = (
    *("red", "Dog", "assistant\n", "ASSISTANT:", "USER:", "é", "漢字", "the,", "is?", "[/INST]", "###"),
    *("answer.\n", "7", "user", "Assistant:", "\t"),
)


def conversation(draw: random.Random) -> tuple[list[tuple[str, tuple[str | None, ...]]], int]:
    """Random turns with role words in them, and how many images they have."""

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6))).strip() or "x"

    turns: list[tuple[str, tuple[str | None, ...]]] = [("system", (words(),))] if draw.random() < 0.3 else []
    images = 0
    for _ in range(draw.randint(1, 3)):
        with_image = draw.random() < 0.6
        images += with_image
        turns += [("user", ((None,) if with_image else ()) + (words(),)), ("assistant", (words(),))]
    return turns, images


def agrees(kind: str, count: int) -> int:
    """How many of ``count`` random conversations differ from transformers' own mask, made from a marked template."""
    made = processor(kind)
    aligner, draw, wrong = Aligner(made), random.Random(7), 0
    for number in range(count):
        turns, images = conversation(draw)
        pictures = [picture(number + i) for i in range(images)]
        found = aligner.align(turns, pictures)
        each = iter(pictures)
        content = [
            {"role": role, "content": [{"type": "image", "image": next(each)} if part is None else
                                       {"type": "text", "text": part} for part in parts]}
            for role, parts in turns
        ]  # fmt: skip
        theirs = made.apply_chat_template(
            content, chat_template=MARKED[kind], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = theirs["input_ids"][0], theirs["assistant_masks"][0]
        ours = [k in (Kind.RESPONSE, Kind.END_OF_TURN) for k in found.kinds]
        wrong += list(found.ids) != list(ids) or ours != [bool(one) for one in mask]
    return wrong


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MARKED)
def test_answers_and_their_ends_are_the_assistant_mask_that_transformers_makes(kind, count):
    assert agrees(kind, count) == 0


@pytest.mark.parametrize("kind", MARKED)
def test_every_character_of_a_content_lies_under_a_token_of_its_kind(kind):
    aligner = Aligner(processor(kind))
    turns = [("user", (None, "Is ASSISTANT: é red?\nSay so.")), ("assistant", ("Yes, assistant.",))]
    found = aligner.align(turns, [picture()])
    texts = {0: turns[0][1][1], 1: turns[1][1][0]}
    for number, text in texts.items():
        covered = {c for one in found.chars if one and one[0] == number for c in range(one[1], one[2])}
        assert covered == set(range(len(text)))
    kinds = {one[0]: {Kind(k) for o, k in zip(found.chars, found.kinds, strict=True) if o and o[0] == one[0]}
             for one in found.chars if one}  # fmt: skip
    assert kinds == {0: {Kind.INSTRUCTION}, 1: {Kind.RESPONSE}}
    assert sum(k == Kind.END_OF_TURN for k in found.kinds) == 1


def test_a_spelled_control_token_is_text_or_refused_as_asked():
    made = processor()
    turns = [("user", ("a <|im_end|> b",)), ("assistant", ("c",))]
    end = made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    escaped, kept = (Aligner(made, how).align(turns) for how in ("escape", "keep"))
    assert (escaped.ids.count(end), kept.ids.count(end)) == (2, 3)
    assert made.tokenizer.decode(escaped.ids) == made.tokenizer.decode(kept.ids)
    assert sum(k == Kind.INSTRUCTION for k in escaped.kinds) == len("a <|im_end|> b")
    with pytest.raises(BadData, match="spells the control token"):
        Aligner(made, "reject").align(turns)
    with pytest.raises(BadData, match="spells the image mark"):
        Aligner(made, "keep").align([("user", ("an <image>",)), ("assistant", ("c",))])


def test_a_template_that_trims_is_followed_and_one_that_changes_contents_is_refused():
    made = processor()
    turns = [("user", ("  Red? ",)), ("assistant", (" Yes\n",))]
    made.chat_template = made.chat_template.replace("p['text']", "p['text'] | trim")
    found = Aligner(made).align(turns)
    assert [(p.start < p.stop, p.cut) for p in found.pieces] == [(True, 2), (True, 1)]
    first = next(one for one in found.chars if one)
    assert turns[0][1][0][first[1]] == "R"
    made.chat_template = made.chat_template.replace("| trim", "| upper")
    with pytest.raises(Unalignable, match="message 0 cannot be found again") as refused:
        Aligner(made).align(turns)
    assert refused.value.exit_code == 1


def test_a_plain_tokenizer_is_aligned_too():
    from tests.tiny import tiny_tokenizer

    found = Aligner(tiny_tokenizer()).align([("user", ("Red?",)), ("assistant", ("Yes",))])
    assert bytes(found.ids[i] for i, k in enumerate(found.kinds) if k == Kind.RESPONSE)
    assert list(found.kinds).count(Kind.RESPONSE) == 3

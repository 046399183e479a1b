"""A recipe means one thing: YAML 1.2 scalars, flat, no surprises; and what is written is read back as it was."""

import random
import time
import tracemalloc

import pytest

from toolbox.shell.errors import BadRecipe, MissingInput
from toolbox.shell.recipes import MAX_RECIPE, Entry, read_recipe, scalar, unknown_key, write_recipe


@pytest.fixture
def recipe(tmp_path):
    """Read a recipe of this text."""

    def read(text):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_recipe(path)

    return read


def settings(entries):
    return {entry.key: entry.value for entry in entries}


# --- scalars --------------------------------------------------------------------------------------------------------

SCALARS = {
    "1e-4": 1e-4,
    "1E+5": 1e5,
    "1.5e3": 1500.0,
    ".5": 0.5,
    "-.5": -0.5,
    "5.": 5.0,
    "+12": 12,
    "-0": 0,
    "012": 12,
    "0o17": 15,
    "0x1F": 31,
    "0xff": 31 * 8 + 7,
    "9007199254740993": 9007199254740993,
    "true": True,
    "False": False,
    "TRUE": True,
    "null": None,
    "~": None,
    "": None,
}
WORDS = [
    "no", "yes", "on", "off", "No", "YES", "n", "y", "tRue", "nULL", "1_000", "0b101", "1:30", "190:20:30",
    "2024-01-01",
    "2024-01-01T12:00:00Z", ".inf", "-.inf", ".nan", ".NaN", "inf", "nan", "1e400", "-1e400", "1e", "e5", ".", "-", "+",
    "0o18", "0xg", "-0x1F", "1.2.3", "１２", "٣", "9" * 5000, "0x" + "f" * 5000, "1e-4 ", " 1",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_numbers_truth_and_nothing_are_those_of_yaml_1_2(text, value, recipe):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    (entry,) = recipe(f"key: {text}\n")
    assert (entry.value, type(entry.value), entry.text, entry.line) == (value, type(value), text, 1)


@pytest.mark.parametrize("text", WORDS, ids=lambda text: text[:12])
def test_all_else_is_text(text, recipe):
    assert scalar(text) == text
    if text == text.strip() and text != "-":
        assert settings(recipe(f"key: {text}\n")) == {"key": text}


@pytest.mark.parametrize("text", [*SCALARS, *WORDS[:20]])
def test_what_is_quoted_is_text(text, recipe):
    assert settings(recipe(f"""a: "{text}"\nb: '{text}'\nc: ["{text}"]\n""")) == {"a": text, "b": text, "c": [text]}


def test_lists_blocks_comments_and_keys(recipe):
    entries = recipe(
        "# a comment\n"
        "first: 1  # behind\n"
        "list:\n  - a\n  - 1e-4\n  - ~\n"
        "flow: [no, 0x10, 'x, y', \"\\u00e9\\U0001f642\"]\n"
        "none: []\n"
        "literal: |\n  two\n  lines\n"
        "folded: >-\n  one\n  line\n"
        "plain: over\n  two lines\n"
        "yes: no\n"
        "1: 2\n"
        "? far\n: apart\n"
        "url: http://host:80/x#y\n"
        "unicode: é漢🙂\n"
    )
    assert settings(entries) == {
        "first": 1, "list": ["a", 1e-4, None], "flow": ["no", 16, "x, y", "é🙂"], "none": [], "literal": "two\nlines\n",
        "folded": "one line", "plain": "over two lines", "yes": "no", "1": 2, "far": "apart",
        "url": "http://host:80/x#y", "unicode": "é漢🙂",
    }  # fmt: skip
    assert [entry.line for entry in entries] == [2, 3, 7, 8, 9, 12, 15, 17, 18, 19, 21, 22]
    assert entries[2].text == ["no", "0x10", "x, y", "é🙂"]


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "# only a comment\n", "\ufeff"],
    ids=["nothing", "blank", "comment", "mark"],
)
def test_an_empty_recipe_sets_nothing(text, recipe):
    assert recipe(text) == []


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_marked_encodings_are_read(codec, recipe):
    assert settings(recipe("a: é\n".encode(codec))) == {"a": "é"}


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: `a` stands on line 1 already"),
        ("a: 1\n'a': 3\n", "r.yaml:2: `a` stands on line 1 already"),
        ("a: !!int 3\n", "r.yaml:1: tags are not allowed"),
        ("a: ! 3\n", "r.yaml:1: tags are not allowed"),
        ("b: 1\na: !!python/object/apply:os.system ['true']\n", "r.yaml:2: tags are not allowed"),
        ("!!map {a: 1}\n", "r.yaml:1: tags are not allowed"),
        ("a: &x 3\n", "r.yaml:1: anchors and aliases"),
        ("a: 1\nb: *x\n", "r.yaml:2: anchors and aliases"),
        ("&x a: 1\n", "r.yaml:1: anchors and aliases"),
        ("base: &x {a: 1}\n<<: *x\n", "r.yaml:1: anchors and aliases"),
        ("<<: {a: 1}\n", "r.yaml:1: a value is a scalar or a flat list"),
        ("a:\n  b: 1\n", "r.yaml:2: a value is a scalar or a flat list"),
        ("a: [[1]]\n", "r.yaml:1: a value is a scalar or a flat list"),
        ("a: 1\nb: [{c: 1}]\n", "r.yaml:2: a value is a scalar or a flat list"),
        ("a:\n- b:\n  - 1\n", "r.yaml:2: a value is a scalar or a flat list"),
        ("- a\n", "r.yaml:1: not a list of settings"),
        ("word\n", "r.yaml:1: not a list of settings"),
        ("? [a]\n: 1\n", "r.yaml:1: a key must be an option name"),
        ("? {a: 1}\n: 1\n", "r.yaml:1: a key must be an option name"),
        ("a: 1\n---\nb: 2\n", "more than one YAML document"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: not valid YAML"),
        ("a:\t[\n", "not valid YAML"),
        ("a: [1\n", "not valid YAML"),
        ("a: 'x\n", "not valid YAML"),
        ("a: b: c\n", "r.yaml:1: not valid YAML"),
        ("a: @x\n", "r.yaml:1: not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
        (b"a: \xff\n", "not valid YAML"),
        ('a: "\\ud83d"\n', "r.yaml:1: half of a surrogate pair"),
        ('b: 1\na: [x, "\\ud83d\\ude42"]\n', "r.yaml:2: half of a surrogate pair"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
        (b"a: 1\n" + b"#" * MAX_RECIPE, "larger than 1,048,576 bytes"),
    ],
    ids=lambda value: repr(value[:16]),
)
def test_what_is_not_plain_is_refused_with_its_line(text, says, recipe):
    with pytest.raises(BadRecipe) as failed:
        recipe(text)
    assert says in failed.value.what
    assert "\n" not in failed.value.what


def test_a_merge_key_with_a_value_is_a_key_like_any_other(recipe):
    assert settings(recipe("<<: x\n")) == {"<<": "x"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * (MAX_RECIPE - 10),
        "a: " + "[" * (MAX_RECIPE - 10),
        "a: " + "{a: " * 200_000,
        "\n".join(" " * depth + "a:" for depth in range(1000)),
        "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join('*' + d for d in 'a' * 9)}]\n" for c in "bcdefghi"),
    ],
    ids=["brackets", "list", "maps", "blocks", "laughs"],
)
def test_a_recipe_that_grows_or_nests_is_refused_at_once(text, recipe):
    began = time.process_time()
    with pytest.raises(BadRecipe):
        recipe(text)
    assert time.process_time() - began < 3


def test_an_endless_file_is_not_read_to_its_end():
    tracemalloc.start()
    with pytest.raises(BadRecipe, match="larger than"):
        read_recipe("/dev/zero")
    assert tracemalloc.get_traced_memory()[1] < 8 * MAX_RECIPE
    tracemalloc.stop()


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(MissingInput, match=r"none\.yaml: no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(IsADirectoryError):
        read_recipe(tmp_path)


def test_an_unknown_key_names_the_nearest():
    near = unknown_key("r.yaml", Entry("bath-size", 1, 4), ["batch-size", "seed"])
    assert near.what == "r.yaml:4: `bath-size` is not an option of this command"
    assert near.advice == "did you mean `batch-size`?"
    assert "--help" in unknown_key("r.yaml", Entry("xyz", 1, 4), ["batch-size"]).advice


# --- round trip -----------------------------------------------------------------------------------------------------


def text_of(source):
    """Text of the kinds that YAML reads as something else."""
    kind = source.randrange(5)
    if kind == 0:
        return source.choice(
            [
                *SCALARS,
                *WORDS,
                "---",
                "...",
                "- a",
                "? a",
                "a: b",
                "a #b",
                "#",
                "&a",
                "*a",
                "!a",
                "<<",
                "=",
                "%a",
                "@",
                "`",
            ]
        )
    if kind == 1:
        return "".join(source.choices("0123456789eE+-._xoXOabcdefnulrtsy", k=source.randrange(1, 8)))
    if kind == 2:
        return "".join(source.choices("ab \t\n\r:,[]{}#&*!|>'\"%@`\\/~?-=", k=source.randrange(8)))
    if kind == 3:
        return "".join(
            source.choices(
                "aé漢🙂\x00\x07\x1b\x7f\x85\xa0\xad\u2028\u2029\u202e\ufeff\ufffe\U000e0001", k=source.randrange(8)
            )
        )
    code_points = [source.randrange(0x110000) for _ in range(source.randrange(5))]
    return "".join(chr(code) for code in code_points if not 0xD800 <= code < 0xE000)


def value_of(source):
    kind = source.randrange(5)
    if kind == 0:
        return source.random() < 0.5
    if kind == 1:
        return source.choice([1, -1]) * source.getrandbits(source.choice([1, 8, 64, 200, 3000]))
    if kind == 2:
        return source.choice(
            [source.uniform(-2, 2), source.uniform(-2, 2) * 10.0 ** source.randint(-320, 300), -0.0, 5e-324, 1e16, 1e22]
        )
    return text_of(source)


def test_what_is_written_is_read_back(recipe):
    source = random.Random(0)
    for _ in range(500):
        expected = {
            text_of(source)[:1000]: [source.choice([value_of(source), None]) for _ in range(source.randrange(4))]
            if source.random() < 0.3
            else value_of(source)
            for _ in range(source.randrange(1, 4))
        }
        text = write_recipe(expected)
        found = settings(recipe(text))
        assert repr(found) == repr(expected), text
        assert write_recipe(found) == text


def test_what_is_read_is_written_and_read_back(recipe):
    source = random.Random(1)
    pieces = [
        *SCALARS,
        *WORDS,
        "[a, 1e-4, ~]",
        "[]",
        "'it''s'",
        '"\\x1b\\u2028\\U0001f642"',
        '"1"',
        "|\n  a\n\n  b\n",
        ">\n  a\n  b\n",
        "[0x1F, no]",
    ]
    for _ in range(200):
        text = "".join(f"k{place}: {source.choice(pieces)}\n" for place in range(3))
        try:
            entries = recipe(text)
        except BadRecipe:  # "key: -" and the like
            continue
        found = {key: value for key, value in settings(entries).items() if value is not None}
        assert repr(settings(recipe(write_recipe(found)))) == repr(found), text


def test_plain_words_stay_plain_and_nothing_is_left_out_but_none():
    text = write_recipe(
        {"model": "org/name-1.5B", "lr": 1e-4, "raw": True, "stop": ("a b", "c"), "n": 3, "id": "3", "x": None}
    )
    assert text == 'model: org/name-1.5B\nlr: 0.0001\nraw: true\nstop: ["a b", c]\nn: 3\nid: "3"\n'

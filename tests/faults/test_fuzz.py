"""Lines and recipes that nobody would write: read, or refused by the house's errors with file and line, and soon."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import time
from collections import Counter

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.commands import CASES
from toolbox.shell.errors import BadData, BadRecipe
from toolbox.shell.items import ITEM_SHAPES, PATH_SHAPES
from toolbox.shell.recipes import read_recipe, write_recipe
from toolbox.shell.records import ANSWER_SHAPES, PROMPT_SHAPES, TRAINING_SHAPES, RecordReader, training_row

BLOCK = 100
"""Lines of one example."""
QUICK, SLOW = 2_500, 100_000
QUICK_RECIPES, SLOW_RECIPES = 150, 10_000
SECONDS = 2.0
"""Of this process, that an example may take."""
NAME = "rows.jsonl"
SHAPES = (*TRAINING_SHAPES, *ANSWER_SHAPES, *PROMPT_SHAPES, *ITEM_SHAPES, *PATH_SHAPES)
PROFILE = {
    "deadline": None, "database": None, "derandomize": True, "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip

# -- lines -----------------------------------------------------------------------------------------------------------

FIELDS = sorted({field for shape in SHAPES for field in shape.__struct_fields__})
ODD = st.sampled_from(
    ["", " ", "\x00", "\x1b[2J", "\u2028", "\u202e", "\ufeff", "\ud7ff", "\U0010ffff", "NaN", "-0", "1e999", "A", "yes"]
)
LEAF = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | ODD | st.text(max_size=12)
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD | st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "boss"]) | VALUE, "content": VALUE}),
    max_size=3,
)
ROW = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), VALUE | TURNS, max_size=6)
GOOD = st.sampled_from([json.dumps(row) for case in CASES.values() for row in case.good[:2]])
PLAIN = ROW.map(json.dumps) | VALUE.map(json.dumps) | GOOD  # json.dumps writes NaN and lone halves of characters too


PIECES_OF_LINES = (
    b"{" * 99,
    b"[" * 2000,
    b'"',
    b"\\",
    b"\xff",
    b"\x00",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b",",
    b"}",
    b"\r",
    b"",
)


def damaged(line: bytes, draw: random.Random) -> bytes:
    """A line with a piece cut out, doubled, or replaced by other bytes, up to three times."""
    for _ in range(draw.randrange(4)):
        begin = draw.randrange(len(line) + 1)
        end = min(len(line), begin + draw.randrange(9))
        piece = draw.choice((*PIECES_OF_LINES, line[begin:end] * 2, draw.randbytes(draw.randrange(4))))
        line = line[:begin] + piece + line[end:]
    return line.replace(b"\n", b"")


@st.composite
def block(draw: st.DrawFn) -> bytes:
    """``BLOCK`` lines: a few that are drawn with care, and cheap damages of them."""
    texts = draw(st.lists(PLAIN, min_size=3, max_size=3))
    chance = random.Random(draw(st.integers(0, 2**32)))
    lines = [text.encode("utf-8", "surrogatepass").replace(b"\n", b"") for text in texts]
    lines += [damaged(chance.choice(lines), chance) for _ in range(BLOCK - len(lines))]
    return b"".join(line + chance.choice((b"\n", b"\r\n", b"\n\n", b" \n")) for line in lines)


def read_all(text: bytes, shapes: tuple) -> tuple[int, int]:
    """Every line once: how many were records and how many were refused, each by its own line."""
    rejected: list[BadData] = []
    reader = RecordReader(shapes, on_bad="skip", rejects=lambda raw, problem: rejected.append(problem))
    records = refused = 0
    try:
        for record in reader(opened(text), NAME):
            records += 1
            assert (record.file, type(record.id)) == (NAME, str)
            json.dumps(record.data, allow_nan=False).encode()  # what goes out is what any tool reads
            if isinstance(record.value, TRAINING_SHAPES):
                with contextlib.suppress(BadData):
                    training_row(record)
    except BadData as problem:  # of the file as a whole: UTF-16, damaged compression, an array that is none
        refused = 1
        told = problem.what
    else:
        told = NAME
    assert told.startswith(NAME)
    for problem in rejected:
        assert problem.file == NAME
        assert problem.line is not None or (problem.field or "").startswith("$[")
        assert problem.what.startswith(f"{NAME}:{problem.line}: " if problem.line else f"{NAME}: $[")
    assert reader.skipped == len(rejected)
    return records, len(rejected) + refused


def opened(text: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(text))


def first_refusal(text: bytes, shapes: tuple) -> BadData | None:
    """What ends a run that leaves nothing out."""
    try:
        for _ in RecordReader(shapes)(opened(text), NAME):
            pass
    except BadData as problem:
        return problem
    return None


def fuzz_lines(lines: int) -> Counter:
    """At least ``lines`` lines in blocks; what became of them."""
    tried: Counter = Counter()

    @settings(max_examples=lines // BLOCK, **PROFILE)
    @given(
        block(),
        st.sampled_from([SHAPES, TRAINING_SHAPES, PROMPT_SHAPES, ITEM_SHAPES, PATH_SHAPES]),
    )
    def lines_are_read_or_refused(text: bytes, shapes: tuple) -> None:
        began = time.process_time()
        records, refused = read_all(text, shapes)
        assert time.process_time() - began < SECONDS
        tried.update(lines=BLOCK, records=records, refused=refused)
        first = first_refusal(text, shapes)
        assert (first is not None) == (refused > 0)
        assert first is None or first.what.startswith(NAME)

    lines_are_read_or_refused()
    return tried


def test_a_few_thousand_lines_are_read_or_refused_with_their_place():
    tried = fuzz_lines(QUICK)
    assert tried["lines"] >= QUICK
    assert tried["records"] > 0
    assert tried["refused"] > QUICK // 10


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_read_or_refused_with_their_place():
    tried = fuzz_lines(SLOW)
    assert tried["lines"] >= SLOW
    assert tried["records"] > SLOW // 50


# -- recipes ---------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [": ", ":", "\n", "\n  ", "\n\t", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!int ", "!", "|", ">", "'", '"',
     "# ", "---\n", "...\n", "? ", "<<: ", "%YAML 1.1\n", "~", "null", "yes", "1e-4", "0x1f", "-", ".inf", "\\u",
     "\ufeff", "seed", "epochs", "lr", "model", "quiet", "map", "9" * 400, "\x85", "\u2028", "\x00"]
)  # fmt: skip
SCRAPS = st.lists(PIECES | st.text(max_size=6), max_size=14).map("".join)
NAMES = sorted(CASES)


def options_of(name: str) -> list[str]:
    """What a recipe of this command may set."""
    command = importlib.import_module("toolbox.commands." + name.replace("-", "_")).main
    return sorted(getattr(one, "key", one.name) for one in command.params if one.expose_value)


@st.composite
def settings_of_a_command(draw: st.DrawFn) -> tuple[str, bytes]:
    """A command and a recipe for it, of its own options with values of any kind."""
    name = draw(st.sampled_from(NAMES))
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | PIECES
    value = scalar | st.lists(scalar, max_size=3)
    chosen = draw(st.dictionaries(st.sampled_from(options_of(name)), value, max_size=4))
    text = "".join(f"{key}: {json.dumps(one)}\n" for key, one in chosen.items())
    return name, text.encode("utf-8", "surrogatepass")


RECIPE = (
    settings_of_a_command()
    | st.tuples(st.sampled_from(NAMES), SCRAPS.map(lambda text: text.encode("utf-8", "surrogatepass")))
    | st.tuples(st.sampled_from(NAMES), st.binary(max_size=60))
)


def refusal_of_reading(path: str) -> BadRecipe | None:
    """Read alone: the complaint, or None where it is a recipe that can be written again."""
    try:
        entries = read_recipe(path)
    except BadRecipe as problem:
        return problem
    assert all(entry.line >= 1 for entry in entries)
    write_recipe({entry.key: entry.value for entry in entries}).encode()
    return None


def refusal_of_using(name: str, path: str) -> BadRecipe | None:
    """Read for a command: the complaint about the recipe, or None where it was taken, required options aside."""
    command = importlib.import_module("toolbox.commands." + name.replace("-", "_")).main
    missing = ""
    try:
        with command.make_context(name, ["--recipe", path]):
            return None
    except BadRecipe as problem:
        return problem
    except click.MissingParameter:
        missing = "an option that no recipe of this one set"
    assert missing
    return None


def fuzz_recipes(count: int, path: str) -> Counter:
    """That many recipes, each read alone and then by a command; what became of them."""
    tried: Counter = Counter()

    @settings(max_examples=count, **PROFILE)
    @given(RECIPE)
    def recipes_are_taken_or_refused(recipe: tuple[str, bytes]) -> None:
        name, text = recipe
        with open(path, "wb") as handle:
            handle.write(text)
        began = time.process_time()
        alone, used = refusal_of_reading(path), refusal_of_using(name, path)
        assert time.process_time() - began < SECONDS
        for problem in (alone, used):
            assert problem is None or problem.what.startswith(path)
        assert alone is None or used is not None
        tried["refused" if alone else "read"] += 1
        tried["taken"] += used is None

    recipes_are_taken_or_refused()
    return tried


def test_recipes_of_any_kind_are_taken_or_refused_with_their_place(tmp_path):
    tried = fuzz_recipes(QUICK_RECIPES, os.fspath(tmp_path / "r.yaml"))
    assert tried["read"] + tried["refused"] >= QUICK_RECIPES
    assert min(tried["read"], tried["refused"], tried["taken"]) > 0


@pytest.mark.slow
def test_ten_thousand_recipes_are_taken_or_refused_with_their_place(tmp_path):
    tried = fuzz_recipes(SLOW_RECIPES, os.fspath(tmp_path / "r.yaml"))
    assert tried["read"] + tried["refused"] >= SLOW_RECIPES

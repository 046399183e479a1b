"""Numbers are finite and within bounds, paths are relative to where they are written, options have one name."""

import math
import random

import click
import pytest

from toolbox.shell.params import Number, Option, PathType, TemplateType, option, together

WHOLE = {"whole": True}


def refusal(kind, value):
    with pytest.raises(click.BadParameter) as failed:
        kind.convert(value, None, None)
    return failed.value.message


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "given", "expected"),
    [
        ({}, "1e-4", 1e-4),
        ({}, "3", 3.0),
        ({}, 3, 3.0),
        ({}, "-0", -0.0),
        ({}, "5e-324", 5e-324),
        ({}, "1e-400", 0.0),
        (WHOLE, "3", 3),
        (WHOLE, 3, 3),
        (WHOLE, "-3", -3),
        (WHOLE, "9007199254740993", 9007199254740993),
        (WHOLE, 2**63 - 1, 2**63 - 1),
        (WHOLE, "9" * 300, int("9" * 300)),
        ({"low": 0}, "0", 0.0),
        ({"high": 1}, "1", 1.0),
        ({"above": 0}, "5e-324", 5e-324),
        ({"low": 2, "high": 2, **WHOLE}, "2", 2),
        ({"words": ["auto"], **WHOLE}, "auto", "auto"),
        ({"words": ["auto", "epoch"]}, "epoch", "epoch"),
    ],
)
def test_numbers_within_bounds_come_as_they_are(bounds, given, expected):
    found = Number(**bounds).convert(given, None, None)
    assert found == expected
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("bounds", "given", "says"),
    [
        ({}, "nan", "nan is not finite"),
        ({}, "inf", "inf is not finite"),
        ({}, "-Infinity", "-Infinity is not finite"),
        ({}, "1e400", "1e400 is not finite"),
        ({}, math.inf, "inf is not finite"),
        ({}, 10**400, "is not a number"),
        ({}, "", "'' is not a number"),
        ({}, "1,5", "'1,5' is not a number"),
        ({}, "0x10", "'0x10' is not a number"),
        ({}, "1e", "'1e' is not a number"),
        ({}, True, "True is not a number"),
        ({}, None, "None is not a number"),
        ({}, [1], "[1] is not a number"),
        ({}, "auto", "'auto' is not a number"),
        (WHOLE, "5.0", "'5.0' is not an integer"),
        (WHOLE, 5.0, "5.0 is not an integer"),
        (WHOLE, "5.5", "'5.5' is not an integer"),
        (WHOLE, "1e3", "'1e3' is not an integer"),
        (WHOLE, "nan", "'nan' is not an integer"),
        (WHOLE, "inf", "'inf' is not an integer"),
        (WHOLE, "1e400", "'1e400' is not an integer"),
        (WHOLE, "9" * 5000, "is not an integer"),
        (WHOLE, False, "False is not an integer"),
        ({"words": ["auto"], **WHOLE}, "Auto", "'Auto' is not auto or an integer"),
        ({"low": 0}, "-1e-9", "-1e-9 is below 0"),
        ({"high": 1}, "1.0000001", "1.0000001 is above 1"),
        ({"above": 0}, "0", "0 is not above 0"),
        ({"above": 0}, "-0.0", "-0.0 is not above 0"),
        ({"low": 0, "high": 2**63 - 1, **WHOLE}, str(2**63), "9223372036854775808 is above"),
    ],
)
def test_what_is_no_number_or_out_of_bounds_is_refused(bounds, given, says):
    assert says in refusal(Number(**bounds), given)


def test_every_finite_number_is_read_as_written():
    source = random.Random(0)
    for _ in range(2000):
        number = source.uniform(-1, 1) * 10.0 ** source.randint(-300, 300)
        assert Number().convert(repr(number), None, None) == number
        whole = source.getrandbits(source.choice([8, 53, 54, 64, 500])) * source.choice([1, -1])
        assert Number(whole=True).convert(str(whole), None, None) == whole


def test_the_name_tells_what_is_expected():
    assert Number().name == "number"
    assert Number(whole=True).name == "integer"
    assert Number(words=["auto", "epoch"], whole=True).name == "auto|epoch|integer"


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "a\0b", None, 3, b"x"])
def test_a_path_is_a_text_without_nul(value):
    assert refusal(PathType(), value) == "a path is expected"
    assert PathType().convert("-", None, None) == "-"


@pytest.mark.parametrize("value", ["file", "=file", "name=", "="])
def test_a_named_file_has_both(value):
    assert "expected NAME=FILE" in refusal(PathType(named=True), value)
    assert PathType(named=True).convert("name=a=b", None, None) == "name=a=b"


def test_paths_are_seen_from_their_base(tmp_path):
    base = str(tmp_path)
    path = PathType()
    assert path.absolute("rows.jsonl", base) == f"{base}/rows.jsonl"
    assert path.absolute("/rows.jsonl", base) == "/rows.jsonl"
    assert path.absolute("-", base) == "-"
    named = PathType(named=True)
    assert named.absolute("set=a=b.jsonl", base) == f"set={base}/a=b.jsonl"
    assert named.absolute("set=-", base) == "set=-"


def test_a_relative_base_is_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PathType().absolute("rows", "recipes") == f"{tmp_path}/recipes/rows"
    assert PathType().absolute("rows", ".") == f"{tmp_path}/rows"


def test_a_model_is_a_path_where_it_looks_like_one_or_is_there(tmp_path):
    for name in ("tuned", "smollm2"):
        (tmp_path / name).mkdir()
    base, model = str(tmp_path), PathType(model=True)
    assert model.absolute("tuned", base) == f"{base}/tuned"
    assert model.absolute("smollm2", base) == "smollm2"  # embedded, whatever lies beside the recipe
    assert model.absolute("org/name", base) == "org/name"
    assert model.absolute("./later", base) == f"{base}/./later"
    assert model.absolute("../later", base) == f"{base}/../later"
    assert model.absolute("/later", base) == "/later"


def test_named_templates_are_no_files(tmp_path):
    template = TemplateType()
    for word in ("auto", "chat", "qa", "llama2", "raw"):
        assert template.absolute(word, str(tmp_path)) == word
    assert template.absolute("mine.jinja", str(tmp_path)) == f"{tmp_path}/mine.jinja"


# --- options --------------------------------------------------------------------------------------------------------


def make(*names, **more):
    return Option(list(names), **more)


def test_an_option_has_one_name_everywhere():
    found = make("--map", "map_fields", multiple=True)
    assert (found.name, found.key, found.envvar) == ("map_fields", "map", "TOOLBOX_MAP")
    found = make("-j", "--num-processes")
    assert (found.name, found.key, found.envvar) == ("num_processes", "num-processes", "TOOLBOX_NUM_PROCESSES")


def test_what_a_recipe_may_not_set_the_environment_may_not_either():
    assert make("--overwrite", is_flag=True, recipe=False).envvar is None
    assert make("--version", is_flag=True, expose_value=False).envvar is None
    assert make("--key", envvar="OPENAI_API_KEY").envvar == "OPENAI_API_KEY"


def test_sections_and_order():
    @together(option("--one", group="Method"), option("--two", group="Data"), option("--three", group="Data"))
    def function():
        pass

    found = list(reversed(function.__click_params__))
    assert [(parameter.name, parameter.group) for parameter in found] == [
        ("one", "Method"),
        ("two", "Data"),
        ("three", "Data"),
    ]


@pytest.mark.parametrize(
    ("environment", "arguments", "says"),
    [
        ({"TOOLBOX_SEED": "x"}, [], "Invalid value for TOOLBOX_SEED in the environment: 'x' is not an integer"),
        ({}, ["--seed", "x"], "Invalid value for '--seed': 'x' is not an integer"),
        ({"TOOLBOX_SEED": "x"}, ["--seed", "y"], "Invalid value for '--seed': 'y' is not an integer"),
    ],
)
def test_a_complaint_says_where_the_value_came_from(environment, arguments, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = click.Command("probe", params=[make("--seed", type=Number(whole=True))])
    with pytest.raises(click.BadParameter) as failed:
        command.make_context("probe", arguments)
    assert failed.value.format_message() == says

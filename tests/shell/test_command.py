"""Flag over environment over recipe over default, help in sections, and failures with their codes."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys

import click
import pytest

from tests.server import environment
from toolbox.shell.command import GROUPS, command
from toolbox.shell.errors import BadRecipe, MissingInput
from toolbox.shell.params import Number, option

DEFINITION = '''
import sys, time
import click
from toolbox.shell.command import command
from toolbox.shell.errors import BadData
from toolbox.shell.params import Number, PathType, TemplateType, option
from toolbox.shell.streams import JsonlWriter, open_source


@command("probe", schema=lambda: {"input": {}, "output": {}}, examples=["probe --seed 3 rows.jsonl | head"])
@click.argument("file", default="-", type=PathType())
@option("--map", "map_fields", group="Input/Output", multiple=True, metavar="NEW=OLD", help="Rename.")
@option("--out", group="Input/Output", type=PathType("DIR"), help="Output.")
@option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace.")
@option("--watch", group="Watching", type=PathType("NAME=FILE", named=True), multiple=True, help="Watch.")
@option("--model", group="Model", type=PathType("MODEL", model=True), default="smollm2", help="Model.")
@option("--template", group="Data", type=TemplateType("NAME"), default="auto", help="Template.")
@option("--raw", group="Data", is_flag=True, help="Raw.")
@option("--system", group="Data", help="System turn.")
@option("--stop", group="Generation", multiple=True, help="Stop.")
@option("--layers", group="Method", multiple=True, type=Number(0, whole=True), default=(1, 2), help="Layers.")
@option("--lr", group="Training", type=Number(above=0, words=["auto"]), default="auto", help="Learning rate.")
@option("--schedule", group="Training", type=click.Choice(["constant", "linear"]), default="constant", help="Schedule.")
@option("--seed", group="General", type=Number(0, whole=True), default=0, help="Seed.")
def main(call, **values):
    """Show the values."""
    print("a library prints")
    if values["system"] == "wait":
        print("ready", file=sys.stderr, flush=True)
        time.sleep(30)
    if values["system"] == "bad":
        raise BadData("bad", "mend it", file="rows", line=3)
    if values["system"] == "bug":
        raise RuntimeError("oh\\x1b[31m\\nno")
    with open_source(values["file"], call.streams) as handle:
        rows = handle.read().decode()
    call.reporter.note("noted")
    writer = JsonlWriter(call.streams)
    writer.write({"values": values, "settings": call.settings, "dry_run": call.dry_run, "rows": rows})
    writer.close()
'''


def _define():
    names = {}
    exec(DEFINITION, names)  # the same text is a script below
    return names["main"]


PROBE = _define()


@pytest.fixture
def params(monkeypatch, tmp_path):
    """The values of a call: ``params("--seed 3", recipe="seed: 4", SEED="5")``."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TOOLBOX_")]:
        monkeypatch.delenv(name)

    def parse(words="", recipe=None, **variables):
        arguments = shlex.split(words) if isinstance(words, str) else list(words)
        if recipe is not None:
            (tmp_path / "recipes").mkdir(exist_ok=True)
            (tmp_path / "recipes" / "r.yaml").write_text(recipe)
            arguments += ["--recipe", "recipes/r.yaml"]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"TOOLBOX_{name}", value)
            with PROBE.make_context("probe", arguments) as context:
                return dict(context.params)

    return parse


# --- precedence -----------------------------------------------------------------------------------------------------

# option, flag, environment, recipe, and the four values of flag over environment over recipe over default
SOURCES = {
    "number": ("seed", "--seed 3", {"SEED": "2"}, "seed: 1", (3, 2, 1, 0)),
    "number or word": ("lr", "--lr 1e-3", {"LR": "auto"}, "lr: 1e-4", (1e-3, "auto", 1e-4, "auto")),
    "flag off by environment": ("raw", "--raw", {"RAW": "0"}, "raw: true", (True, False, True, False)),
    "flag on by environment": ("raw", "--raw", {"RAW": "yes"}, "raw: false", (True, True, False, False)),
    "choice": ("schedule", "--schedule linear", {"SCHEDULE": "constant"}, "schedule: linear",
               ("linear", "constant", "linear", "constant")),
    "text": ("system", "--system ''", {"SYSTEM": "two words"}, "system: one", ("", "two words", "one", None)),
    "many": ("stop", "--stop a --stop 'b c'", {"STOP": "d e"}, "stop: [f g, h]",
             (("a", "b c"), ("d", "e"), ("f g", "h"), ())),
    "many with defaults": ("layers", "--layers 9", {"LAYERS": "7 8"}, "layers: []", ((9,), (7, 8), (), (1, 2))),
    "one of many": ("stop", "--stop a", {"STOP": "b"}, "stop: c", (("a",), ("b",), ("c",), ())),
    "other name": ("map_fields", "--map a=b", {"MAP": "c=d"}, "map: e=f", (("a=b",), ("c=d",), ("e=f",), ())),
    "argument": ("file", "a.jsonl", {}, "file: '-'", ("a.jsonl", "-", "-", "-")),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES.values(), ids=SOURCES)
def test_a_flag_beats_the_environment_beats_a_recipe_beats_the_default(case, params):
    name, flag, variables, recipe, (by_flag, by_environment, by_recipe, by_default) = case
    assert params(flag, recipe, **variables)[name] == by_flag
    assert params(flag, **variables)[name] == by_flag
    assert params(flag, recipe)[name] == by_flag
    assert params("", recipe, **variables)[name] == by_environment
    assert params("", recipe)[name] == by_recipe
    assert params()[name] == by_default


def test_an_empty_variable_is_not_set(params):
    assert params("", "seed: 4", SEED="")["seed"] == 4
    assert params(RAW="")["raw"] is False


def test_what_is_only_for_the_command_line_cannot_come_from_elsewhere(params):
    assert params(OVERWRITE="1", DRY_RUN="1", PRINT_RECIPE="1", DEBUG="1") == params()
    for key in ("overwrite", "dry-run", "print-recipe", "debug", "recipe", "schema", "version", "help"):
        with pytest.raises(BadRecipe, match=f"r.yaml:1: `{key}` is not an option"):
            params("", f"{key}: true")


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("system: 007", "system", "007"),
        ("system: 1e3", "system", "1e3"),
        ("system: 0x1F", "system", "0x1F"),
        ("system: no", "system", "no"),
        ("system: 2024-01-01", "system", "2024-01-01"),
        ("system: 'true'", "system", "true"),
        ("system: ''", "system", ""),
        ("stop: [007, 1.50, no, 'null']", "stop", ("007", "1.50", "no", "null")),
        ("stop: 5", "stop", ("5",)),
        ("lr: 1e-4", "lr", 1e-4),
        ("lr: 3", "lr", 3.0),
        ("lr: auto", "lr", "auto"),
        ("lr: 'auto'", "lr", "auto"),
        ("seed: 0x1F", "seed", 31),
        ("seed: 9007199254740993", "seed", 9007199254740993),
        ("layers: [3, 0o17]", "layers", (3, 15)),
        ("map_fields: a", None, None),
        ("map-fields: a", None, None),
    ],
)
def test_a_value_is_what_its_option_takes(text, name, value, params):
    if name is None:
        with pytest.raises(BadRecipe, match="is not an option"):
            params("", text)
        return
    found = params("", text)[name]
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: '3'", '`seed`: expected integer, got "3"'),
        ("seed: 3.0", "`seed`: 3.0 is not an integer"),
        ("seed: 1e3", "`seed`: 1000.0 is not an integer"),
        ("seed: 1_000", '`seed`: expected integer, got "1_000"'),
        ("seed: -1", "`seed`: -1 is below 0"),
        ("seed: true", "`seed`: expected integer, got true"),
        ("seed: [3]", "`seed`: one value is expected, not a list"),
        ("seed:", "`seed`: no value"),
        ("seed: ~", "`seed`: no value"),
        ("seed: " + "9" * 5000, "`seed`: expected integer"),
        ("lr: .inf", '`lr`: expected auto|number, got ".inf"'),
        ("lr: 1e400", '`lr`: expected auto|number, got "1e400"'),
        ("lr: nan", '`lr`: expected auto|number, got "nan"'),
        ("lr: Auto", '`lr`: expected auto|number, got "Auto"'),
        ("lr: 0", "`lr`: 0 is not above 0"),
        ("layers: [1, x]", '`layers`: expected integer, got "x"'),
        ("layers: [1, ~]", "`layers`: no value"),
        ("layers: [1, true]", "`layers`: expected integer, got true"),
        ("raw: yes", '`raw`: expected true or false, got "yes"'),
        ("raw: 1", "`raw`: expected true or false, got 1"),
        ("raw: 'true'", '`raw`: expected true or false, got "true"'),
        ("raw: [true]", "`raw`: one value is expected, not a list"),
        ("system: true", "`system`: expected text, got true"),
        ("stop: [a, true]", "`stop`: expected text, got true"),
        ("stop: [a, ~]", "`stop`: no value"),
        ("stop: null", "`stop`: no value"),
        ("schedule: cosine", "`schedule`: 'cosine' is not one of 'constant', 'linear'"),
        ("watch: rows.jsonl", "expected NAME=FILE"),
        ('out: ""', "`out`: a path is expected"),
        ('out: "a\\0b"', "`out`: a path is expected"),
        ("sead: 3", "`sead` is not an option of this command"),
    ],
)
def test_a_value_that_its_option_does_not_take_is_refused_with_its_line(text, says, params):
    with pytest.raises(BadRecipe) as failed:
        params("", "# first\n" + text)
    assert failed.value.what.startswith("recipes/r.yaml:2: ")
    assert says in failed.value.what
    assert failed.value.advice


def test_one_option_by_two_spellings_is_a_duplicate(params):
    second = option("--batch-size", group="Training", type=Number(1, whole=True), default=1)(
        lambda call, **values: None
    )
    probe = command("probe", examples=[], schema=dict)(second)
    with probe.make_context("probe", []) as context:
        path = "r.yaml"
        for text, works in [("batch-size: 2", True), ("batch_size: 2", True), ("batch-size: 2\nbatch_size: 3", False)]:
            with open(path, "w") as handle:
                handle.write(text)
            if works:
                assert probe.load_recipe(context, path) == {"batch_size": 2}
            else:
                with pytest.raises(BadRecipe, match=r"r\.yaml:2: `batch_size` is set already"):
                    probe.load_recipe(context, path)


def test_paths_are_seen_from_the_recipe(params, tmp_path):
    (tmp_path / "recipes").mkdir()
    for name in ("tuned", "smollm2"):
        (tmp_path / "recipes" / name).mkdir()
    here = f"{tmp_path}/recipes"
    found = params("", "file: rows.jsonl\nwatch: [a=x, b=/y]\nmodel: tuned\ntemplate: t.jinja\nout: ../o")
    assert found["file"] == f"{here}/rows.jsonl"
    assert found["watch"] == (f"a={here}/x", "b=/y")
    assert found["model"] == f"{here}/tuned"
    assert found["template"] == f"{here}/t.jinja"
    assert found["out"] == f"{here}/../o"
    found = params("", "file: '-'\nmodel: smollm2\ntemplate: chat")
    assert (found["file"], found["model"], found["template"]) == ("-", "smollm2", "chat")
    assert params("", "model: org/name")["model"] == "org/name"
    assert params("--out o", "seed: 1")["out"] == "o"  # a flag is seen from here


def test_a_recipe_that_is_not_there(params):
    with pytest.raises(MissingInput, match=r"none\.yaml: no such recipe"):
        params("--recipe none.yaml")


def printed(arguments, capsys):
    with PROBE.make_context("probe", ["--print-recipe", *arguments]) as context:
        PROBE.invoke(context, [])
    return capsys.readouterr().out


TEXTS = [
    "a", "", " ", "1e-4", "no", "true", "null", "~", "0x1F", "007", "-", "a: b", "#x", "[x]", "{", "&a", "*a", "!x",
    "two\nlines", "tab\t", "é🙂", "\x1b[31m", "\u2028", "\x85", "'", '"', "\\", "%", "@", "`", "1_0", ".inf",
]  # fmt: skip
FILES = ["rows", "a b", "1", "true", "-", "/x/y", "../x", "é🙂", "~", "x=y"]


def some_arguments(source):
    """A command line with hostile values; some options repeated, some left out."""
    text, file = (lambda: source.choice(TEXTS)), (lambda: source.choice(FILES))
    values = {
        "--system": text, "--stop": text, "--map": text, "--out": file, "--schedule": lambda: "linear",
        "--layers": lambda: source.randrange(99), "--seed": lambda: source.getrandbits(source.choice([1, 62])),
        "--lr": lambda: source.choice(["auto", source.uniform(1e-9, 1), 1e22, 5e-324]),
        "--watch": lambda: f"{source.choice(['n', 'a b', '1'])}={file()}",
        "--model": lambda: source.choice(["smollm2", "org/name", file()]),
        "--template": lambda: source.choice(["chat", file()]),
    }  # fmt: skip
    names = source.choices(list(values), k=source.randrange(12))
    flags = [f"{name}={values[name]()}" for name in names]
    return [*flags, *source.choice([[], ["--raw"]]), *source.choice([[], ["--", file()]])]


def test_the_printed_recipe_gives_the_same_values_again(params, capsys, tmp_path):
    source = random.Random(0)
    for _ in range(150):
        arguments = some_arguments(source)
        text = printed(arguments, capsys)
        (tmp_path / "printed.yaml").write_text(text)
        assert printed(["--recipe", "printed.yaml"], capsys) == text, arguments
        first, second = params(arguments), params(["--recipe", "printed.yaml"])
        for name in ("system", "stop", "map_fields", "layers", "seed", "lr", "schedule", "raw"):
            assert second[name] == first[name], arguments
        for name in ("file", "out"):
            is_path = first[name] not in (None, "-")
            assert second[name] == (os.path.join(tmp_path, first[name]) if is_path else first[name]), arguments


def test_an_emptied_list_is_printed_as_one(params, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text("layers: []\n")
    text = printed(["--recipe", "r.yaml"], capsys)
    assert "layers: []\n" in text
    assert "stop" not in text
    (tmp_path / "again.yaml").write_text(text)
    assert params("--recipe again.yaml")["layers"] == ()


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_has_every_option_once_in_the_section_it_belongs_to():
    with PROBE.make_context("probe", []) as context:
        text = PROBE.get_help(context)
        groups = {
            max(p.opts, key=len): getattr(p, "group", "General")
            for p in PROBE.get_params(context)
            if isinstance(p, click.Option)
        }
    assert text.startswith("Usage: probe [OPTIONS] [FILE]\n")
    sections, current = {}, None
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            current = line[:-1]
        elif line.startswith("  ") and current in GROUPS:
            sections.setdefault(current, []).extend(word.strip(",") for word in line.split() if word.startswith("--"))
    assert list(sections) == [group for group in GROUPS if group in sections]
    for name, group in groups.items():
        assert sections[group].count(name) == 1
    assert "  probe --seed 3 rows.jsonl | head" in text
    assert "[FILE]" not in text.partition("Options")[0].split("\n", 1)[1]  # an argument is no option
    assert "docs/probe.md" in text


# --- the process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "probe"
    path.write_text(DEFINITION + "\nmain()\n")
    return path


@pytest.fixture
def probe(script, tmp_path):
    """Run the command as a process."""

    def run(*arguments, shell="", given=None, **more):
        words = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, script, *arguments]
        more = {"input": b"rows", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.run(words, env={**environment(), **(given or {})}, cwd=tmp_path, timeout=60, **more)

    return run


def test_a_call_gets_its_values_and_settings_and_its_streams_are_clean(probe):
    done = probe("--seed", "3", "--overwrite", "--stop", "a")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["rows"] == "rows"
    assert row["dry_run"] is False
    assert row["values"]["overwrite"] is True
    assert row["values"].keys() == {p.name for p in PROBE.params if p.expose_value} - {
        "print_recipe",
        "dry_run",
        "quiet",
        "debug",
    }
    assert row["settings"]["seed"] == 3
    assert row["settings"]["stop"] == ["a"]
    assert not {"overwrite", "dry_run", "debug", "print_recipe"} & row["settings"].keys()
    assert sorted(done.stderr.splitlines()) == [b"a library prints", b"probe: noted"]
    assert json.loads(probe("--dry-run").stdout)["dry_run"] is True
    assert b"noted" not in probe("--quiet").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--no-such"], 2, ["probe: No such option '--no-such'.", "  see probe --help"]),
        (["--seed"], 2, ["probe: Option '--seed' requires an argument.", "  see probe --help"]),
        (["--seed", "\x1b]0;x\x07\ny"], 2, None),
        (["a", "b"], 2, ["probe: Got unexpected extra argument (b)", "  see probe --help"]),
        (["none.jsonl"], 66, ["probe: none.jsonl: No such file or directory", "  check the path"]),
        (["."], 2, ["probe: .: Is a directory", "  a file is expected here"]),
        (["--recipe", "none.yaml"], 66, None),
        (["--recipe", "probe"], 78, None),
        (["--system", "bad"], 65, ["probe: rows:3: bad", "  mend it"]),
        (["--system", "bug"], 70, None),
    ],
)
def test_failures_have_their_codes_and_two_lines(probe, arguments, code, says):
    done = probe(*arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    lines = [line for line in done.stderr.decode().splitlines() if line != "a library prints"]
    assert len(lines) == 2
    assert lines[0].startswith("probe: ")
    assert "\x1b" not in done.stderr.decode()
    if says is not None:
        assert lines == says


def test_debug_shows_the_traceback_before_the_line(probe):
    done = probe("--system", "bug", "--debug")
    assert done.returncode == 70
    assert b"Traceback" in done.stderr
    assert b"Traceback" not in probe("--system", "bug").stderr


def test_a_variable_that_is_wrong_is_named(probe):
    done = probe(given={"TOOLBOX_SEED": "x"})
    assert done.returncode == 2
    assert b"TOOLBOX_SEED in the environment: 'x' is not an integer" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "--schema", "--print-recipe"])
def test_what_is_printed_for_people_and_pipes_fails_as_data_does(probe, flag, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert probe(flag).returncode == 0
    assert probe(flag, shell=">&-").returncode == 0
    with open("/dev/full", "wb") as full:
        done = probe(flag, stdout=full)
    assert done.returncode == 74
    assert done.stderr.startswith(b"probe: No space left on device\n")
    assert len(done.stderr.splitlines()) == 2
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = probe(flag, stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_survived(probe, closed):
    done = probe(shell=closed)
    assert done.returncode == 0
    assert (done.stdout == b"") == (">&-" in closed.split())
    assert (done.stderr == b"") == ("2>&-" in closed)
    assert probe("--system", "bad", shell=closed).returncode == 65


def test_ctrl_c_is_sigint(script):
    child = subprocess.Popen(
        [sys.executable, script, "--system", "wait"], env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert b"ready\n" in iter(child.stderr.readline, b"")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (-signal.SIGINT, b"")
    assert b"Traceback" not in err

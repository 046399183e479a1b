"""The tour: its runner and its page on made-up steps, its own files, and (slow) the whole of it in a real browser."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from recipes.demo import page, screen
from recipes.demo.__main__ import tour
from recipes.demo.figures import read_figure
from recipes.demo.runner import STDERR, Record, kept, read_record, run_steps
from recipes.demo.step import Figure, Picture, Step, choose, read_step, read_steps
from tests.contract.commands import METHODS
from tests.demo.chromium import Chromium
from tests.server import ROOT, environment
from toolbox.shell.errors import BadData, BadRecipe, CannotCreate, MissingInput, UsageProblem

MAIN = {
    "coca-refactor", "satimp-unlearn", "gru-unlearn", "lwi-fuse", "dull-train", "lit-tune", "longer-train",
    "lot-prompt", "landscape-plot", "legit-target",
}  # fmt: skip
EVIL = '<script>alert(1)</script> & "quotes"'


def png() -> bytes:
    """A picture of one grey dot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b"")


DRAW = f'echo {base64.b64encode(png()).decode()} | base64 -d > "$out/dot.png"\n'


def step(name: str, run: str, *, needs: list[str] | None = None, limit: float = 60) -> Step:
    """A step that shows one figure and one dot."""
    return Step(
        name=name, command=f"{name}-go", title=f"The {name}", idea=EVIL, data="none", look="Look.", docs="docs/x.md",
        run=run, figures=[Figure(label="a share", file="out.jsonl", value="right", of="all")],
        picture=Picture(file="dot.png", alt="A dot."), outputs={"out.jsonl": "a line"}, needs=needs or [], limit=limit,
    )  # fmt: skip


GOOD = DRAW + """echo '{"right": 6, "all": 8}' | tee "$out/out.jsonl"\n"""


# -- figures ----------------------------------------------------------------------------------------------------------
def shown(folder: Path, **words: str) -> str:
    return read_figure(Figure(**{"label": "x", "file": "f.jsonl", **words}), folder).text


def test_figures_are_read_from_the_last_line_that_fits(tmp_path):
    lines = [
        {"event": "step", "loss": 3.25},
        {"event": "step", "loss": 0.5},
        {"event": "done", "after": {"es": 0.25, "es_interval": [0.2, 0.31]}, "series": [1, 0.75], "n": 1500,
         "empty": None, "rate": {"estimate": 0.5, "low": None, "high": None, "n": 1}, "ok": True,
         "said": "\x1b[31mhello\x1b[0m",
         "dotted.key": 7},
    ]  # fmt: skip
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shown(tmp_path, where={"event": "step"}, value="loss") == ".50"
    assert shown(tmp_path, value="after.es", interval="after.es_interval") == ".25 [.20, .31]"
    assert shown(tmp_path, value="series.-1") == ".75"
    assert shown(tmp_path, value="n") == "1,500"
    assert shown(tmp_path, value="empty") == "not determined"
    assert shown(tmp_path, value="rate") == ".50 [n/a]"
    assert shown(tmp_path, value="ok") == "yes"
    assert shown(tmp_path, value="said") == "hello"
    assert shown(tmp_path, value="dotted.key") == "7"


def test_a_file_of_one_object_and_a_count_with_wilsons_interval(tmp_path):
    from toolbox.stats import wilson

    (tmp_path / "f.jsonl").write_text(json.dumps({"right": 6, "all": 8}, indent=2))
    found = read_figure(Figure(label="x", file="f.jsonl", value="right", of="all"), tmp_path)
    assert (found.text, found.n) == (str(wilson(6, 8)), "8")


@pytest.mark.parametrize(("text", "words", "error", "said"), [
    (None, {"value": "a"}, MissingInput, "not there"),
    ('{"a": 1}\n', {"value": "b"}, BadData, "has no b"),
    ('{"a": 1}\n', {"value": "a.b.0"}, BadData, "has no a.b.0"),
    ('{"a": [1]}\n', {"value": "a.3"}, BadData, "has no a.3"),
    ('{"a": 1}\n', {"value": "a", "where": {"a": 2}}, BadData, "no line with a 2"),
    ("nonsense\n", {"value": "a"}, BadData, "not JSON"),
    ('{"a": [1]}\n', {"value": "a"}, BadData, "no figure"),
    ('{"a": 3, "b": 2}\n', {"value": "a", "of": "b"}, BadData, "3 of 2"),
])  # fmt: skip
def test_a_figure_that_is_not_there_is_said(tmp_path, text, words, error, said):
    if text is not None:
        (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(error, match=said):
        shown(tmp_path, **words)


# -- the runner -------------------------------------------------------------------------------------------------------
def test_a_failed_step_stops_nothing_but_what_needs_it(tmp_path):
    steps = [
        step("first", "echo working >&2; echo 'it: is broken' >&2; echo '  mend it' >&2; exit 65"),
        step("second", GOOD, needs=["first"]),
        step("third", GOOD),
        step("fourth", GOOD + 'cat "$third/out.jsonl"\n', needs=["third"]),
        step("empty", 'touch "$out/out.jsonl"; ' + DRAW),
        step("silent", "exit 3"),
        step("bare", "true"),
        step("pipe", 'false | cat > "$out/out.jsonl"'),
    ]
    ended = {one.step.name: one for one in run_steps(steps, tmp_path / "a b")}
    assert {name: one.status for name, one in ended.items()} == {
        "first": "failed", "second": "skipped", "third": "done", "fourth": "done", "empty": "failed",
        "silent": "failed", "bare": "failed", "pipe": "failed",
    }  # fmt: skip
    assert ended["first"].why == "it: is broken; mend it"
    assert ended["second"].why == "needs first, which failed"
    assert "out.jsonl: is empty" in ended["empty"].why
    assert ended["silent"].why == "it ended with 3 and said nothing"
    assert ended["bare"].why == "it ended well but did not write dot.png, out.jsonl"
    assert ended["third"].figures[0].text == ".75 [.41, .93]"
    assert (tmp_path / "a b/fourth/stdout.txt").read_text().count("right") == 2


def test_what_is_done_is_kept_until_its_script_or_what_it_needs_changes(tmp_path):
    steps = [step("first", GOOD), step("second", GOOD, needs=["first"])]

    def states(chosen: list[Step], **words: bool) -> list[bool]:
        return [one.kept for one in run_steps(chosen, tmp_path, **words)]

    assert states(steps) == [False, False]
    assert states(steps) == [True, True]
    assert states(steps, fresh=True) == [False, False]
    assert states([steps[0], step("second", GOOD + "true\n", needs=["first"])]) == [True, False]
    assert states([step("first", GOOD + "true\n"), step("second", GOOD + "true\n", needs=["first"])]) == [False, False]
    (tmp_path / "second/dot.png").unlink()
    assert kept(step("second", GOOD + "true\n", needs=["first"]), tmp_path) is None


def test_a_step_that_was_interrupted_begins_anew_and_a_strangers_folder_is_left_alone(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first/step.json").write_text(json.dumps({"name": "first", "digest": "", "status": "running"}))
    (tmp_path / "first/half").touch()
    assert [one.status for one in run_steps([step("first", GOOD)], tmp_path)] == ["done"]
    assert not (tmp_path / "first/half").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    with pytest.raises(CannotCreate, match="not made by the tour"):
        list(run_steps([step("mine", GOOD)], tmp_path))
    assert (tmp_path / "mine/precious").exists()


def test_a_step_that_hangs_is_ended_with_all_its_processes(tmp_path):
    """One that ends at once, and one that needs its time to put things away."""
    tidy = "trap 'sleep .4; echo tidy; exit' TERM; while :; do sleep .05; done"
    run = f'sleep 1000 & echo $! > "$out/pid"; bash -c "{tidy}" > "$out/tidy"\n'
    (one,) = run_steps([step("hangs", run, limit=1)], tmp_path)
    assert one.why == "stopped: not done after 1 s"
    assert (tmp_path / "hangs/tidy").read_text() == "tidy\n"
    status = Path(f"/proc/{(tmp_path / 'hangs/pid').read_text().strip()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    record = read_record(tmp_path / "hangs")
    assert isinstance(record, Record)
    assert record.status == "failed"


# -- the files of the steps -------------------------------------------------------------------------------------------
def test_every_method_has_one_step_with_its_main_command_in_a_pipe():
    steps = read_steps()
    assert {one.command for one in steps if one.method} == MAIN
    assert len(steps) == len({one.name for one in steps}) == len(MAIN) + 1
    for one in steps:
        assert re.search(rf"(^|\s){one.command} ", one.run), one.name
        assert "|" in one.run, one.name
        assert (ROOT / one.docs).is_file()
        assert len(one.figures) >= 3
        assert not re.search(r"shared|/work|https?:|\bjq\b|\bcurl\b", one.run), one.name
        for path in re.findall(r"recipes/[\w./-]+", one.run):
            assert (ROOT / path).exists(), path
        checked = subprocess.run(["bash", "-n", "-c", one.run], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    assert {one.name for one in steps} - {"taught"} >= {name for name in METHODS if "-" not in name} - {"lm"}


def test_steps_are_chosen_by_method_or_command_with_what_they_need():
    steps = read_steps()
    assert choose(steps, []) == steps
    assert [one.name for one in choose(steps, ["gru"])] == ["taught", "gru"]
    assert [one.name for one in choose(steps, ["lwi-fuse"])] == ["lwi"]
    with pytest.raises(UsageProblem, match="called lvi"):
        choose(steps, ["lvi"])


def test_a_file_that_is_no_step_is_refused(tmp_path):
    (tmp_path / "0.yaml").write_text("name: x\ncolour: red\n")
    with pytest.raises(BadRecipe, match="colour"):
        read_step(tmp_path / "0.yaml")


# -- the page and the table -------------------------------------------------------------------------------------------
def made_up(root: Path) -> int:
    steps = [step("first", GOOD), step("second", f"echo '{EVIL}' >&2; exit 1"), step("third", GOOD)]
    return tour(steps, steps[:2], root)


def test_the_page_holds_everything_and_loads_nothing(tmp_path, capsys):
    assert made_up(tmp_path / "out") == 1
    text = (tmp_path / "out/index.html").read_text()
    assert "<script" not in text
    assert text.count(EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")) == 5
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy[1]
    assert re.findall(r'<img src="([^;]+);base64', text) == ["data:image/png"]
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text)
    assert ".75 [.41, .93]" in text
    assert 'href="first/out.jsonl"' in text
    assert f'href="second/{STDERR}"' in text
    assert "make demo METHOD=third" in text
    printed = capsys.readouterr()
    assert ".75 [.41, .93]" in printed.out
    assert "alert(1)" in printed.out
    assert "1 of 2 steps done" in printed.err
    assert "[ 1/2] ✓ first-go" in printed.err


def test_two_tours_do_not_run_in_one_place(tmp_path):
    from toolbox.shell.atomic import try_lock

    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.lock").open("w") as handle:
        assert try_lock(handle.fileno())
        with pytest.raises(CannotCreate, match="another tour"):
            made_up(tmp_path / "out")


def test_a_checklist_on_a_terminal_ends_with_every_mark(tmp_path):
    import io

    from rich.console import Console

    steps = [step("first", GOOD), step("second", "exit 1")]
    stream = io.StringIO()
    with screen.Checklist(steps, Console(file=stream, force_terminal=True, width=100)) as checklist:
        for outcome in run_steps(steps, tmp_path, watch=checklist.running):
            checklist.ended(outcome)
    assert "✓" in stream.getvalue()
    assert "✗" in stream.getvalue()


def test_pictures_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    with pytest.raises(BadData, match="not a picture"):
        page.embed(tmp_path / "a.png")
    (tmp_path / "a.svg").write_text('<svg width="504pt" height="252pt" xmlns="http://www.w3.org/2000/svg"/>')
    image = page.embed(tmp_path / "a.svg")
    assert (image.width, image.height) == (672, 336)


# -- in a browser, and the whole --------------------------------------------------------------------------------------
READABLE = """(() => {
  const small = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    if (!walker.currentNode.textContent.trim() || !box.width) continue;
    if (parseFloat(getComputedStyle(element).fontSize) < 12) small.push(element.outerHTML.slice(0, 80));
  }
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest("figure")
    && e.getBoundingClientRect().right > innerWidth + .5).map(e => e.outerHTML.slice(0, 80));
  const images = [...document.images].map(i => ({
    natural: i.naturalWidth, width: i.getBoundingClientRect().width, height: i.getBoundingClientRect().height,
    alt: i.alt, shown: i.checkVisibility()}));
  return {small, wide, images, overflow: document.documentElement.scrollWidth - innerWidth};
})()"""


def look_at(index: Path, folder: Path, pictures: int) -> None:
    """No complaint, nothing loaded from elsewhere, every picture visible, readable and not too wide; as screenshots."""
    with Chromium(folder / "profile") as browser:
        for width, dark in ((1280, False), (390, False), (1280, True)):
            browser.open(index.resolve().as_uri(), width, dark=dark)
            assert browser.complaints() == []
            assert {url.split(":")[0] for url in browser.requests()} <= {"file", "data"}
            found = browser.ask(READABLE)
            assert (found["small"], found["wide"], found["overflow"]) == ([], [], 0)
            assert len(found["images"]) == pictures
            for image in found["images"]:
                assert image["natural"] > 0
                assert min(image["width"], image["height"]) > 0
                assert image["shown"]
                assert image["alt"]
            browser.screenshot(folder / f"page-{width}{'-dark' * dark}.png")


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    made_up(tmp_path / "out")
    look_at(tmp_path / "out/index.html", tmp_path, pictures=1)


@pytest.mark.slow
def test_the_browser_would_notice(tmp_path):
    """A page with what the checks are for: a script, a picture from elsewhere, small print, a thing too wide."""
    (tmp_path / "bad.html").write_text(
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><script>1</script>"
        "<img src=http://127.0.0.1:9/a.png alt=a width=900 height=9><p><font size=1>x</font>"
    )
    with Chromium(tmp_path / "profile") as browser:
        browser.open((tmp_path / "bad.html").as_uri(), 390)
        found = browser.ask(READABLE)
        assert len(browser.complaints()) >= 2
        assert found["wide"]
        assert found["small"]
        assert found["overflow"] > 0
        assert found["images"][0]["natural"] == 0


@pytest.mark.slow
def test_the_whole_tour(tmp_path):
    """Every method once, within the budget (in CPU seconds, which say more on a busy machine), and the page of it."""
    out = tmp_path / "demo"
    env = {**environment(), "OMP_NUM_THREADS": "2", "TOOLBOX_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "recipes.demo", "--out", out], cwd=ROOT, env=env,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = read_steps()
    records = [json.loads((out / one.name / "step.json").read_text()) for one in steps]
    assert all(one["status"] == "done" for one in records)
    assert max(one["cpu_seconds"] for one in records) < 150
    assert sum(one["cpu_seconds"] for one in records) < 840  # twelve minutes, in which two cores count for 1.2
    assert all(figure.label in (out / "index.html").read_text() for one in steps for figure in one.figures if "'" not in
               figure.label and "<" not in figure.label)  # fmt: skip
    look_at(out / "index.html", tmp_path, pictures=len(steps))
    again = subprocess.run([sys.executable, "-m", "recipes.demo", "--out", out], cwd=ROOT, env=env,
                           capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert again.returncode == 0
    assert again.stderr.count("kept") == len(steps)

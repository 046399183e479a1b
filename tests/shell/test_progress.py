"""People see notes, tables and progress on stderr, from rank 0, and nothing in them can move their terminal."""

import os
import subprocess
import sys

import pytest

from tests.server import environment
from toolbox.shell import progress
from toolbox.shell.progress import Reporter

HOSTILE = "a\x1b[31m\x1b]0;owned\x07b\n\u202ec"


def ranked(monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))


def test_notes_and_warnings_are_clean_lines_on_stderr(capfd):
    reporter = Reporter("lm-tune")
    reporter.note(HOSTILE)
    reporter.warn(HOSTILE)
    assert capfd.readouterr() == ("", "lm-tune: ab c\nlm-tune: warning: ab c\n")


def test_quiet_keeps_warnings(capfd):
    reporter = Reporter("lm-tune", quiet=True)
    reporter.note("note")
    reporter.show("table")
    with reporter.progress("row", 3) as bar:
        bar.advance(3)
    reporter.warn("careful")
    assert capfd.readouterr() == ("", "lm-tune: warning: careful\n")


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_say_nothing_at_all(rank, monkeypatch, capfd):
    ranked(monkeypatch, rank)
    reporter = Reporter("lm-tune")
    reporter.note("note")
    reporter.warn("careful")
    reporter.show("table")
    assert capfd.readouterr() == ("", "")


def test_rank_0_speaks(monkeypatch, capfd):
    ranked(monkeypatch, 0)
    Reporter("lm-tune").warn("careful")
    assert capfd.readouterr().err == "lm-tune: warning: careful\n"


# --- shown things ---------------------------------------------------------------------------------------------------


def test_texts_are_shown_line_by_line_without_escapes_and_markup(capfd):
    Reporter("lm-tune").show("one \x1b[31m[bold]two[/red]\x1b]0;owned\x07 :smile:\nthree \x9b2J\u202efour")
    assert capfd.readouterr() == ("", "one [bold]two[/red] :smile:\nthree four\n")


def test_tables_are_wide_in_logs_and_clean(capfd):
    from rich.table import Table

    table = Table("set", "value", title="before \x1b[2Jafter")
    table.add_row("x" * 60 + "\x1b]0;owned\x07", "[red]" + "y" * 30)
    Reporter("lm-tune").show(table)
    said = capfd.readouterr().err
    assert "x" * 60 in said
    assert "[red]" + "y" * 30 in said
    assert "before after" in said
    assert "\x1b" not in said
    assert "\x07" not in said


# --- progress without a terminal ------------------------------------------------------------------------------------


def test_a_plain_line_now_and_then(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Reporter("lm-tune").progress("step", 100) as bar:
        for step in range(100):
            now[0] += 1
            bar.advance(1, f"loss {step}\x1b[31m")
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"lm-tune: step {n}/100 loss {n - 1}" for n in (15, 30, 45, 60, 75, 90)]


def test_a_short_run_shows_no_progress_and_an_unknown_end_no_total(monkeypatch, capfd):
    with Reporter("lm-tune").progress("step", 3) as bar:
        bar.advance(3)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "_PLAIN_EVERY", 0)
    with Reporter("lm-tune").progress("row", None) as bar:
        bar.advance()
        bar.advance(2)
    assert capfd.readouterr().err == "lm-tune: row 1\nlm-tune: row 3\n"


# --- progress on a terminal -----------------------------------------------------------------------------------------


def on_terminal(code):
    """What a terminal is sent by ``code``, and stdout."""
    leader, terminal = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", "from toolbox.shell.progress import Reporter\n" + code],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal,
        env={**environment(), "TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(terminal)
    sent = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # EIO: the last writer has gone
            break
        if not chunk:
            break
        sent += chunk
    out = child.stdout.read()
    child.stdout.close()
    assert child.wait(30) == 0, sent
    os.close(leader)
    return sent.decode(), out


def test_a_bar_with_hostile_details_and_notes_above_it():
    sent, out = on_terminal(
        "reporter = Reporter('lm-tune')\n"
        "with reporter.progress('step [/x]', 4) as bar:\n"
        "    for step in range(4):\n"
        "        bar.advance(1, '[/red] loss \\x1b]0;owned\\x07 0.5\\x1b[31m')\n"
        "    reporter.note('noted [/red]')\n"
        "    import time; time.sleep(0.3)\n"
    )
    assert out == b""
    for text in ("step [/x]", "4/4", "[/red] loss  0.5", "lm-tune: noted [/red]"):
        assert text in sent
    assert "owned" not in sent
    assert "\x1b[?25h" in sent  # the cursor is given back


def test_a_bar_is_cleared_and_the_cursor_given_back_when_the_work_fails():
    sent, _ = on_terminal(
        "try:\n"
        "    with Reporter('lm-tune').progress('step', 4) as bar:\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    print('after', file=__import__('sys').stderr)\n"
    )
    assert sent.rstrip().endswith("after")
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")

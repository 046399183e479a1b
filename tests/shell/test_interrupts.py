"""Signals as a wish to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from toolbox.shell import interrupts
from toolbox.shell.interrupts import Interrupts

AGAIN = """
import signal, time
from toolbox.shell import interrupts
interrupts._SAME_WISH = 0.05
wish = interrupts.Interrupts()
with wish.heard():
    signal.raise_signal(signal.{first})
    signal.raise_signal(signal.{first})  # at once: an echo
    print("asked", wish.asked, flush=True)
    time.sleep(0.1)
    signal.raise_signal(signal.{second})
    print("not reached", flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_a_wish_and_handlers_come_back(signum):
    before = signal.getsignal(signum)
    wish = Interrupts()
    with wish.heard():
        assert not wish.asked
        signal.raise_signal(signum)
        signal.raise_signal(signum)
        assert wish.asked
    assert signal.getsignal(signum) is before
    assert wish.asked


def test_handlers_come_back_behind_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupts().heard():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM")])
def test_the_second_ends_the_process(first, second):
    done = subprocess.run(
        [sys.executable, "-c", AGAIN.format(first=first, second=second)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-getattr(signal, second), "asked True\n")


def test_an_echo_is_measured_from_the_first(monkeypatch):
    """Echoes do not put off the moment from which a signal is a second wish."""
    monkeypatch.setattr(interrupts, "_SAME_WISH", 60)
    wish = Interrupts()
    with wish.heard():
        signal.raise_signal(signal.SIGTERM)
        since = wish._since
        time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)
        assert wish._since == since

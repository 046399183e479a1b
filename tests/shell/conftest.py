"""A usual umask, and processes to be killed."""

import os
import signal
import subprocess
import sys

import pytest

from tests.server import ROOT


@pytest.fixture
def umask_022():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def child(tmp_path):
    """Start a Python process that runs ``code``; ``wait_for_line`` returns once it has printed a line."""
    started = []

    class Child:
        def __init__(self, code):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            started.append(self.process)

        def wait_for_line(self):
            line = self.process.stdout.readline().strip()
            if not line:
                raise AssertionError(self.process.communicate()[1])
            return line

        def kill(self):
            self.process.send_signal(signal.SIGKILL)
            assert self.process.wait() == -signal.SIGKILL

        def finish(self):
            out, err = self.process.communicate(timeout=30)
            return self.process.returncode, out, err

    yield Child
    for process in started:
        process.kill()
        process.communicate()

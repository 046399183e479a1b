"""Executables that hand their call to the fork server: scripts with many commands import torch once, not once each.

Each is a file named like the command; it passes on its arguments, directory, environment and the very file descriptors
0, 1 and 2, so pipes and redirections are those of the shell, and ends with the command's exit status.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.server import ROOT

_SCRIPT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect({path!r})
call = dict(command=os.path.basename(sys.argv[0]), arguments=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd())
socket.send_fds(server, [json.dumps(call).encode()], [0, 1, 2])
for fd in (0, 1):
    os.close(fd)
answers = server.makefile()
child = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(child, number))
code = int(answers.readline() or 1)
os._exit(128 - code if code < 0 else code)
"""


def write_shims(folder: Path, path: str) -> Path:
    """One executable a command of ``bin/``, for the server that listens at ``path``; returns the folder."""
    folder.mkdir()
    for command in (ROOT / "bin").iterdir():
        shim = folder / command.name
        shim.write_text(_SCRIPT.format(python=sys.executable, path=path))
        shim.chmod(0o755)
    return folder

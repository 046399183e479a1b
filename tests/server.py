"""A fork server for commands: torch is imported once, each call is a fork with real pipes and a real exit status.

Run as ``python -m tests.server SOCKET``; ``Client`` is the test's side.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """How a call ended; ``code`` is what a shell would see (128 + signal when killed)."""

    code: int
    out: bytes
    err: str
    seconds: float = 0.0

    @property
    def rows(self) -> list[dict]:
        """stdout as JSON lines: each must be one object, nothing else may be there."""
        return [json.loads(line) for line in self.out.decode().splitlines()]


def _preload() -> None:
    """Import what commands import, so that a fork has it, and keep the collector from copying those pages in each."""
    for name in ("torch", "transformers", "accelerate", "safetensors.torch", "sklearn.linear_model", "sklearn.svm"):
        importlib.import_module(name)
    import torch
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM  # noqa: F401
    from transformers.models.clip import image_processing_pil_clip, modeling_clip  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.llava import modeling_llava, processing_llava  # noqa: F401

    import toolbox

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(toolbox.__path__, "toolbox."):
        with contextlib.suppress(ImportError):  # an extra that is not installed here
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()


def _serve(path: str) -> None:
    _preload()
    calls: dict[int, socket.socket] = {}
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            ready, _, _ = select.select([listener, wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 4096)
                _answer_ended(calls)
            if listener in ready:
                connection, _ = listener.accept()
                _start(connection, calls)


def _answer_ended(calls: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            with calls.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _start(connection: socket.socket, calls: dict[int, socket.socket]) -> None:
    message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if not fds:
        connection.close()
        return
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        os.closerange(3, 1024)
        _become(json.loads(message))
    for fd in fds:
        os.close(fd)
    calls[child] = connection
    with contextlib.suppress(OSError):
        connection.sendall(f"{child}\n".encode())


def _become(call: dict) -> None:
    os.environ.clear()
    os.environ.update(call["env"])
    os.chdir(call["cwd"])
    if call.get("file_size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (call["file_size"], call["file_size"]))
    sys.argv = [call["command"], *call["arguments"]]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        importlib.import_module(f"toolbox.commands.{call['command'].replace('-', '_')}").main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


class Running:
    """A started call."""

    def __init__(self, connection: socket.socket) -> None:
        self._reader = connection.makefile("r")
        self._connection = connection
        self.pid = int(self._reader.readline())

    def wait(self) -> int:
        """The exit status as a shell reports it."""
        code = int(self._reader.readline())
        self._reader.close()
        self._connection.close()
        return 128 - code if code < 0 else code


class Client:
    """Starts the server and runs commands through it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.path = f"{self._directory.name}/socket"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.server", self.path], cwd=ROOT, stdin=subprocess.DEVNULL, env=environment()
        )
        deadline = time.monotonic() + 600
        while not os.path.exists(self.path):
            if self.server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the fork server did not start")
            time.sleep(0.05)

    def start(
        self, command: str, *arguments: object, fds: tuple[int, int, int], env: dict[str, str] | None = None,
        cwd: Path | str = ROOT, file_size: int | None = None,
    ) -> Running:  # fmt: skip
        """Start a command on the given stdin, stdout and stderr."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self.path)
        call = {
            "command": command,
            "arguments": [str(argument) for argument in arguments],
            "env": {**environment(), **(env or {})},
            "cwd": str(cwd),
            "file_size": file_size,
        }
        socket.send_fds(connection, [json.dumps(call).encode()], list(fds))
        return Running(connection)

    def __call__(
        self,
        command: str,
        *arguments: object,
        stdin: bytes | str | None = b"",
        env: dict[str, str] | None = None,
        cwd: Path | str = ROOT,
        file_size: int | None = None,
    ) -> Result:
        """Run a command to its end; ``stdin`` comes through a pipe, ``file_size`` bounds the files it writes."""
        data = stdin.encode() if isinstance(stdin, str) else stdin or b""
        began = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            read_end, write_end = os.pipe()
            running = self.start(command, *arguments, fds=(read_end, out.fileno(), err.fileno()), env=env, cwd=cwd,
                                 file_size=file_size)  # fmt: skip
            os.close(read_end)
            with contextlib.suppress(BrokenPipeError), open(write_end, "wb") as feed:
                feed.write(data)
            code = running.wait()
            out.seek(0)
            err.seek(0)
            return Result(code, out.read(), err.read().decode(), time.monotonic() - began)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        self._directory.cleanup()


def environment() -> dict[str, str]:
    """The test environment without anything that would change a command's options."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TOOLBOX_", "ACCELERATE_"))}
    return {
        **kept,
        **({"TOOLBOX_CACHE": os.environ["TOOLBOX_CACHE"]} if "TOOLBOX_CACHE" in os.environ else {}),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TOOLBOX_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '')}",
    }


def real_sh(script: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a script of the installed executables: a new interpreter each, which the fixture ``sh`` saves."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], cwd=cwd, env={**environment(), **env}, capture_output=True,
        text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve(sys.argv[1])

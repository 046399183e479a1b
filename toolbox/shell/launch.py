"""How a command becomes several processes: alone, ``-j N`` / ``--accelerate FILE``, or under the user's own launcher.

With ``-j`` accelerate's launcher is called in this process, because as a command of its own it turns every worker's
exit code into 1; here the first failing worker's code is passed on.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from toolbox.shell.errors import AlreadyReported, MissingInput, TryAgain, Unavailable, UsageProblem

_PR_SET_PDEATHSIG = 1
WORKER = "TOOLBOX_WORKER"
"""Environment variable that marks a process started by ``launch``; holds the number of processes asked for."""


def under_launcher() -> bool:
    """Whether this process is one of several already (ours or the user's own launcher).

    ACCELERATE_* alone says nothing: people export ACCELERATE_USE_CPU and the like.
    """
    return "LOCAL_RANK" in os.environ or WORKER in os.environ


def check_processes(wanted: int | None) -> None:
    """Raise UsageProblem when ``wanted`` (-j) differs from what the user's own launcher has started."""
    here = os.environ.get("WORLD_SIZE")
    if (
        wanted is not None
        and WORKER not in os.environ
        and "LOCAL_RANK" in os.environ
        and here not in (None, str(wanted))
    ):
        raise UsageProblem(f"-j {wanted} under a launcher that has started {here} processes", "leave -j out")


def _parent_is_launcher() -> bool:
    """Whether the parent is ``accelerate launch``: with one process it sets ACCELERATE_* and no rank."""
    if not any(name.startswith("ACCELERATE_") for name in os.environ):
        return False
    try:
        return b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return False


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies (Linux): launchers leave orphans otherwise."""
    if not sys.platform.startswith("linux") or not (under_launcher() or _parent_is_launcher()):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        sys.exit(143)


def processors() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_environment(threads: int | None) -> None:
    """Set, before any heavy import, what keeps numerical libraries quiet and off each other's cores.

    ``threads`` None gives each local process an equal share of the cores.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = threads or max(1, processors() // local)
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ["MKL_NUM_THREADS"] = str(count)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve their neighbours on shared cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _configuration(processes: int | None) -> str:
    """An accelerate configuration for this machine: GPUs if there are any, gloo on the CPU otherwise."""
    gpus = importlib.import_module("torch").cuda.device_count()
    if gpus and processes and processes > gpus:
        raise Unavailable(f"-j {processes}: this machine has {gpus} GPUs", "ask for fewer processes")
    return (
        "compute_environment: LOCAL_MACHINE\n"
        "distributed_type: MULTI_GPU\n"
        f"num_processes: {processes or gpus or 1}\n"
        "num_machines: 1\n"
        "machine_rank: 0\n"
        "main_process_port: 0\n"
        "mixed_precision: 'no'\n"
        f"use_cpu: {'false' if gpus else 'true'}\n"
        "gpu_ids: all\n"
    )


def _read_configuration(path: str) -> tuple[str, int | None]:
    """The text of the user's accelerate configuration and the number of processes it asks for."""
    import yaml

    if not Path(path).is_file():
        raise MissingInput(f"{path}: no such accelerate configuration", "recipes/accelerate/ has three to start from")
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UsageProblem(f"{where}: not valid YAML: {what}") from None
    if not isinstance(settings, dict):
        raise UsageProblem(f"{path}: not an accelerate configuration", "recipes/accelerate/ has three to start from")
    processes = settings.get("num_processes")
    return text, processes if isinstance(processes, int) else None


def launch(command: str, arguments: Sequence[str], processes: int | None, config: str | None) -> int:
    """Run ``command`` with ``arguments`` in ``processes`` workers; returns the exit code.

    ``config`` is an accelerate configuration file; without one it is made for this machine. The workers run
    ``python -m toolbox.shell.worker`` and share this process's stdin, stdout and stderr (rank 0 alone uses them).
    """
    text, configured = (None, None) if config is None else _read_configuration(config)
    quiet_environment(None)
    os.environ.pop("OMP_NUM_THREADS", None)  # each worker sets its own share
    accelerate_launch = importlib.import_module("accelerate.commands.launch")
    elastic = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    importlib.import_module("torch.distributed.run")
    for name in list(logging.root.manager.loggerDict):  # each of them has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    text = text or _configuration(processes)
    _workers_find_us()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as handle:
        handle.write(text)
        handle.flush()
        flags = ["--config_file", handle.name]
        if processes:
            flags += ["--num_processes", str(processes)]
        flags += ["--module", "toolbox.shell.worker", command, *arguments]
        parsed = accelerate_launch.launch_command_parser().parse_args(flags)
        os.environ[WORKER] = str(processes or configured or "")
        try:
            accelerate_launch.launch_command(parsed)
        except elastic.ChildFailedError as error:
            return _exit_code(error.get_first_failure()[1].exitcode)
        except SystemExit as error:  # accelerate's one-process launcher
            return _exit_code(error.code if isinstance(error.code, int) else 1)
        except subprocess.CalledProcessError as error:  # its other way of saying so
            return _exit_code(error.returncode)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UsageProblem(f"accelerate refuses this launch: {error}", "check the configuration file") from None
        except Exception as error:
            if type(error).__name__ == "SignalException":
                return 128 + int(getattr(error, "sigval", signal.SIGTERM))
            what = f"the launcher failed: {type(error).__name__}: {error}"
            raise TryAgain(what, "run again, or without -j") from None
        return 0


def _workers_find_us() -> None:
    """Let worker interpreters import this very package, not one that is installed or lies where the user stands.

    ``python -m`` looks into the working directory first; an executable of ``bin/`` runs the copy beside it.
    """
    root = Path(__file__).resolve().parent.parent.parent
    os.environ["PYTHONSAFEPATH"] = "1"
    if str(root) != sysconfig.get_path("purelib"):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def run_workers(command: str, arguments: Sequence[str], processes: int | None, config: str | None) -> None:
    """``launch`` and leave with its code; what was wrong has been said by the worker that failed."""
    code = launch(command, arguments, processes, config)
    if code:
        raise AlreadyReported(code)

"""A command becomes several processes only when asked to, passes their codes on, and leaves no orphans."""

import os
import select
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.server import ROOT, environment
from toolbox.shell import launch
from toolbox.shell.errors import AlreadyReported, MissingInput, TryAgain, Unavailable, UsageProblem


@pytest.fixture
def variables(monkeypatch):
    """An environment without anybody's launcher, to be changed by the test and by what it tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TOOLBOX_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        kept.pop(name, None)
    monkeypatch.setattr(os, "environ", kept)
    return kept


# --- where are we? --------------------------------------------------------------------------------------------------


def test_a_launcher_is_known_by_the_ranks_it_gives(variables):
    assert not launch.under_launcher()
    variables["ACCELERATE_USE_CPU"] = "true"  # people export it; -j must still start processes
    assert not launch.under_launcher()
    variables["LOCAL_RANK"] = "0"
    assert launch.under_launcher()
    del variables["LOCAL_RANK"]
    variables[launch.WORKER] = ""
    assert launch.under_launcher()


def test_a_j_that_the_user_s_launcher_did_not_heed_is_a_usage_error(variables):
    launch.check_processes(4)
    variables.update(LOCAL_RANK="1", WORLD_SIZE="2")
    launch.check_processes(None)
    launch.check_processes(2)
    with pytest.raises(UsageProblem, match="-j 4 under a launcher that has started 2 processes"):
        launch.check_processes(4)
    variables[launch.WORKER] = "4"  # our own workers are counted where they meet
    launch.check_processes(4)


def test_cores_are_shared_among_local_processes(variables, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda: 8)
    for local, threads, expected in [("1", None, "8"), ("2", None, "4"), ("16", None, "1"), ("2", 3, "3")]:
        variables["LOCAL_WORLD_SIZE"] = local
        launch.quiet_environment(threads)
        assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == expected


def test_what_the_user_has_set_stays_but_threads(variables):
    variables["TRANSFORMERS_VERBOSITY"] = "info"
    launch.quiet_environment(None)
    assert variables["TRANSFORMERS_VERBOSITY"] == "info"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert int(variables["OMP_NUM_THREADS"]) == launch.processors() == len(os.sched_getaffinity(0))


# --- orphans --------------------------------------------------------------------------------------------------------

CHILD = """if True:
    import os, sys, time
    from toolbox.shell.launch import die_with_parent
    die_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)
    """
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize(
    ("given", "word", "dies"),
    [
        ({}, "shell", False),
        ({"LOCAL_RANK": "0"}, "shell", True),
        ({"TOOLBOX_WORKER": "2"}, "shell", True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate", True),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "shell", False),  # exported, and the terminal is closed: nohup must hold
        ({}, "accelerate", False),
    ],
)
def test_a_worker_dies_with_its_launcher_and_a_lone_process_does_not_with_its_shell(given, word, dies):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, word], env={**environment(), **given}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([parent.stdout], [], [], 10 if dies else 0.3)  # the pipe ends with its last holder
    if not ended:
        os.kill(child, signal.SIGKILL)
    parent.stdout.close()
    assert bool(ended) == dies


# --- launching ------------------------------------------------------------------------------------------------------


class ChildFailedError(Exception):
    """As torch reports the first worker that failed."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def get_first_failure(self):
        return 0, types.SimpleNamespace(exitcode=self.code)


class SignalException(Exception):
    """As torch's agent leaves when it is told to."""

    def __init__(self, number):
        super().__init__()
        self.sigval = number


@pytest.fixture
def launched(variables, monkeypatch):
    """Call ``launch`` with an accelerate that notes what it was asked for and ends with ``ending``."""
    seen = types.SimpleNamespace()

    def call(ending=None, processes=2, config=None, gpus=0):
        def launch_command(flags):
            seen.flags, seen.worker = flags, os.environ.get(launch.WORKER)
            seen.path = Path(flags[flags.index("--config_file") + 1])
            seen.text = seen.path.read_text()
            if ending is not None:
                raise ending

        parser = types.SimpleNamespace(parse_args=lambda flags: flags)
        modules = {
            "torch": types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: gpus)),
            "accelerate.commands.launch": types.SimpleNamespace(
                launch_command_parser=lambda: parser, launch_command=launch_command
            ),
            "torch.distributed.run": types.SimpleNamespace(),
            "torch.distributed.elastic.multiprocessing.errors": types.SimpleNamespace(
                ChildFailedError=ChildFailedError
            ),
        }
        monkeypatch.setattr(launch, "importlib", types.SimpleNamespace(import_module=modules.__getitem__))
        variables.pop(launch.WORKER, None)
        return launch.launch("lm-tune", ["--out", "x", "--", "-y"], processes, config)

    call.seen = seen
    return call


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (None, 0),
        (ChildFailedError(65), 65),
        (ChildFailedError(-signal.SIGPIPE), 141),
        (ChildFailedError(-signal.SIGKILL), 137),
        (subprocess.CalledProcessError(75, "x"), 75),  # one process that failed
        (subprocess.CalledProcessError(-signal.SIGTERM, "x"), 143),
        (SystemExit(1), 1),
        (SystemExit("words"), 1),
        (SignalException(signal.SIGINT), 130),
        (SignalException(signal.SIGTERM), 143),
    ],
    ids=repr,
)
def test_the_workers_code_is_passed_on_and_nothing_is_left_behind(launched, ending, code):
    assert launched(ending) == code
    assert not launched.seen.path.exists()


@pytest.mark.parametrize(
    ("ending", "kind"),
    [(ValueError("no such type"), UsageProblem), (TypeError("x"), UsageProblem), (RuntimeError("port"), TryAgain)],
)
def test_a_launcher_that_fails_itself_is_explained(launched, ending, kind):
    with pytest.raises(kind, match=str(ending)):
        launched(ending)
    assert not launched.seen.path.exists()


def test_the_command_line_goes_to_the_workers_as_it_is(launched):
    launched()
    assert launched.seen.flags[2:] == [
        "--num_processes", "2", "--module", "toolbox.shell.worker", "lm-tune", "--out", "x", "--", "-y",
    ]  # fmt: skip
    assert launched.seen.worker == "2"


def test_workers_import_the_package_that_started_them(launched, variables):
    variables["PYTHONPATH"] = "/mine"
    launched()
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/mine"]
    assert os.environ["PYTHONSAFEPATH"] == "1"  # not what lies in the working directory


@pytest.mark.parametrize(
    ("gpus", "processes", "count", "cpu"), [(0, 3, 3, "true"), (4, None, 4, "false"), (4, 2, 2, "false")]
)
def test_a_configuration_is_made_for_this_machine(launched, gpus, processes, count, cpu):
    import yaml

    launched(processes=processes, gpus=gpus)
    made = yaml.safe_load(launched.seen.text)
    assert (made["num_processes"], str(made["use_cpu"]).lower()) == (count, cpu)
    assert made["distributed_type"] == "MULTI_GPU"  # with use_cpu this is gloo on the CPU; MULTI_CPU would start one
    assert made["mixed_precision"] == "no"


def test_more_processes_than_gpus_are_refused_without_a_trace(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Unavailable, match="this machine has 2 GPUs"):
        launched(processes=3, gpus=2)
    assert list(tmp_path.iterdir()) == []


def test_the_user_s_configuration_is_used_as_it_is_and_its_count_is_what_was_asked_for(launched, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\nnum_processes: 8\n")
    launched(processes=None, config=str(path))
    assert launched.seen.text == "# mine\nnum_processes: 8\n"
    assert "--num_processes" not in launched.seen.flags
    assert launched.seen.worker == "8"  # where the processes meet they compare: accelerate may start fewer in silence
    launched(processes=2, config=str(path))
    assert launched.seen.worker == "2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not an accelerate configuration"),
        (b"- a\n", "not an accelerate configuration"),
        (b"a: 1\nb: [\n", "mine.yaml:3: not valid YAML"),
        (b"a: \x00\n", "not valid YAML: special characters"),
        (b"a: \xff\n", "not valid YAML: invalid start byte"),
        (b"a: !!python/object/apply:os.getcwd []\n", "mine.yaml:1: not valid YAML"),
    ],
)
def test_a_configuration_that_is_none_is_a_usage_error(launched, tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(UsageProblem) as failed:
        launched(config=str(path))
    assert says in failed.value.what


def test_a_configuration_that_is_not_there(launched, tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(MissingInput, match="no such accelerate configuration"):
            launched(config=str(path))


def test_a_failed_worker_ends_the_launcher_with_its_code_and_without_words(monkeypatch):
    monkeypatch.setattr(launch, "launch", lambda *a: 65)
    with pytest.raises(AlreadyReported) as left:
        launch.run_workers("lm-tune", [], 2, None)
    assert left.value.exit_code == 65
    monkeypatch.setattr(launch, "launch", lambda *a: 0)
    assert launch.run_workers("lm-tune", [], 2, None) is None


def test_a_worker_is_the_command_of_its_first_argument():
    done = subprocess.run(
        [sys.executable, "-m", "toolbox.shell.worker", "lm-generate", "--no-such-option"],
        env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("lm-generate: No such option")

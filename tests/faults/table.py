"""The faults that every command is put through: how each is provoked, what is promised, of whom, how often.

One table for the tests and for docs/reliability.md. A new command is in it by its case in tests/contract/commands.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click

from tests.contract.commands import CASES, Case
from tests.faults import deaths, endpoints, models, places, recipes, rows
from tests.faults.bench import Bench

ONE_OF_A_KIND = ("lm-generate", "lm-tune", "lot-eval")
"""A filter, a trainer, a summary: what is the same code in all commands is tried with these in the quick tests."""
EVERY_TIME = "every command"


@dataclass(frozen=True)
class Fault:
    """One row: ``check`` provokes it upon a command and yields the name of each try.

    ``tries`` is how many there are a command. ``of`` says which commands it concerns, ``quick`` for which of them it is
    tried each time; the rest are slow tests.
    """

    family: str
    name: str
    promised: str
    check: Callable[[Bench, Case], Iterator[str]]
    tries: int | Callable[[Case], int]
    of: Callable[[Case], bool] = lambda case: True
    quick: tuple[str, ...] | str = ONE_OF_A_KIND

    def cases(self) -> list[Case]:
        """The commands it concerns, by name."""
        return sorted((case for case in CASES.values() if self.of(case)), key=lambda case: case.name)

    def count(self, case: Case) -> int:
        """Tries upon one command."""
        return self.tries if isinstance(self.tries, int) else self.tries(case)

    def is_quick(self, case: Case) -> bool:
        return self.quick == EVERY_TIME or case.name in self.quick


def takes(case: Case, option: str) -> bool:
    """Whether the command has this option."""
    command = importlib.import_module("toolbox.commands." + case.name.replace("-", "_")).main
    return any(option in parameter.opts for parameter in command.params)


def takes_files(case: Case) -> bool:
    """Whether its rows may come from a file that is an argument or stands for stdin among the options."""
    command = importlib.import_module("toolbox.commands." + case.name.replace("-", "_")).main
    return case.fed and (
        any(isinstance(one, click.Argument) for one in command.params) or "-" in case.arguments.__code__.co_consts
    )


def fed(case: Case) -> bool:
    return case.fed


def trainer(case: Case) -> bool:
    return case.trainer


def launches(case: Case) -> bool:
    return takes(case, "--num-processes")


TABLE = (
    Fault("Records", "bytes that are no records: not JSON, not UTF-8, not an object, deep, endless, half compressed",
          "65, file and line in one line, nothing on stdout, at once", rows.malformed, len(rows.MALFORMED), fed),
    Fault("Records", "one bad line among good ones",
          "65 and its line number; `--on-bad skip` leaves it out, `--rejects` keeps it, the rest is as without it",
          rows.named_skipped_and_kept, 2, fed, EVERY_TIME),
    Fault("Records", "a field of another type, size or meaning than expected",
          "the row is taken, or is bad data that is named and can be left out; never our fault, no terminal escape",
          rows.mutated, lambda case: len(rows.mutations(case)), fed),
    Fault("Records", "an array, gzip, zstd, CRLF with a byte-order mark", "the same plan as from plain lines",
          rows.wrapped, 4, fed),
    Fault("Records", "no rows at all", "nothing out, or 65 where rows are needed", rows.nothing, 2, fed),
    Fault("Inputs", "a file that is not there, a directory, an empty name", "66 or 2 with the name",
          places.missing, 4, fed),
    Fault("Inputs", "options that are none, values of another type, a recipe or launch file that is not there",
          "2 or 66 in one line", places.wrong_words, 6),
    Fault("Inputs", "stdin is a terminal", "2 at once, nothing is waited for", places.terminal, 1, fed),
    Fault("Inputs", "two inputs from one stdin", "2 with both names", places.claimed_twice, 1,
          lambda case: case.name in places.TWICE),
    Fault("Inputs", "two processes on one stdin, the wrong one first",
          "rank 0 alone reads; the result is that of one process", deaths.wrong_rank, 1, launches),
    Fault("Streams", "nobody reads stdout", "a filter ends silently (141); what makes a model warns once and finishes",
          places.closed_pipe, 1, quick=EVERY_TIME),
    Fault("Streams", "stdout on a full disk", "74, said once", places.full_stdout, 1, quick=EVERY_TIME),
    Fault("Streams", "stderr on a full disk or closed", "the data come all the same", places.full_stderr, 2),
    Fault("Outputs", "the output exists: finished, a file, somebody's directory",
          "73, what stands there stays; `--overwrite` replaces only what these commands made", places.existing,
          lambda case: 5 if case.trainer else 4, places.makes_directory, ("lm-tune", "longer-prep")),
    Fault("Outputs", "two runs into one output", "the second ends with 73 at once, the first is not disturbed",
          places.two_at_once, lambda case: 3 if case.trainer else 2, places.makes_directory),
    Fault("Disks", "files that may not grow (RLIMIT_FSIZE) at the end", "74, no output", places.full_at_the_end, 1,
          trainer, EVERY_TIME),
    Fault("Disks", "a small disk with little room, at a state or at the end",
          "74, no output; with room and `--resume` the same bytes", places.full_disk, len(places.SHARES),
          places.makes_directory),
    Fault("Ends", "kill -9 at ten random moments, each time begun again",
          "nothing half-done stands; the last run ends with the bytes of an undisturbed one", deaths.killed,
          deaths.MOMENTS, quick=("lm-tune",)),
    Fault("Ends", "SIGINT and SIGTERM, once and twice",
          "75 with the state kept, or the signal's own status; no traceback; the same bytes afterwards",
          deaths.interrupted, 12, quick=("lm-generate",)),
    Fault("Ends", "one of two workers is killed",
          "the launcher ends soon, not with 0, no process is left, nothing half-done stands", deaths.lost_rank, 2,
          launches, ()),
    Fault("Recipes", "traps: bombs, aliases, tags, python objects, tabs, duplicates, unknown keys, wrong types",
          "78 with line and key, nothing is built from it", recipes.traps, len(recipes.TRAPS), quick=EVERY_TIME),
    Fault("Endpoints", "an answer that is busy, broken, slow or none, once",
          "asked again with patience; the result is that of a run without the fault", endpoints.passing,
          len(endpoints.PASSING), endpoints.asks, ()),
    Fault("Endpoints", "the same for ever; no key, no server, another server, a redirect, an endless body",
          "69 (or 65 where it refuses the row), one line, no key in any output, nobody else is asked",
          endpoints.lasting, len(endpoints.LASTING) + 4, endpoints.asks, ("lm-generate",)),
    Fault("Models", "`--model` is not there, a pickle, a folder without one, a name of the hub without a network",
          "66, 65, 66, 69 with its name", models.absent, 4, lambda case: case.model),
    Fault("Models", "a directory that is torn, pickled, of another architecture, or brings code",
          "65 or 66 with its name before anything is made; nothing in it is run", models.damaged, len(models.DAMAGES),
          models.loads),
)  # fmt: skip

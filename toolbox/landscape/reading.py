"""Rows of stdin or a file as paths, for both commands: bad ones are counted, told, and kept for who asks for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

import msgspec

from toolbox.landscape.data import Path, Paths
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import display_name


class ReadOptions(Protocol):
    """The options that decide what is read."""

    @property
    def file(self) -> str: ...
    @property
    def map_fields(self) -> tuple[str, ...]: ...
    @property
    def on_bad(self) -> str: ...
    @property
    def rejects(self) -> str | None: ...


class PathReader:
    """Reads the paths of a call. ``left_out``: ids of paths that turned out bad after they were read."""

    def __init__(self, options: ReadOptions, call: Invocation, limit: int | None = None) -> None:
        self._options, self._call, self._limit = options, call, limit
        self._rejected: list[bytes] = []
        self._records = RecordReader(
            PATH_SHAPES,
            renames=parse_map(options.map_fields),
            on_bad=options.on_bad,
            rejects=(lambda raw, _: self._rejected.append(raw)) if options.rejects is not None else None,
        )
        self.left_out: list[str] = []

    @property
    def skipped(self) -> int:
        """The number of bad rows."""
        return self._records.skipped

    def read(self, paths: Paths) -> Paths:
        """Fill ``paths``. BadData (65) for a bad row, unless those are left out, and where there is no path."""
        taken, records = 0, read_records(self._options.file, self._call.streams, self._records)
        while self._limit is None or taken < self._limit:  # and not one row more is read: the pipe may stay open
            record = next(records, None)
            if record is None:
                break
            try:
                paths.add(record)
                taken += 1
            except BadData as problem:
                self._records.bad(problem, msgspec.json.encode(record.data))
        self.some(paths)
        return paths

    def some(self, paths: Paths) -> None:
        """BadData (65) where ``paths`` is empty."""
        if not paths.paths:
            skipped = f" ({self.skipped} bad rows skipped)" if self.skipped else ""
            advice, file = "give at least one reasoning path", display_name(self._options.file)
            raise BadData(f"is empty: no paths{skipped}", advice, file=file)

    def refuse(self, problem: BadData, path: Path) -> None:
        """A path that turned out bad after it was read: raise, or count it and keep it for the rejects."""
        self._records.bad(problem, msgspec.json.encode(path.record.data))
        self.left_out.append(path.id)

    def leave_strangers(self, paths: Paths, known: Collection[str], file: str) -> None:
        """With ``--on-bad skip``, leave out paths that the features ``file`` does not have, such as those that were too
        long for the model; without it they stay, to be refused. Where all are strangers, it is another file: they stay.
        """
        strangers = [path for path in paths.paths if path.id not in known]
        if self._options.on_bad == "skip" and len(strangers) < len(paths.paths):
            for path in strangers:
                self.refuse(path.record.bad(f"the path {path.id} is not in {file}", None, "$.path_id"), path)
            paths.leave_out(strangers)

    def tell(self, warnings: Iterable[str] = ()) -> None:
        """Say what was left out and ``warnings``; write the rejects where they were asked for, in no dry run."""
        if self.skipped:
            self._call.reporter.warn(f"{self.skipped} bad rows left out")
        if self._options.rejects is not None and not self._call.dry_run:
            write_rejects(self._options.rejects, self._rejected)
        for line in warnings:
            self._call.reporter.warn(line)

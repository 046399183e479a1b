"""landscape-plot: the job. Paths in; features, a map and pictures in a directory out, a line a stage on stdout.

Everything that can be wrong with the call and its rows is found before a model loads; stored features need no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.landscape.data import Paths
from toolbox.landscape.journal import NAME, Contents, Head, Journal, read_journal
from toolbox.landscape.reading import PathReader
from toolbox.landscape.settings import Options, check, check_map, in_output, said_once
from toolbox.models.load import ModelSource, find_model, prepare
from toolbox.shell.command import Invocation
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_file, sha256_file
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.fingerprint import check_fingerprint, option_marks

if TYPE_CHECKING:
    from toolbox.landscape.features import Features, Scoring
    from toolbox.models.chains import Chain

__all__ = ["Options", "check", "run"]

_SCORING = ("dtype", "template", "answer_template", "context", "separator", "split", "drop_answer_thought", "method",
            "compat")  # fmt: skip
"""Options that decide the scores, beside the model, the system turn and the rows."""

_NOT_DECIDING = {
    "file", "features", "model", "system", "map_fields", "out", "overwrite", "resume", "on_bad", "rejects", "limit",
    "threads", "device", "batch_tokens", "trust_remote_code", "given",
}  # fmt: skip
"""Options that do not show in a finished directory, or are known by digests: the rows, the model, the system turn."""


def run(options: Options, call: Invocation) -> None:
    """Score, map, measure and draw the paths of ``options.file``."""
    leader = process_rank() == 0
    with said_once(leader):
        check(options)
    if options.features is not None:
        if leader:  # nothing to share: the first process does it all
            _Run(options, call).from_features()
        return
    with said_once(leader):
        source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    if leader:
        _Run(options, call).with_model(source)
    elif not call.dry_run:
        from toolbox.landscape.scoring import score_paths

        score_paths(options, call, source, None)


class _Run:
    """The part of rank 0."""

    def __init__(self, options: Options, call: Invocation) -> None:
        self.options, self.call, self.reporter = options, call, call.reporter
        self.began = time.time()
        self.processes = 1
        self.reader = PathReader(options, call, options.limit)

    # -- the two ways
    def with_model(self, source: ModelSource) -> None:
        """Score what the journal does not have, then finish."""
        options = self.options
        with self._output() as out:
            paths = self.reader.read(Paths(options.wording, options.facets))
            check_map(options, paths)
            if out is None:
                from toolbox.landscape.dry_run import show_plan

                show_plan(options, self.call, source, paths, self.reader.refuse)
                self._tell(paths)
                return
            prepare(source, self.reporter.note)
            marks = self._marks(paths, source)
            if out.finished:
                self._send_home(source)
                self._repeat(out, marks)
                return
            found = read_journal(out.partial / NAME) if out.resumed else None
            if found is not None:
                check_fingerprint(found.head.marks, marks)
            features = self._features(source, paths, marks, found, out)
            before = 0 if found is None else len(found.scored)
            self._finish(out, paths, features, marks, before)

    def from_features(self) -> None:
        """Map and draw scores that are there already."""
        from toolbox.landscape.stored import stored_features

        options = self.options
        with self._output() as out:
            features, paths = stored_features(options, self.reader)
            check_map(options, paths)
            self._tell(paths)
            if out is None:
                from toolbox.landscape.dry_run import write_plan

                write_plan(self.call, paths, {"features": FilePath(str(options.features)).name})
                return
            marks = {
                "command": self.call.command,
                "features": sha256_file(str(options.features)),
                "data (paths)": paths.digest(),
            }
            if out.finished:
                self._repeat(out, marks)
                return
            self._finish(out, paths, features, marks, len(paths.to_score()))

    # -- reading
    @contextlib.contextmanager
    def _output(self) -> Iterator[OutputDirectory | None]:
        options = self.options
        if self.call.dry_run:
            yield None
            return
        with OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume) as out:
            yield out

    def _tell(self, paths: Paths) -> None:
        """What people should know of the rows; rows that were left out are written where they were asked for."""
        from toolbox.landscape.output import notes, warnings

        self.reader.tell(warnings(paths))
        for line in notes(paths, None if self.options.features is not None else self.options.model):
            self.reporter.note(line)

    # -- scoring
    def _marks(self, paths: Paths, source: ModelSource) -> dict[str, Any]:
        """What a run and its continuation share, by names that a message can use."""
        from toolbox.landscape.encode import model_digest, tokenizer_digest
        from toolbox.landscape.stored import digest_of
        from toolbox.weights.provenance import installed_versions

        options = self.options
        trust = {"trust_remote_code": options.trust_remote_code}
        marks = {"--" + name.replace("_", "-"): getattr(options, name) for name in _SCORING}
        if FilePath(options.template).is_file():
            marks["template (its text)"] = sha256_file(options.template)
        return marks | {
            "command": self.call.command,
            "--model": FilePath(options.model).name,
            "--system": digest_of(options.system),
            "model (its weights)": model_digest(source, **trust),
            "tokenizer": tokenizer_digest(source, **trust),
            "data (paths)": paths.digest(),
            "versions": installed_versions(),
        }

    def _features(
        self, source: ModelSource, paths: Paths, marks: dict[str, Any], found: Contents | None, out: OutputDirectory
    ) -> Features:
        """The features of all paths; without torch where the journal has everything."""
        from toolbox.landscape.features import Scoring
        from toolbox.landscape.scoring import Job, features_of, score_paths

        done = {} if found is None else found.scored
        if found is not None and not found.head.left_out and len(done) == len(paths.to_score()):
            self._tell(paths)
            self._send_home(source)
            return features_of(paths, done, msgspec.convert(found.head.scoring, Scoring))
        chains, template = self._encode(source, paths)
        settled: list[Scoring] = []

        def begin(device: str, dtype: str, processes: int) -> Journal:
            self.processes = processes
            scoring = self._scoring(paths, marks, template, device, dtype)
            settled.append(scoring)
            told = msgspec.to_builtins(scoring)
            if found is not None:
                check_fingerprint(found.head.scoring, told)
                self.reporter.note(f"goes on: {len(done)} of {len(chains)} paths were scored before")
            return Journal(out.partial / NAME, Head(marks, told, self.reader.left_out), found)

        names = [paths.paths[number].id for number in paths.to_score()]
        scored = score_paths(self.options, self.call, source, Job(chains, done, names, begin))
        assert scored is not None
        return features_of(paths, scored, settled[0])

    def _encode(self, source: ModelSource, paths: Paths) -> tuple[list[Chain], str]:
        """The chains to score, and the name of the chat template."""
        from toolbox.landscape.encode import encode_paths, load_encoder

        encoder, window = load_encoder(self.options, source)
        chains = encode_paths(paths, encoder, window, self.reader.refuse)
        self.reader.some(paths)
        check_map(self.options, paths)
        self._tell(paths)
        return chains, encoder.template

    def _scoring(self, paths: Paths, marks: dict[str, Any], template: str, device: str, dtype: str) -> Scoring:
        from toolbox.landscape.features import Scoring

        options, wording = self.options, self.options.wording
        return Scoring(
            model=marks["--model"],
            model_digest=marks["model (its weights)"],
            tokenizer_digest=marks["tokenizer"],
            dtype=dtype,
            template=wording.template,
            context=wording.context,
            separator=wording.separator,
            split=wording.split,
            method=options.method,
            versions=marks["versions"],
            options={
                "chat_template": template,
                "compat": options.compat or "none",
                "device": device,
                "drop_answer_thought": wording.drop_answer_thought,
                "paths": paths.texts_digest(),
                "system": marks["--system"],
            },
        )

    def _send_home(self, source: ModelSource) -> None:
        """Tell the other processes, where there are any, that there is nothing to score."""
        if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from toolbox.landscape.scoring import score_paths

            score_paths(self.options, self.call, source, None)

    # -- finishing
    def _finish(
        self, out: OutputDirectory, paths: Paths, features: Features, marks: dict[str, Any], before: int
    ) -> None:
        """Map, measure, draw, commit; only then the lines, since who has them may look at the directory."""
        from toolbox.landscape.output import make_result, summary_table, write_directory

        options = self.options
        result = make_result(options, features, paths, self.reporter.note)
        write_directory(out.partial, result)
        lines = result.lines()
        record = {
            "command": self.call.command,
            "settings": self.call.settings,
            "fingerprint": self._fingerprint(marks),
            "inputs": {"paths": marks["data (paths)"]},
            "scoring": msgspec.to_builtins(features.scoring),
            "left_out": self.reader.skipped,
            "scored_before": before,
            "processes": self.processes,
            "done": lines[-1],
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "wall_seconds": round(time.time() - self.began, 1),
        }
        with atomic_file(out.partial / RUN_FILE) as handle:
            handle.write(json.dumps(record, indent=2).encode() + b"\n")
        if options.html is not None:
            from toolbox.landscape.html import write_html

            inside = out.partial / FilePath(options.html).name
            write_html(inside if in_output(options.html, options) else options.html, result)
        out.commit()
        self._write(lines)
        self.reporter.show(summary_table(result.cells))
        total = len(paths.to_score())
        self.reporter.note(f"wrote {options.out} ({total - before} paths scored, {before} were scored before)")

    def _fingerprint(self, marks: dict[str, Any]) -> dict[str, Any]:
        """``marks`` and whatever else decides a finished directory."""
        return marks | option_marks(self.options, _NOT_DECIDING | set(_SCORING))

    def _repeat(self, out: OutputDirectory, marks: dict[str, Any]) -> None:
        """``--resume`` of a run that is finished: say so and write its lines again."""
        from toolbox.landscape.output import LINES_FILE

        record = json.loads((out.final / RUN_FILE).read_bytes())
        made = record.get("fingerprint", {"command": record.get("command")})
        check_fingerprint(made, self._fingerprint(marks))
        self._write([msgspec.json.decode(line) for line in (out.final / LINES_FILE).read_bytes().splitlines()])
        self.reporter.note(f"{self.options.out} is finished; nothing was scored")

    def _write(self, lines: list[dict[str, Any]]) -> None:
        writer = JsonlWriter(self.call.streams)
        for line in lines:
            writer.write(line)
        writer.close()

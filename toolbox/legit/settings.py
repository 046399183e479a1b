"""The settings that legit's commands share, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from toolbox.legit.data import Bins, RowReader, Table, Variable, find_variables, read_table
from toolbox.legit.design import DesignOptions
from toolbox.legit.learner import LearnerOptions
from toolbox.legit.records import DataRow
from toolbox.legit.scores import ScoreOptions
from toolbox.legit.stages import Ask, StageOptions, read_plan
from toolbox.models.ask import Asker, Asking
from toolbox.models.backends import EndpointOptions
from toolbox.models.generate import Decoding, TextRequest
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.records import RecordReader, parse_map, write_rejects


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How data rows are read."""

    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    variables: str | None = None
    network: str | None = None
    bins: int | None = None
    binning: str = "quantile"

    def given(self, call: Invocation) -> list[Variable] | None:
        """The variables of ``--variables`` or ``--network``."""
        return find_variables(self.variables, self.network, call.streams)

    def read(
        self, file: str, call: Invocation, variables: Sequence[Variable] | None, kept: Bins | None = None
    ) -> Table:
        """All rows of ``file``; bad ones are dealt with as asked."""
        rejected: list[bytes] = []
        records = RecordReader(
            [DataRow], renames=parse_map(self.map_fields), on_bad=self.on_bad,
            rejects=lambda raw, _: rejected.append(raw),
        )  # fmt: skip
        reader = RowReader(variables, bins=self.bins or 0, binning=self.binning, kept=kept)
        try:
            table = read_table(file, call.streams, reader, records)
        finally:
            if records.skipped:
                call.reporter.warn(f"{records.skipped} bad rows left out")
                if self.rejects is not None:
                    write_rejects(self.rejects, rejected)
        return table


@dataclass(frozen=True, kw_only=True)
class Settings(Rows, EndpointOptions):
    """The options of legit-target and legit-loop that decide a design; ``given_options`` were typed or in a recipe."""

    seed: int = 0
    strategy: str = "git"
    rounds: int = 33
    n: int = 32
    allow: str | None = None
    forbid: str | None = None
    per_cost: bool = False
    plan: str | None = None
    n_warmup: int = 3
    n_bootstrap: int = 2
    resample: str = "all"
    ask: int = 5
    self_consistency: int = 5
    redraws: int = 2
    show_edges: bool = False
    allow_repeat: bool = False
    anonymise: bool = False
    prompt_warmup: str | None = None
    prompt_bootstrap: str | None = None
    on_llm_error: str = "auto"
    obs_iters: int = 1000
    model_iters: int = 100
    graph_iters: int = 100
    hidden: int = 64
    num_graphs: int = 100
    batch: int = 128
    lambda_sparse: float = 0.004
    fit_rows: str = "obs"
    no_mask_states: bool = False
    imagined_graphs: int = 10
    imagined_rows: int = 32
    git_norm: str = "theta"
    git_reduce: str = "mean-norm"
    ait_strata: str = "value"
    backend: str = "none"
    log: str | None = None
    replay: str | None = None
    temperature: float = 1.0
    max_new_tokens: int = 1024
    system: str | None = None
    model: str = "smollm2"
    trust_remote_code: bool = False
    device: str = "cpu"
    threads: int | None = None
    given_options: frozenset[str] = frozenset()

    def stages(self, strategy: str, variables: Sequence[Variable] | None) -> StageOptions:
        """The stages of one strategy; the plan is read where it is used and the variables are known.

        It serves plan+X, and legit+X where there is no language model to ask.
        """
        listed: tuple[str, ...] = ()
        planner = strategy.partition("+")[0] if "+" in strategy else ""
        if self.plan is not None and (planner == "plan" or (planner == "legit" and self.backend == "none")):
            listed = read_plan(self.plan, self.network, variables) if variables is not None else ("",)
        return StageOptions(
            strategy=strategy, n_warmup=self.n_warmup, n_bootstrap=self.n_bootstrap, resample=self.resample,
            ask=self.ask, self_consistency=self.self_consistency, redraws=self.redraws, show_edges=self.show_edges,
            allow_repeat=self.allow_repeat, anonymise=self.anonymise, on_llm_error=self.on_llm_error,
            prompt_warmup=self.prompt_warmup, prompt_bootstrap=self.prompt_bootstrap, plan=listed,
        )  # fmt: skip

    def design(self, strategy: str, seed: int, variables: Sequence[Variable] | None) -> DesignOptions:
        """All that decides one design."""
        learner = LearnerOptions(
            hidden=self.hidden, num_graphs=self.num_graphs, batch=self.batch, lambda_sparse=self.lambda_sparse,
            obs_iters=self.obs_iters, model_iters=self.model_iters, graph_iters=self.graph_iters,
            fit_rows=self.fit_rows, mask_states=not self.no_mask_states,
        )  # fmt: skip
        scores = ScoreOptions(
            imagined_graphs=self.imagined_graphs, imagined_rows=self.imagined_rows, git_norm=self.git_norm,
            git_reduce=self.git_reduce, ait_strata=self.ait_strata,
        )  # fmt: skip
        return DesignOptions(
            seed=seed, rounds=self.rounds, n=self.n, per_cost=self.per_cost, device=self.device,
            stages=self.stages(strategy, variables), learner=learner, scores=scores,
        )  # fmt: skip

    def asking(self, *, resume: bool) -> Asking | None:
        """Who is asked; None for nobody."""
        if self.backend == "none":
            return None
        return Asking(
            backend=self.backend, model=self.model, trust_remote_code=self.trust_remote_code, base_url=self.base_url,
            api_key_env=self.api_key_env, concurrency=self.concurrency, rpm=self.rpm, timeout=self.timeout,
            retries=self.retries, log=self.log, resume=resume, replay=self.replay, system=self.system,
            decoding=Decoding(self.max_new_tokens, self.temperature),
        )  # fmt: skip

    def check(self, strategies: Sequence[str]) -> None:
        """UsageProblem (2) for what does not fit together, before anything is read or asked."""
        if self.variables is not None and self.network is not None and not self.separate_network:
            raise UsageProblem("--variables and --network exclude one another", "give one of them")
        asking = self.asking(resume=True)
        if asking is not None:
            asking.check(model_given="model" in self.given_options)
        for strategy in strategies:
            options = self.design(strategy, 0, None)
            options.check()
            if options.stages.asks and asking is None:
                raise UsageProblem(
                    f"strategy {strategy} needs a language model", "name one with --backend, or give a list with --plan"
                )
        if self.plan is not None and not any("+" in strategy for strategy in strategies):
            raise UsageProblem("--plan has no use with these strategies", "as in --strategy plan+git")
        check_device(self.device)

    @property
    def separate_network(self) -> bool:
        """Whether a network may stand beside ``--variables``: in a loop it is where rows come from."""
        return False


def check_device(name: str) -> None:
    """Unavailable (69) for an accelerator that is not there; ``cpu`` costs nothing to check."""
    if name == "cpu":
        return
    from toolbox.models.device import find_device

    find_device(name, "cpu is always there")


@contextmanager
def opened(asking: Asking | None, call: Invocation) -> Iterator[Ask | None]:
    """A function that asks the language model; None without one. A question put twice is answered once."""
    if asking is None:
        yield None
        return
    answers: dict[tuple[str, str], str] = {}
    with Asker(asking, call.streams, call.reporter.note) as asker:

        def ask(requests: Sequence[TextRequest]) -> list[str]:
            missing = [one for one in requests if (one.key, str(one.content)) not in answers]
            for one, done in zip(missing, asker.ask(missing) if missing else [], strict=True):
                answers[one.key, str(one.content)] = done.text
            return [answers[one.key, str(one.content)] for one in requests]

        yield ask

"""Paths as chains of tokens for a model's tokenizer; and what identifies the model and its tokenizer.

Importing this costs no torch; encoding needs transformers, and never the weights.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from toolbox.landscape.data import Asking, Path, Paths
from toolbox.landscape.wording import Wording
from toolbox.models.facts import context_window, weights_digest, weights_directory
from toolbox.models.load import ModelSource, base_model, load_config, load_tokenizer
from toolbox.shell.errors import BadData
from toolbox.shell.files import sha256_file
from toolbox.weights.provenance import canonical

if TYPE_CHECKING:
    from toolbox.landscape.settings import Options
    from toolbox.models.chains import Chain

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken",
    "chat_template*",
)  # fmt: skip


class Encoder:
    """Makes chains of paths. ``template`` and ``system`` are those of lm-generate: ``messages`` are rendered and a bare
    ``prompt`` is asked exactly as it does, so that a context is the text under which the path was sampled."""

    def __init__(self, tokenizer: Any, wording: Wording, template: str = "auto", system: str | None = None) -> None:
        from toolbox.models.chat import Chat

        self._tokenizer, self._wording = tokenizer, wording
        self._chat = Chat(tokenizer, template, system)
        bare = template == "auto" and tokenizer.chat_template is None
        self._plain = Chat(tokenizer, "raw", system) if bare else self._chat
        self._contexts: dict[Asking, str | tuple[int, ...]] = {}

    @property
    def template(self) -> str:
        """The name of the chat template."""
        return self._chat.name

    def context(self, asking: Asking) -> str | tuple[int, ...]:
        """What the first thought stands behind: ids of a rendered prompt, or the question as plain text.

        Raises: BadData where the template refuses the conversation.
        """
        if asking not in self._contexts:
            self._contexts[asking] = self._rendered(asking)
        return self._contexts[asking]

    def _rendered(self, asking: Asking) -> str | tuple[int, ...]:
        if asking.prompt is not None and (asking.turns is None or self._plain is not self._chat):
            return tuple(self._plain.prompt([{"role": "user", "content": asking.prompt}]))
        if asking.turns is not None:
            return tuple(self._chat.prompt([{"role": role, "content": content} for role, content in asking.turns]))
        return asking.text

    def chain(self, path: Path, answers: tuple[str, ...]) -> Chain:
        """The path's context and thoughts, with the answers asked at the start and behind every thought.

        Raises: BadData for texts without a token.
        """
        from toolbox.models.chain_text import encode_chain

        assert path.asking is not None
        parts = [self.context(path.asking), *path.thoughts]
        between, before = self._wording.separator, self._wording.answer_separator
        return encode_chain(self._tokenizer, parts, answers, between, answer_separator=before)


def load_encoder(options: Options, source: ModelSource) -> tuple[Encoder, int | None]:
    """The encoder for a prepared ``source``, and the model's window; its weights are not loaded."""
    trust = options.trust_remote_code
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    config = load_config(base_model(source, trust_remote_code=trust), trust_remote_code=trust)
    return Encoder(tokenizer, options.wording, options.template, options.system), context_window(config)


def encode_paths(
    paths: Paths, encoder: Encoder, window: int | None, refuse: Callable[[BadData, Path], None]
) -> list[Chain]:
    """A chain for each of ``paths.to_score()``, in that order.

    Paths that have no tokens or do not fit the model's ``window`` go to ``refuse``, which raises or has them left out:
    nothing is ever cut.
    """
    from toolbox.models.chain_plan import window_problem

    chains: dict[str, Chain] = {}
    while True:
        gone = []
        for number in paths.to_score():
            path = paths.paths[number]
            if path.id in chains:
                continue
            try:
                chain = encoder.chain(path, paths.questions[path.question].answers)
            except BadData as problem:
                refuse(path.record.bad(f"path {path.id}: {problem.reason}", problem.advice, problem.field), path)
                gone.append(path)
                continue
            if problem := window_problem(chain, window):
                advice = "take a model with a longer window, or leave the path out with --on-bad skip"
                refuse(path.record.bad(f"path {path.id}: {problem}", advice), path)
                gone.append(path)
                continue
            chains[path.id] = chain
        if not gone:
            return [chains[paths.paths[number].id] for number in paths.to_score()]
        paths.leave_out(gone)


# --- identity ---------------------------------------------------------------------------------------------------------


def model_digest(source: ModelSource, *, trust_remote_code: bool = False) -> str:
    """What tells the weights of a prepared ``source`` from any others, an adapter's base included: sha256, or on the
    hub its id and revision."""
    own = weights_digest(source) or _revision(source, trust_remote_code)
    base = base_model(source, trust_remote_code=trust_remote_code)
    if base is source:
        return own
    both = canonical([own, model_digest(base, trust_remote_code=trust_remote_code)])
    return hashlib.sha256(both.encode()).hexdigest()


def tokenizer_digest(source: ModelSource, *, trust_remote_code: bool = False) -> str:
    """sha256 over the tokenizer's files, whatever directory they lie in; on the hub its id and revision."""
    directory = weights_directory(source)
    if directory is None:
        return _revision(source, trust_remote_code)
    files = sorted(file for file in directory.iterdir() if _of_tokenizer(file))
    base = base_model(source, trust_remote_code=trust_remote_code)
    if not files and base is not source:
        return tokenizer_digest(base, trust_remote_code=trust_remote_code)
    told = canonical({file.name: sha256_file(file) for file in files})
    return hashlib.sha256(told.encode()).hexdigest()


def _of_tokenizer(file: FilePath) -> bool:
    return file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _TOKENIZER_FILES)


def _revision(source: ModelSource, trust_remote_code: bool) -> str:
    """``id@commit`` of a model of the hub, by where its configuration lies in the hub's cache; the id alone where that
    is not known."""
    from huggingface_hub import try_to_load_from_cache

    load_config(source, trust_remote_code=trust_remote_code)  # into the cache, where it is not there yet
    found = try_to_load_from_cache(source.name, "config.json")
    return f"{source.name}@{FilePath(found).parent.name}" if isinstance(found, str) else source.name

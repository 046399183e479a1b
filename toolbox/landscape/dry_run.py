"""``--dry-run``: how much there is to score and what it costs, without loading weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolbox.landscape.data import Path, Paths
from toolbox.landscape.settings import Options
from toolbox.models.load import ModelSource, base_model, load_config, prepare
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.streams import JsonlWriter

if TYPE_CHECKING:
    from toolbox.models.chains import Chain

_LOGITS = 1 << 24  # numbers that the scorer has at once


def show_plan(
    options: Options, call: Invocation, source: ModelSource, paths: Paths, refuse: Callable[[BadData, Path], None]
) -> None:
    """The plan: counts, tokens by method, floating-point operations, memory, answers that merge with their text.

    Operations are 2 a parameter and token, those of attention left out. Memory is that of the weights, of the keys and
    values of the longest chain and of the logits that exist at once; activations come on top.
    """
    from toolbox.landscape.encode import encode_paths, load_encoder
    from toolbox.models.chain_plan import Route, plan_chains
    from toolbox.models.facts import count_parameters

    prepare(source, call.reporter.note)
    encoder, window = load_encoder(options, source)
    chains = encode_paths(paths, encoder, window, refuse)
    tokens = {
        method: plan_chains(chains, Route(method), batch_tokens=options.batch_tokens, batch_chains=1).tokens
        for method in ("tree", "prefix", "naive")
    }  # type: ignore[arg-type]
    parameters = count_parameters(source, trust_remote_code=options.trust_remote_code)
    memory = _memory(options, source, parameters, chains)
    plan = {
        "chains": len(chains),
        "longest": max(chain.longest for chain in chains),
        "window": window,
        "tokens": tokens,
        "flops": {method: 2 * parameters * count for method, count in tokens.items()},
        "parameters": parameters,
        "memory_bytes": memory,
        "asked": sum(len(chain.asked()) for chain in chains),
        "respelt": sum(chain.respelt for chain in chains),
        "template": encoder.template,
    }
    write_plan(call, paths, plan)
    call.reporter.note(
        f"{parameters / 1e6:.1f} M parameters, {tokens[options.method]:,} tokens by the {options.method} method "
        f"({tokens['naive'] / tokens[options.method]:.1f} times fewer than by the naive one); at least "
        f"{memory / 2**30:.1f} GiB"
    )


def _memory(options: Options, source: ModelSource, parameters: int, chains: Sequence[Chain]) -> int:
    trust = options.trust_remote_code
    config = load_config(base_model(source, trust_remote_code=trust), trust_remote_code=trust)
    config = config.get_text_config(decoder=True)
    size = 2 if options.dtype == "bf16" else 4
    heads = getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    kept = 2 * getattr(config, "num_hidden_layers", 0) * (getattr(config, "num_key_value_heads", None) or heads) * width
    # A chain is followed by as many rows of answers as a batch takes.
    longest = max(len(chain.ids) for chain in chains) + options.batch_tokens
    return size * (parameters + kept * longest) + 4 * _LOGITS


def write_plan(call: Invocation, paths: Paths, more: Mapping[str, Any]) -> None:
    """The one line of ``--dry-run``."""
    sizes = Counter(len(question.answers) for question in paths.questions)
    thoughts = [len(path.thoughts) for path in paths.paths]
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "questions": len(paths.questions), "paths": len(paths.paths),
        "states": sum(thoughts), "k": {str(k): sizes[k] for k in sorted(sizes)},
        "without_thoughts": thoughts.count(0), "single_thought": thoughts.count(1),
        "read": sum(path.pred >= 0 for path in paths.paths), **more, "settings": call.settings,
    })  # fmt: skip
    writer.close()

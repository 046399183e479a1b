"""What a model can take: the tree of continuations under a mask, a cache alone, or neither.

What the configuration says is asked first. Then a few tokens are run by both ways, because whether an architecture
honours a mask and position ids of one's own shows in its states alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from toolbox.models.chain_passes import ChainCache, Passes, pack
from toolbox.models.chain_plan import Method, Route
from toolbox.models.tree import Branch, Chunk, grow, visible

_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, NotImplementedError)
"""What architectures raise at arguments that they cannot take."""


def find_route(passes: Passes, method: Method) -> Route:
    """How to score with this model when ``method`` is asked for."""
    name, config = type(passes.model).__name__, passes.config.get_text_config(decoder=True)
    if method == "naive":
        return Route("naive")
    if reason := _without_cache(passes):
        return Route("naive", f"{name} {reason}")
    tree_span, cache_span = _tree_span(config), _cache_span(config)
    reason = None
    if method == "tree":
        reason = _without_mask(passes) or _differs(passes, tree=True)
        if reason is None:
            return Route("tree", None, tree_span, cache_span)
    if fault := _differs(passes, tree=False):
        return Route("naive", f"{name} {fault}")
    return Route("prefix", reason and f"{name} {reason}", None, cache_span)


# -- what the configuration says ----------------------------------------------------------------------------------
def _without_cache(passes: Passes) -> str | None:
    if "past_key_values" not in passes.accepts:
        return "keeps no keys and values"
    for layer in DynamicCache(config=passes.config).layers:
        # A layer that keeps nothing, since it shares another one's keys or has no attention, is no hindrance.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and type(layer).__name__ != "DummyLayer":
            return "has layers whose state cannot be set back (state-space, linear attention)"
    return None


def _without_mask(passes: Passes) -> str | None:
    if "position_ids" not in passes.accepts:
        return "takes no position ids"
    attention = getattr(passes.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        return f"runs with {attention} attention, which takes no mask of one's own"
    if "local" in (getattr(passes.config, "attention_layers", None) or ()):
        return "has local attention by a token's place, whatever its position id"
    return None


def _tree_span(config: Any) -> int | None:
    """The shortest sliding window (or chunk) of its layers: within it each layer sees all."""
    windows = [
        layer.sliding_window
        for layer in DynamicCache(config=config).layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    return min(windows, default=None)


def _cache_span(config: Any) -> int | None:
    """Tokens beyond which rotary frequencies depend on the length of the text, so that the keys of a longer one are no
    use to its beginnings."""
    found = getattr(config, "rope_parameters", None) or {}
    spans = []
    for rope in found.values() if all(isinstance(value, dict) for value in found.values()) else [found]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            spans.append(original or config.max_position_embeddings)
    return min(spans, default=None)


# -- what its states show -------------------------------------------------------------------------------------------
_LENGTH, _CUT, _CONTEXT = 8, 4, 2


def _differs(passes: Passes, *, tree: bool) -> str | None:
    """Run a few tokens and three continuations of their beginning from a cache and without one; what to say if the
    hidden states are not the same."""
    try:
        with passes.evaluating():
            found, expected = _states(passes, tree)
    except _ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"does not take {'a mask for every token' if tree else 'a cache of this kind'} ({type(error).__name__})"
    if not bool(expected.isfinite().all()):
        return None  # damaged weights: the scores will tell
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    precise = found.dtype in (torch.float32, torch.float64)
    # In half precision a router of experts may decide otherwise for a token or two.
    worst = float(error.max() if precise else error.median())
    if worst <= (1e-4 if precise else 0.1):
        return None
    how = "under a mask and position ids of one's own" if tree else "from a cache"
    return f"gives other states {how} (by {worst:.1%})"


def _states(passes: Passes, tree: bool) -> tuple[Tensor, Tensor]:
    """Hidden states (n, d) of the same tokens by way of the cache, and in plain passes."""
    vocabulary = passes.model.get_input_embeddings().weight.shape[0]
    ids = [(7919 * number + 11) % vocabulary for number in range(_LENGTH + 5)]
    chain, (a, b, c, d, e) = ids[:_LENGTH], ids[_LENGTH:]
    pairs = ((a, b), (a, c), (d, e))
    cache = ChainCache(passes.config, _LENGTH)
    tokens, places = torch.tensor([chain]), torch.arange(_LENGTH)[None]
    parts = (slice(0, _CONTEXT), slice(_CONTEXT, _LENGTH))
    found = [_run(passes, cache, tokens[:, part], places[:, part]) for part in parts]
    if tree:
        forest = grow([Branch(_CUT, (*pair, 0)) for pair in pairs])  # the last token, whichever, is not fed
        packed = pack([forest], [Chunk(0, 0, forest.rows)])
        fed, positions, *seen = (torch.from_numpy(part).to(passes.device) for part in packed)
        hidden = _run(passes, cache, fed, positions, visible(_LENGTH, *seen))
        row_of = dict(zip(forest.later_slot.tolist(), forest.later_row.tolist(), strict=True))
        found += [hidden[[row_of[3 * number + 1], row_of[3 * number + 2]]] for number in range(len(pairs))]
    else:
        cache.keep(_CUT)
        lines = passes.forward(
            torch.tensor(pairs).to(passes.device), places[:, _CUT : _CUT + 2].expand(3, -1).to(passes.device), cache
        )
        found += list(lines)
    plain = torch.tensor([chain, *([*chain[:_CUT], *pair, *chain[_CUT + 2 :]] for pair in pairs)])
    expected = passes.model.base_model(input_ids=plain.to(passes.device), use_cache=False).last_hidden_state
    return torch.cat(found), torch.cat([expected[0], *expected[1:, _CUT : _CUT + 2]])


def _run(passes: Passes, cache: ChainCache, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    return passes.forward(ids.to(passes.device), positions.to(passes.device), cache, mask)[0]

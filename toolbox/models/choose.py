"""Which of several continuations does a model find likeliest? Mean log-probability a token, prefixes shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolbox.models.chain_text import encode_chain
from toolbox.models.chains import Chain, score_chains


def choice_chain(tokenizer: Any, context: Sequence[int], options: Sequence[str], separator: str = " ") -> Chain:
    """A context (token ids) with its options asked behind it; ``separator`` stands before each.

    Raises: BadData for an option without a token.
    """
    return encode_chain(tokenizer, [list(context)], list(options), answer_separator=separator)


def mean_logprobs(model: Any, chains: Sequence[Chain]) -> list[list[float]]:
    """Mean ln p a token of each option of each chain, in order. The number of options may differ from chain to chain.

    Raises: BadData for a context too long for the model's window; NotFinite; TryAgain when memory runs out.
    """
    scored = score_chains(model, chains)
    return [(one.logprob[0] / one.n_tokens[0]).tolist() for one in scored]


def likeliest(scores: Sequence[float]) -> int:
    """The place of the greatest; of equal ones the first."""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))

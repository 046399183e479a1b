"""Can one tell from the model that a row was trained on? Four scores, their AUC, and PrivLeak.

All scores are made of the row's labelled tokens (answer and end token), with l_i = −log p_i, and all point one way:
**higher looks more like a member**. AUC is P(a member's score > a non-member's), ties half: 1 where every forget row
looks learned, .5 where it cannot be told from rows that were never seen, below .5 where it looks less likely than
those, the mark of having been pushed too far.

========================= ====================================================================
``loss``                  −(1/T) Σ l_i
``zlib``                  −Σ l_i / bytes of the zlib-compressed text
``min_k``                 mean of the lowest share k of log p_i
``min_k_plus_plus``       mean of the lowest share k of (log p_i − μ_i)/σ_i
========================= ====================================================================

μ_i, σ_i are mean and standard deviation of log p over the vocabulary under the model's own prediction at i. A share k
of T tokens is ⌊kT⌋ of them, at least one.

Sources: Yeom et al. 2018 (arXiv 1709.01604); Carlini et al. 2021 (arXiv 2012.07805); Shi et al., arXiv 2310.16789;
Zhang et al., arXiv 2404.02936, equation 3; Shi et al., "MUSE", arXiv 2407.06460.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from toolbox.models.chat import Encoded
from toolbox.models.head import Head
from toolbox.models.score import SCORE_TOKENS, TokenScores, score_batches
from toolbox.models.token_loss import TokenLoss, collate
from toolbox.stats import Interval, auc, bootstrap_weights

SHARE = 0.2
"""k of Min-K and Min-K++. MUSE's PrivLeak uses .4."""
_LEAST_STD = 1e-3
"""Where a prediction is certain σ is 0 and the quotient undefined; open-unlearning bounds σ² at 1e-6 as well."""
_DRAWS = 1000
_OTHER_STREAM = 1 << 64
"""Added to a seed: no user's other seed draws the same."""


@dataclass(frozen=True, slots=True)
class Moments:
    """At each labelled token of a row, ``mean`` (T,) and ``std`` (T,) of log p over the vocabulary, weighted by p."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]


@torch.no_grad()
def vocabulary_moments(
    head: TokenLoss,
    rows: Sequence[Encoded],
    *,
    device: torch.device | str = "cpu",
    pad_id: int = 0,
    max_tokens: int = SCORE_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> list[Moments]:
    """μ = Σ_v p_v log p_v and σ² = Σ_v p_v (log p_v − μ)² where each labelled token is predicted, in the order of rows.

    One forward pass a row without dropout; logits exist for ``head.chunk`` positions at once.
    """
    training = head.model.training
    head.model.eval()
    try:
        found: list[Moments | None] = [None] * len(rows)
        for members in score_batches([len(row.ids) for row in rows], max_tokens):
            batch = collate([rows[index] for index in members], pad_id).to(device)
            model: Any = head.model.get_base_model() if hasattr(head.model, "get_base_model") else head.model
            hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
            mean, std = _moments(hidden.flatten(0, 1)[batch.where], Head.of(model), head.chunk)
            for place, index in enumerate(members):
                own = (batch.row == place).cpu()
                found[index] = Moments(mean[own].numpy(), std[own].numpy())
            if on_batch is not None:
                on_batch(len(members))
        return found  # type: ignore[return-value]
    finally:
        head.model.train(training)


def _moments(hidden: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n,) on the CPU, by chunks of positions."""
    means, deviations = [hidden.new_empty(0, dtype=torch.float32)], [hidden.new_empty(0, dtype=torch.float32)]
    for part in hidden.split(chunk):
        log_p = torch.log_softmax(head.logits(part), dim=-1)
        p = log_p.exp()
        log_p.masked_fill_(p == 0, 0.0)  # 0 · log 0 is 0, also where a logit is −∞
        mean = (p * log_p).sum(dim=-1, keepdim=True)
        # Around the mean rather than by E[x²] − E[x]², whose difference is rounding where σ is small.
        deviations.append(p.mul_(log_p.sub_(mean).square_()).sum(dim=-1).sqrt().float())
        means.append(mean.squeeze(-1).float())
    return torch.cat(means).cpu(), torch.cat(deviations).cpu()


def labelled_text(tokenizer: Any, row: Encoded) -> str:
    """The text of the row's labelled tokens without end tokens: what ``zlib`` compresses."""
    ids = [id for id, labelled, end in zip(row.ids, row.labelled, row.end, strict=True) if labelled and not end]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def loss_score(nll: ArrayLike) -> float:
    """−(1/T) Σ l_i."""
    return -float(_tokens(nll).mean())


def zlib_score(nll: ArrayLike, text: str) -> float:
    """−(1/T) Σ l_i / bytes of zlib(text): log-perplexity over the text's entropy as a compressor sees it.

    As defined by Carlini et al. (arXiv 2012.07805) and in the code of Min-K++ and open-unlearning; being divided by
    length twice, it favours short rows.
    """
    return -float(_tokens(nll).mean()) / len(zlib.compress(text.encode("utf-8")))


def min_k(nll: ArrayLike, share: float = SHARE) -> float:
    """Mean of the lowest ``share`` of log p_i."""
    return _lowest(-_tokens(nll), share)


def min_k_plus_plus(nll: ArrayLike, moments: Moments, share: float = SHARE) -> float:
    """Mean of the lowest ``share`` of (log p_i − μ_i)/max(σ_i, .001)."""
    values = _tokens(nll)
    if len(values) != len(moments.mean):
        raise ValueError(f"{len(values)} tokens but moments of {len(moments.mean)}")
    std = np.maximum(moments.std.astype(np.float64), _LEAST_STD)
    return _lowest((-values - moments.mean.astype(np.float64)) / std, share)


def membership_scores(
    scores: TokenScores, text: str, moments: Moments | None = None, share: float = SHARE
) -> dict[str, float]:
    """All scores of one row; ``min_k_plus_plus`` only where ``moments`` are given."""
    found = {
        "loss": loss_score(scores.nll),
        "zlib": zlib_score(scores.nll, text),
        "min_k": min_k(scores.nll, share),
    }
    if moments is not None:
        found["min_k_plus_plus"] = min_k_plus_plus(scores.nll, moments, share)
    return found


def membership(
    members: Sequence[Mapping[str, float]], non_members: Sequence[Mapping[str, float]], *, seed: int = 0
) -> dict[str, Any]:
    """``{"n", "auc", "intervals"}``: AUC of each score over forget rows (members) and rows never seen, with 95 %
    bootstrap intervals over the rows of both sides (``{"low", "high", "n"}``; bounds None where a side has one row).

    ValueError: one side empty, or a score that is NaN.
    """
    if not members or not non_members:
        raise ValueError("membership needs rows on both sides")
    found = {
        name: auc_interval([one[name] for one in members], [one[name] for one in non_members], seed=seed)
        for name in members[0]
    }
    return {
        "n": {"members": len(members), "non_members": len(non_members)},
        "auc": {name: one.estimate for name, one in found.items()},
        "intervals": {name: {key: one.as_record()[key] for key in ("low", "high", "n")} for name, one in found.items()},
    }


def auc_interval(members: ArrayLike, non_members: ArrayLike, *, draws: int = _DRAWS, seed: int = 0) -> Interval:
    """AUC with the 95 % percentile bootstrap interval, rows of either side resampled on their own.

    A draw is Σ_ij u_i v_j k_ij / (n m) with k_ij = 1, ½ or 0 and multinomial u, v. Both bounds are NaN where a side has
    a single row. Errors as ``toolbox.stats.auc``.
    """
    estimate = auc(members, non_members)
    above = np.asarray(members, dtype=np.float64)[:, None]
    below = np.asarray(non_members, dtype=np.float64)[None, :]
    n, m = above.shape[0], below.shape[1]
    if min(n, m) == 1:
        return Interval(estimate, math.nan, math.nan, n + m)
    wins = (above > below) + 0.5 * (above == below)
    first = np.concatenate(list(bootstrap_weights(n, draws, seed)))
    second = np.concatenate(list(bootstrap_weights(m, draws, seed + _OTHER_STREAM)))
    drawn = np.einsum("dm,dm->d", first @ wins, second) / (n * m)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), n + m)


def privleak(auc: float, auc_ref: float) -> float:
    """((1 − auc) − (1 − auc_ref)) / ((1 − auc_ref) + 1e-10) · 100, auc_ref that of a model trained without the rows.

    0: the rows look as they would had they never been learned. Down to −100: they still look learned. Above 0: they
    look less likely than that, which gives them away as well. MUSE's own AUC is our 1 − auc.
    """
    return ((1 - auc) - (1 - auc_ref)) / ((1 - auc_ref) + 1e-10) * 100


def _tokens(nll: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(nll, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError("a row without a labelled token has no membership score")
    return values


def _lowest(values: NDArray[np.float64], share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"a share lies in (0, 1], got {share}")
    count = max(1, math.floor(round(share * len(values), 9)))
    return float(np.sort(values)[:count].mean())

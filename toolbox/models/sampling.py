"""The choice of tokens: greedy, or drawn with noise that depends on what is sampled alone.

Importing this module costs no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    import torch

    from toolbox.models.generate import Decoding


def noise_stream(seed: int, key: str, position: int) -> int:
    """The 64-bit number (signed) that all noise of one position of one request is drawn from."""
    name = f"{seed}:{position}:{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def gumbel_noise(streams: Sequence[int], vocabulary: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel noise, float32 [len(streams), vocabulary], each row a function of its stream alone.

    Token t of stream s takes output t + 1 of SplitMix64 seeded with s (Steele, Lea & Flood 2014), as a uniform
    number v on (0, 1) by its upper 63 bits; the noise is -ln(-ln(1 - v)). As 1 - v rather than v goes into the inner
    logarithm, large noise, which decides, is resolved finely although all is float32. Integer arithmetic makes the
    draw the same on every device, and nothing is copied to it but the streams.
    """
    import torch

    golden, first, second = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
    bits = torch.arange(1, vocabulary + 1, device=device).mul_(golden)
    bits = bits + torch.tensor(streams, dtype=torch.int64, device=device)[:, None]
    for shift, factor in ((30, first), (27, second), (31, 1)):  # >> keeps the sign: mask it to get a logical shift
        bits = bits.bitwise_xor_((bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)
    uniform = (bits >> 1).bitwise_and_(2**63 - 1).bitwise_or_(1).to(torch.float32).mul_(2.0**-63)
    # float32 may round up to 1, whose noise of -inf could lose against tokens outside the nucleus
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def outside_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask [rows, vocabulary] of the tokens beyond the most probable ones that together reach ``top_p``.

    The nucleus (Holtzman et al. 2020, section 3.1) is the smallest such set, with all tokens that tie with its least
    probable one: so it does not depend on how a sort treats ties.
    """
    import torch

    likely = min(probabilities.shape[-1], 1024)  # sorting a whole vocabulary costs ten times as much
    ordered = probabilities.topk(likely, dim=-1).values
    if likely < probabilities.shape[-1] and bool((ordered.sum(-1) < top_p).any()):
        ordered = probabilities.sort(dim=-1, descending=True).values
    mass_before = torch.nn.functional.pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    least = ordered.masked_fill(mass_before >= top_p, math.inf).amin(-1, keepdim=True)
    return probabilities < least


def choose_tokens(
    logits: torch.Tensor, decoding: Decoding, keys: Sequence[str], position: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of every row and, if asked for, its log-probability under the untempered model.

    ``logits`` is float32 [rows, vocabulary]; ``keys`` are the rows' request keys, ``position`` counts generated
    tokens from 0. Sampling is by Gumbel-max: the argmax of ln p + noise is a draw from p. Returns int64 [rows] and
    float32 [rows] or None. Logits that are not numbers are BadData.
    """
    import torch

    best, ids = logits.max(dim=-1, keepdim=True)  # the first of equal maxima
    if not bool(torch.isfinite(best).all()):
        raise BadData("the model's logits are not numbers", "its weights may be damaged, or too large for --dtype")
    if decoding.temperature > 0:
        # relative to the best, so that a tiny temperature gives 0 and -inf, neither inf - inf nor 0 / 0
        scores = (logits - best) / max(decoding.temperature, 1e-30)
        if decoding.top_p < 1:
            scores = scores.masked_fill(outside_nucleus(scores.softmax(-1), decoding.top_p), -math.inf)
        streams = [noise_stream(decoding.seed, key, position) for key in keys]
        ids = gumbel_noise(streams, logits.shape[-1], logits.device).add_(scores).argmax(-1, keepdim=True)
    logprobs = None
    if decoding.logprobs:
        logprobs = (logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
    return ids.squeeze(-1), logprobs

"""The objectives of the field by name: what each needs and which of its constants are its own defaults. No torch.

================ ==================================================================== =========================
name             forget loss                                                          source
================ ==================================================================== =========================
ga               −(1/N) Σ l                                                           TOFU, arXiv 2401.06121
graddiff         ga + α · retain NLL                                                  TOFU
klmin            ga + α · KL(p_ref ‖ p) on the retain rows                            TOFU
npo              −(2/β) · mean over rows of log σ(β (L − L_ref))                      NPO, arXiv 2404.05868
simnpo           −(2/β) · mean over rows of log σ(β (L/T − δ))                        SimNPO, arXiv 2410.07163
idk              NLL of refusals + α · retain NLL                                     TOFU
dpo              −(2/β) · mean over rows of log σ(β [(L_ref − L)(refusal) − (L_ref − L)(answer)])   TOFU
wga              SatImp's weights with (β1, β2) = (1, 0)                              G-effect, arXiv 2502.19301
satimp           SatImp's weights                                                     SatImp, arXiv 2505.11953
tnpo, wtnpo      token-wise NPO weights                                               G-effect
rmu              ‖h − c·u‖²/d on forget, ‖h − h_ref‖²/d on retain rows                RMU, arXiv 2403.03218
undial           cross-entropy to softmax(z_ref − β · onehot(y))                      UNDIAL, arXiv 2402.10052
ceu              cross-entropy to the other tokens' own probabilities                 CE-U, arXiv 2503.01224
================ ==================================================================== =========================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Entry:
    """One objective.

    ``refusals``: needs another answer for every forget row. ``reference``: its forget loss needs the first model itself
    (where that model's log-probabilities of the forget rows are enough, they are computed once and no copy is kept).
    ``retain_loss``: the kind of retain loss it is defined with, where that is not the user's choice; both kinds compare
    with the first model. ``alpha``, ``gamma``, ``beta``: defaults. ``options``: the command line's names of the
    constants that it uses.
    """

    alpha: float = 0.0
    gamma: float = 1.0
    beta: float | None = None
    refusals: bool = False
    reference: bool = False
    retain_loss: Literal["kl", "hidden"] | None = None
    options: tuple[str, ...] = ()


OBJECTIVES: dict[str, Entry] = {
    "ga": Entry(),
    "graddiff": Entry(alpha=1.0),
    "klmin": Entry(alpha=1.0, retain_loss="kl"),
    "npo": Entry(beta=0.1, options=("beta",)),
    "simnpo": Entry(beta=4.5, gamma=0.125, options=("beta", "delta_margin")),
    "idk": Entry(alpha=1.0, refusals=True),
    "dpo": Entry(beta=0.1, refusals=True, options=("beta",)),
    "wga": Entry(),
    "satimp": Entry(alpha=0.1, options=("beta1", "beta2")),
    "tnpo": Entry(),
    "wtnpo": Entry(),
    "rmu": Entry(alpha=1.0, retain_loss="hidden", options=("layer", "steer")),
    "undial": Entry(beta=10.0, reference=True, options=("beta",)),
    "ceu": Entry(),
}

CONSTANTS = {"beta1": 5.0, "beta2": 0.1, "delta_margin": 0.0, "layer": 7, "steer": 20.0}
"""Defaults of constants that belong to one objective alone, or to SatImp."""


@dataclass(frozen=True)
class Constants:
    """The constants of a run's objective, each one resolved."""

    gamma: float
    alpha: float
    beta: float
    beta1: float
    beta2: float
    delta_margin: float
    layer: int
    steer: float


def resolve(name: str, given: dict[str, float | int | None]) -> Constants:
    """``given`` with the defaults of the objective ``name`` where nothing (None) is given."""
    entry = OBJECTIVES[name]
    defaults = {"gamma": entry.gamma, "alpha": entry.alpha, "beta": entry.beta or 0.0, **CONSTANTS}
    return Constants(**{key: value if (value := given.get(key)) is not None else defaults[key] for key in defaults})

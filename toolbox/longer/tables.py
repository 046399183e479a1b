"""Embedding tables, and the optimiser that trains them: row-wise Adagrad.

Tables stay out of the gradient norm that is clipped, out of weight decay and out of Adam's moments, which would triple
their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SPREAD = 0.05


class DenseTables(nn.Module):
    """One ``nn.Embedding`` a feature, N(0, .05²), row 0 (padding) zero.

    ``sparse``: gradients hold the touched rows only, which costs what a batch touches; DDP wants them dense, with the
    same result.
    """

    def __init__(self, rows: Mapping[str, int], widths: Mapping[str, int], *, sparse: bool = False) -> None:
        super().__init__()
        self.names = {name: f"table_{place}" for place, name in enumerate(rows)}
        for name, key in self.names.items():
            table = nn.Embedding(rows[name], widths[name], padding_idx=0, sparse=sparse)
            with torch.no_grad():
                if widths[name] == 1:  # a bias starts at none
                    table.weight.zero_()
                else:
                    table.weight.normal_(0.0, _SPREAD)
                    table.weight[0].zero_()
            self.add_module(key, table)

    def look_up(self, ids: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """``{use: (table, ids)}`` to ``{use: vectors}``: ids of any shape, one more dimension."""
        return {use: getattr(self, self.names[table])(index) for use, (table, index) in ids.items()}


class RowwiseAdagrad(torch.optim.Optimizer):
    """s_row += mean_j g_rowj²; w_row -= lr · g_row / (√s_row + ε). Gradients of equal ids are summed first.

    One number of state a row. A row whose gradient is zero keeps its bytes, so sparse and dense gradients give the
    same tables. Source: the row-wise Adagrad of FBGEMM and DLRM.
    """

    def __init__(self, params: Any, lr: float = 0.05, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["sum"] = torch.zeros(parameter.shape[0], dtype=torch.float32, device=parameter.device)
                _update(parameter, parameter.grad, state["sum"], group["lr"], group["eps"])


def _update(parameter: Tensor, gradient: Tensor, sums: Tensor, lr: float, eps: float) -> None:
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
    else:
        rows = gradient.any(-1).nonzero().squeeze(-1)
        values = gradient[rows]
    # mean of squares by one reduction over each row, the same for a row alone and among others
    sums[rows] = sums[rows] + values.float().square().mean(-1)
    scale = lr / (sums[rows].sqrt() + eps)
    parameter[rows] = parameter[rows] - (scale[:, None] * values).to(parameter.dtype)

"""A plain causal transformer over [history | globals]: two blocks of width d, no merge, every event a query."""

from __future__ import annotations

from toolbox.longer.method import Longer


class Transformer(Longer):
    """What LONGER is without merging and without choosing queries, the last layer's unread rows left out here too."""

    def __init__(self, dim: int, max_len: int, *, heads: int | None = None, **more: object) -> None:
        super().__init__(
            dim, merge=1, inner_layers=0, queries=max_len, strategy="recent", layers=1, heads=heads, **more
        )  # type: ignore[arg-type]

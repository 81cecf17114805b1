"""Which tokens are visible and which are reconstructed: index tensors of fixed size, no host sync.

Each selector takes the tokens' importance (where it reads that), the clip's noise and its token counts, and returns
(B, V) visible and (B, R) target indices, int64, ascending. Sorts are stable, so ties resolve the same way every time:
the earlier token first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from everest_ds.tokens import TokenBudget


def most_important(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, (B, N) to (B, count), highest first, ties by index."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def least_important(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores, lowest first, ties by index: the control of the paper's Table 16."""
    return scores.argsort(dim=1, stable=True)[:, :count]


# What a selector keeps: (B, N) importance and a count to (B, count) indices, in order of rank.
RANKINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"rero": most_important, "least": least_important}


def by_importance(ranking: str, scores: Tensor | None, noise: Tensor, budget: TokenBudget) -> tuple[Tensor, Tensor]:
    """Keep the first tokens of a ranking; of those, the ones with the least noise are visible (section 4.1)."""
    assert scores is not None
    kept = RANKINGS[ranking](scores, budget.kept)
    return _split(kept.gather(1, noise[:, : budget.kept].argsort(dim=1, stable=True)), budget.visible)


def tube(scores: Tensor | None, noise: Tensor, budget: TokenBudget) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Hide the same places in every slot (VideoMAE): noise is per place."""
    places = noise[:, : budget.per_slot].argsort(dim=1, stable=True)
    starts = torch.arange(budget.slots, device=noise.device).unsqueeze(1) * budget.per_slot
    visible, target = _split(places, budget.visible // budget.slots)
    return (visible.unsqueeze(1) + starts).flatten(1), (target.unsqueeze(1) + starts).flatten(1)


def uniform(scores: Tensor | None, noise: Tensor, budget: TokenBudget) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Hide tokens anywhere, regardless of content."""
    return _split(noise[:, : budget.total].argsort(dim=1, stable=True), budget.visible)


def _split(order: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A row of the table: the function, whether it reads importance, and how much noise per clip it uses."""

    choose: Callable[[Tensor | None, Tensor, TokenBudget], tuple[Tensor, Tensor]]
    reads_importance: bool
    noise_length: Callable[[TokenBudget], int]


SELECTORS: dict[str, Selector] = {
    **{
        ranking: Selector(
            choose=partial(by_importance, ranking), reads_importance=True, noise_length=lambda budget: budget.kept
        )
        for ranking in RANKINGS
    },
    "tube": Selector(choose=tube, reads_importance=False, noise_length=lambda budget: budget.per_slot),
    "random": Selector(choose=uniform, reads_importance=False, noise_length=lambda budget: budget.total),
}

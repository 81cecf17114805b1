"""Which tokens are visible and which are reconstructed: index tensors of fixed size, no host sync.

Each selector takes the tokens' embeddings and the clip's noise and returns (B, V) visible and (B, R) target indices,
int64, ascending. Sorts are stable, so ties resolve the same way every time: the earlier token first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from everest_ds.tokens import TokenBudget


def importance(tokens: Tensor, slots: int) -> Tensor:
    """Redundancy-robust importance: how far each token's embedding moved since the slot before.

    L2 distance between embeddings at the same place in neighbouring slots, before positions are added (EVEREST,
    section 3.1, equation 2). Slot 0 has no predecessor and takes slot 1's values (official code).

    Args:
        tokens: (B, N, D) embeddings, fp32.
        slots: tubelets in time, at least 2.

    Returns:
        (B, N) distances.
    """
    by_slot = tokens.unflatten(1, (slots, -1))
    moved = torch.linalg.vector_norm(by_slot[:, 1:] - by_slot[:, :-1], dim=-1)
    return torch.cat([moved[:, :1], moved], dim=1).flatten(1)


def most_important(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, (B, N) to (B, count), highest first, ties by index."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def least_important(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` lowest scores, lowest first, ties by index: the control of the paper's Table 16."""
    return scores.argsort(dim=1, stable=True)[:, :count]


# What a selector keeps: (B, N) importance and a count to (B, count) indices, in order of rank.
RANKINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"rero": most_important, "least": least_important}


def by_importance(ranking: str, tokens: Tensor, noise: Tensor, budget: TokenBudget) -> tuple[Tensor, Tensor]:
    """Keep the first tokens of a ranking; of those, the ones with the least noise are visible (section 4.1)."""
    kept = RANKINGS[ranking](importance(tokens, budget.slots), budget.kept)
    return _split(kept.gather(1, noise[:, : budget.kept].argsort(dim=1, stable=True)), budget.visible)


def tube(tokens: Tensor, noise: Tensor, budget: TokenBudget) -> tuple[Tensor, Tensor]:
    """Hide the same places in every slot (VideoMAE): noise is per place."""
    places = noise[:, : budget.per_slot].argsort(dim=1, stable=True)
    starts = torch.arange(budget.slots, device=tokens.device).unsqueeze(1) * budget.per_slot
    visible, target = _split(places, budget.visible // budget.slots)
    return (visible.unsqueeze(1) + starts).flatten(1), (target.unsqueeze(1) + starts).flatten(1)


def uniform(tokens: Tensor, noise: Tensor, budget: TokenBudget) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Hide tokens anywhere, regardless of content."""
    return _split(noise[:, : budget.total].argsort(dim=1, stable=True), budget.visible)


def _split(order: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    return order[:, :visible].sort(dim=1).values, order[:, visible:].sort(dim=1).values


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A row of the table: the function, whether it reads embeddings, and how much noise per clip it uses."""

    choose: Callable[[Tensor, Tensor, TokenBudget], tuple[Tensor, Tensor]]
    reads_embeddings: bool
    noise_length: Callable[[TokenBudget], int]


SELECTORS: dict[str, Selector] = {
    **{
        ranking: Selector(
            choose=partial(by_importance, ranking), reads_embeddings=True, noise_length=lambda budget: budget.kept
        )
        for ranking in RANKINGS
    },
    "tube": Selector(choose=tube, reads_embeddings=False, noise_length=lambda budget: budget.per_slot),
    "random": Selector(choose=uniform, reads_embeddings=False, noise_length=lambda budget: budget.total),
}

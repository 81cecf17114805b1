"""Information-intensive frame selection (EVEREST, section 4.2): of more slots than a clip has, take those that change.

The importance of the candidates' tokens decides, whatever ranks tokens afterwards. The slots taken go on as a clip that
never had others: their tokens are scored anew, against the neighbours that they have now.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.models.patches import take
from everest_ds.tokens import TokenBudget

# The rate of a slot without kept tokens. Others have at least 1 / tokens: it comes in behind them, in random order.
_LEAST_RATE = 1e-30
# The shortest wait. A uniform number may be 0, and with no wait at all even the least rate would come in first; the
# smallest other one that float32 draws is 2**-24.
_LEAST_WAIT = 2.0**-25


def kept_per_slot(scores: Tensor, kept: int, slots: int) -> Tensor:
    """Count how many of the ``kept`` most important tokens fall in each slot (the paper's c_i).

    Tokens tied with the last one kept share evenly what is left to count: where nothing moves, all slots count alike.

    Args:
        scores: (B, N) importance, slot by slot.
        kept: tokens to count, 1 to N.
        slots: tubelets in time; divides N.

    Returns:
        (B, slots) fp32, summing to ``kept``; whole numbers except for shares of ties.
    """
    last = scores.sort(dim=1, descending=True).values[:, kept - 1 : kept]
    above, tied = (marked.unflatten(1, (slots, -1)).sum(dim=2) for marked in (scores > last, scores == last))
    left = kept - above.sum(dim=1, keepdim=True)
    return above + tied * (left / tied.sum(dim=1, keepdim=True))


def draw_slots(counts: Tensor, noise: Tensor, number: int) -> Tensor:
    """Draw slots without replacement, each next one with probability proportional to its count.

    Successive sampling, as a race: slot i comes in after an exponentially distributed time of rate c_i, and the first
    ones are taken (Efraimidis and Spirakis 2006). Where fewer slots than asked for count anything, the others fill up,
    each as likely as another.

    Args:
        counts: (B, S), not negative.
        noise: (B, S) uniform in [0, 1).
        number: slots to take, at most S.

    Returns:
        (B, number) int64, ascending: the order of time.
    """
    waits = torch.log1p(-noise).neg().clamp(min=_LEAST_WAIT)
    arrivals = waits / counts.clamp(min=_LEAST_RATE)
    return arrivals.argsort(dim=1, stable=True)[:, :number].sort(dim=1).values


def take_slots(values: Tensor, slot_idx: Tensor, slots: int) -> Tensor:
    """Gather slots: (B, slots * J, ...) at (B, K) int64 to (B, K * J, ...)."""
    return take(values.unflatten(1, (slots, -1)), slot_idx).flatten(1, 2)


def select_frames(scores: Tensor, noise: Tensor, budget: TokenBudget) -> Tensor:
    """Choose the slots to train on from the candidates.

    Args:
        scores: (B, M) importance of all candidates' tokens; M is ``budget.candidate_slots * budget.per_slot``.
        noise: (B, at least ``budget.candidate_slots``) uniform in [0, 1).
        budget: the clip's.

    Returns:
        (B, slots) int64, ascending: which slots are taken.
    """
    counts = kept_per_slot(scores, budget.candidate_kept, budget.candidate_slots)
    return draw_slots(counts, noise[:, : budget.candidate_slots], budget.slots)

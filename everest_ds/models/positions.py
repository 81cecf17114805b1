"""Fixed sine-cosine positions, computed in float64 and kept in fp32 whatever the training precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.tokens import TokenBudget

# Wavelengths grow geometrically up to this (Vaswani et al. 2017, section 3.5).
_LONGEST = 10_000.0


def sine_cosine(positions: Tensor, width: int) -> Tensor:
    """Return the (P, width) table of positions (P,): even columns sine, odd columns cosine."""
    column = torch.arange(width, dtype=torch.float64)
    angles = positions.to(torch.float64).unsqueeze(1) / _LONGEST ** (2 * (column // 2) / width)
    return torch.where(column.long() % 2 == 0, angles.sin(), angles.cos())


def flattened_table(budget: TokenBudget, width: int) -> Tensor:
    """(N, width) over the token index, as in the official code."""
    return sine_cosine(torch.arange(budget.total), width)


def separable_table(budget: TokenBudget, width: int) -> Tensor:
    """(N, width) with a share of the channels for each of time, row and column; time has what is left over."""
    space = width // 6 * 2
    widths = (width - 2 * space, space, space)
    axes = torch.meshgrid(*(torch.arange(n) for n in (budget.slots, budget.rows, budget.columns)), indexing="ij")
    return torch.cat([sine_cosine(axis.flatten(), w) for axis, w in zip(axes, widths, strict=True)], dim=1)


TABLES = {"flattened": flattened_table, "separable": separable_table}


class Positions(nn.Module):
    """A table of positions; a buffer that checkpoints don't hold."""

    table: Tensor

    def __init__(self, kind: str, budget: TokenBudget, width: int) -> None:
        super().__init__()
        self.register_buffer("table", TABLES[kind](budget, width).float(), persistent=False)

    def forward(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Add positions to tokens (B, K, D) that sit at ``index`` (B, K); the sum is in fp32."""
        return tokens + F.embedding(index, self.table)

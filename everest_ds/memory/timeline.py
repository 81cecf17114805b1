"""Bytes over time: blocks that appear and disappear in a fixed order, their sizes linear in the micro-batch.

The order is the same for every micro-batch, so the live bytes at a moment are (fixed + per clip x batch), and the
peak is the highest of those lines: exact at every batch once the two numbers of each block are known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Timeline:
    """An event list under construction: ``blocks[i]`` is (fixed bytes, bytes per clip, label)."""

    blocks: list[tuple[int, int, str]] = field(default_factory=list)
    events: list[int] = field(default_factory=list)  # block number + 1: born; -(block number + 1): gone

    def born(self, fixed: int, label: str, per_clip: int = 0) -> int:
        """A block appears. Returns its number, for :meth:`gone`."""
        self.blocks.append((fixed, per_clip, label))
        self.events.append(len(self.blocks))
        return len(self.blocks) - 1

    def gone(self, block: int) -> None:
        """A block disappears."""
        self.events.append(-(block + 1))

    def flash(self, fixed: int, label: str, per_clip: int = 0) -> None:
        """A block appears and disappears again at once: a temporary."""
        self.gone(self.born(fixed, label, per_clip))

    def freeze(self) -> Curve:
        """Return the finished timeline, ready to be evaluated."""
        return Curve(
            fixed=np.array([b[0] for b in self.blocks], dtype=np.int64),
            per_clip=np.array([b[1] for b in self.blocks], dtype=np.int64),
            labels=[b[2] for b in self.blocks],
            events=np.array(self.events, dtype=np.int64),
        )


@dataclass(frozen=True)
class Curve:
    """A finished timeline."""

    fixed: NDArray[np.int64]
    per_clip: NDArray[np.int64]
    labels: list[str]
    events: NDArray[np.int64]

    def sizes(self, batch: int, granule: int = 1) -> NDArray[np.int64]:
        """Bytes of each block, rounded up to the allocator's ``granule``."""
        sizes = self.fixed + batch * self.per_clip
        return -(-sizes // granule) * granule

    def live(self, batch: int, granule: int = 1) -> NDArray[np.int64]:
        """Live bytes after each event."""
        sizes = self.sizes(batch, granule)
        return np.cumsum(np.sign(self.events) * sizes[np.abs(self.events) - 1])

    def peak(self, batch: int, granule: int = 1) -> int:
        """Highest live bytes."""
        return int(self.live(batch, granule).max())

    def at_peak(self, batch: int, granule: int = 1) -> dict[str, int]:
        """Bytes by label at the (first) moment of the peak; they sum to :meth:`peak`."""
        moment = int(self.live(batch, granule).argmax())
        past = self.events[: moment + 1]
        alive = np.zeros(len(self.labels), dtype=bool)
        alive[past[past > 0] - 1] = True
        alive[-past[past < 0] - 1] = False
        sizes = self.sizes(batch, granule)
        items: dict[str, int] = {}
        for block in np.flatnonzero(alive):
            items[self.labels[block]] = items.get(self.labels[block], 0) + int(sizes[block])
        return {label: size for label, size in items.items() if size}

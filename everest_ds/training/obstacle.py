"""Why something can't be had on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Obstacle:
    """Why something can't be had here, and the command or setting that changes it (if one is known)."""

    why: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.why}: {self.fix}" if self.fix else self.why

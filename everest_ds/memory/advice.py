"""What to add to a training command whose plan doesn't fit: ways that were planned, up to the first that fits.

First a smaller micro-batch, whose passes make the same global batch; then checkpointed blocks; then the shipped
DeepSpeed files, from the one that changes least.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.config.batches import ACCUMULATION, AUTO, GLOBAL, MICRO, Batches
from everest_ds.config.ds_config import SHIPPED, load_ds_config, products_precision, resolve_ds_config, zero_stage
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.schema import Recipe
from everest_ds.memory.elastic import choose, with_micro_batch
from everest_ds.memory.fit import modes_of
from everest_ds.memory.plan import Plan, facts_for, plan

# Those that need nothing of a machine: no folder on NVMe, no ranks in nodes of eight.
_ORDER = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True, kw_only=True)
class Way:
    """Words to add to the command, which replace what it says so far, and what one rank then needs."""

    words: str
    needed_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Stuck:
    """A run whose plan doesn't fit.

    Args:
        recipe: its recipe; ``train.micro_batch`` may be "auto".
        ds_config: its DeepSpeed JSON as loaded.
        batches: clips of a pass, passes and ranks.
        capacity_bytes: what one rank may fill.
        device_type: "cuda" or "cpu".
        host_bytes: what a rank of a GPU may take of the host's memory, for what is offloaded; None: any.
    """

    recipe: Recipe
    ds_config: Mapping[str, Any]
    batches: Batches
    capacity_bytes: int
    device_type: str
    host_bytes: int | None = None

    def best_way(self) -> Way | None:
        """Return the first way that fits; where none does, the one that needs least; None if there is none to try."""
        tried = []
        for way in self.ways():
            if way.fits:
                return way
            tried.append(way)
        return min(tried, key=lambda way: way.needed_bytes, default=None)

    def ways(self) -> Iterator[Way]:
        """Plan one way after another, as they are asked for: the first of a kind takes seconds."""
        modes = dict.fromkeys((self.recipe.model.checkpointing, modes_of(self.recipe)[-1]))
        for name, ds_config in self._files().items():
            for mode in modes:
                way = self._way(name, ds_config, mode)
                if way.words:  # else it is the run itself
                    yield way

    def _files(self) -> dict[str, Mapping[str, Any]]:
        """The run's own DeepSpeed JSON, by the name "", and the shipped ones that it could have, as paths."""
        own = dict(self.ds_config)
        paths = [path for name in _ORDER if (path := SHIPPED / f"{name}.json").is_file()]
        shipped = {_from_here(path): load_ds_config(path) for path in paths}
        return {"": own} | {name: ds for name, ds in shipped.items() if ds != own and self._could_have(ds)}

    def _could_have(self, ds_config: dict[str, Any]) -> bool:
        recipe = self.recipe
        averages = isinstance(recipe, FinetuneRecipe) and recipe.train.ema_decay
        if zero_stage(ds_config) == 3 and (averages or recipe.train.compile):
            return False
        return self._precision(ds_config) == self._precision(self.ds_config)

    def _precision(self, ds_config: Mapping[str, Any]) -> str:
        recipe = with_micro_batch(self.recipe, self.batches.micro)
        bare = {key: value for key, value in ds_config.items() if key not in (GLOBAL, MICRO, ACCUMULATION)}
        facts = facts_for(recipe, self.batches.ranks, self.device_type)
        return products_precision(resolve_ds_config(bare, recipe, facts)[0])

    def _way(self, name: str, ds_config: Mapping[str, Any], mode: str) -> Way:
        model = dataclasses.replace(self.recipe.model, checkpointing=mode)  # type: ignore[arg-type]
        train = dataclasses.replace(self.recipe.train, global_batch=self.batches.total)
        recipe = dataclasses.replace(self.recipe, model=model, train=train)
        planned, micro = self._plan(recipe, dict(ds_config))
        needed_bytes = planned.needed_bytes(micro)
        on_host = sum(planned.host.values()) if self.host_bytes is not None else 0
        words = [
            *self._batch_words(micro, own=not name),
            *([] if mode == self.recipe.model.checkpointing else [f"model.checkpointing={mode}"]),
            *(["--ds_config", name] if name else []),
        ]
        return Way(
            words=shlex.join(words),
            needed_bytes=needed_bytes,
            fits=needed_bytes <= self.capacity_bytes and on_host <= (self.host_bytes or 0),
        )

    def _plan(self, recipe: Recipe, ds_config: dict[str, Any]) -> tuple[Plan, int]:
        """Return a plan and the largest micro-batch that fits by it, or the smallest there is."""
        ranks, device_type = self.batches.ranks, self.device_type
        if _fixed(ds_config) & {MICRO, ACCUMULATION}:  # by the JSON, which no word of the command changes
            micro = self.batches.micro
            planned = plan(with_micro_batch(recipe, micro), ds_config, ranks=ranks, device_type=device_type)
            return planned, micro
        found = choose(recipe, ds_config, ranks=ranks, capacity_bytes=self.capacity_bytes, device_type=device_type)
        return found.plan, found.batches.micro

    def _batch_words(self, micro: int, *, own: bool) -> list[str]:
        """Say the batch as far as it changes; ``own``: under the run's JSON, whose numbers another lacks."""
        fixed, train = _fixed(self.ds_config), self.recipe.train
        whole = [f"train.global_batch={self.batches.total}"]
        unsaid = train.global_batch is None and not (own and GLOBAL in fixed)
        if train.micro_batch == AUTO:
            return whole if unsaid else []
        if micro == self.batches.micro and (own or not fixed):
            return []
        return [f"train.micro_batch={micro}", *(whole if unsaid else [])]


def _fixed(ds_config: Mapping[str, Any]) -> set[str]:
    return {key for key in (GLOBAL, MICRO, ACCUMULATION) if ds_config.get(key, AUTO) != AUTO}


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)

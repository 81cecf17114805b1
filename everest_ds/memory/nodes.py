"""Which DeepSpeed configuration, checkpointing mode and micro-batch a node of a given memory is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from everest_ds.config.load import load_recipe
from everest_ds.config.schema import Recipe
from everest_ds.memory.elastic import Choice, choose
from everest_ds.memory.fit import FitRow, at_capacity, fastest, fit
from everest_ds.memory.gpus import Capacity
from everest_ds.memory.traffic import sent_bytes


@dataclass(frozen=True, kw_only=True)
class NodeRow:
    """A model and method on one node; ``fastest`` and ``choice`` are None where nothing fits.

    ``choice``: how its ranks make the global batch under the fastest configuration that fits (see :mod:`fit`).
    """

    model: str
    method: str
    capacity: Capacity
    ranks: int
    fastest: FitRow | None
    choice: Choice | None

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes are one rank's."""
        found: dict[str, Any] = {
            "model": self.model,
            "method": self.method,
            "capacity_bytes": self.capacity.size_bytes,
            "ranks": self.ranks,
            "fits": self.choice is not None,
        }
        if self.fastest is None or self.choice is None:
            return found
        batches, planned = self.choice.batches, self.choice.plan
        return found | {
            "ds_config": self.fastest.ds_config,
            "checkpointing": self.fastest.checkpointing,
            "max_micro_batch": self.fastest.max_micro_batch,
            "micro_batch": batches.micro,
            "accumulation": batches.accumulation,
            "global_batch": batches.total,
            "predicted_peak_bytes": planned.peak(batches.micro),
            "host_bytes": sum(planned.host.values()),
            "sent_bytes": sent_bytes(planned),
        }


def nodes(
    models: Iterable[str],
    methods: Iterable[str],
    ds_configs: Mapping[str, dict[str, Any]],
    *,
    capacities: Iterable[Capacity],
    ranks: int,
    global_batch: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[NodeRow]:
    """Choose for every model, method and memory of a GPU.

    Raises:
        UserError: an unknown model or method, or a global batch that the ranks can't share.
    """
    capacities = tuple(capacities)
    for model in models:
        for method in methods:
            keys = [f"model.size={model}", f"model.method={method}", "model.attention=fused"]
            recipe = load_recipe(None, [*keys, f"train.global_batch={global_batch}"])
            progress(f"{method} {model}")
            rows = fit(recipe, ds_configs, ranks=ranks, capacity=capacities[0])
            for capacity in capacities:
                best, choice = _best(recipe, ds_configs, at_capacity(rows, capacity), capacity)
                yield NodeRow(model=model, method=method, capacity=capacity, ranks=ranks, fastest=best, choice=choice)


def _best(
    recipe: Recipe, ds_configs: Mapping[str, dict[str, Any]], rows: list[FitRow], capacity: Capacity
) -> tuple[FitRow | None, Choice | None]:
    """The fastest that makes the global batch: several passes take more memory than the one that rows stand for."""
    while (best := fastest(rows)) is not None:
        network = dataclasses.replace(recipe.model, checkpointing=best.checkpointing)  # type: ignore[arg-type]
        choice = choose(
            dataclasses.replace(recipe, model=network),
            ds_configs[best.ds_config],
            ranks=best.plan.setting.ranks,
            capacity_bytes=capacity.size_bytes,
        )
        if choice.fits:
            return best, choice
        rows = [row for row in rows if row is not best]
    return None, None

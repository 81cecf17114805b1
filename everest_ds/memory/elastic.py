"""The same global batch on any number of ranks: the largest micro-batch that fits, accumulation making up the rest.

``train.micro_batch=auto`` and ``memprof fit --global-batch`` both ask :func:`choose`, and so agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everest_ds.config.batches import Batches, largest_divisor, open_share
from everest_ds.config.finetuning import phase_of
from everest_ds.config.load import AnyRecipe
from everest_ds.config.schema import Recipe
from everest_ds.memory.plan import Plan, name_of, plan


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a rank makes its share of a global batch; where even that doesn't fit, with the smallest micro-batch.

    ``needed_bytes`` are one rank's, to be held against ``capacity_bytes``.
    """

    batches: Batches
    needed_bytes: int
    capacity_bytes: int
    plan: Plan = field(repr=False, compare=False)

    @property
    def fits(self) -> bool:
        """Whether the planner says so."""
        return self.needed_bytes <= self.capacity_bytes


def choose(
    recipe: Recipe, ds_config: dict[str, Any], *, ranks: int, capacity_bytes: int, device_type: str = "cuda"
) -> Choice:
    """Choose the largest micro-batch that fits and divides a rank's share of ``train.global_batch``.

    Args:
        recipe: of pre-training or fine-tuning; ``train.micro_batch`` is left out.
        ds_config: a DeepSpeed JSON as loaded, with "auto" for micro-batch and accumulation.
        ranks: of the run.
        capacity_bytes: what one rank may fill.
        device_type: "cuda" or "cpu".

    Raises:
        UserError: see :func:`everest_ds.config.batches.open_share` and :func:`everest_ds.memory.plan.plan`.
    """
    unit = recipe.data.clips_per_video
    share = open_share(recipe.train, ds_config, ranks, unit)

    def planned(micro: int) -> Plan:
        return plan(with_micro_batch(recipe, micro), ds_config, ranks=ranks, device_type=device_type)

    def choice(of: Plan, micro: int) -> Choice:
        batches = Batches(micro=micro, accumulation=share // micro, ranks=ranks)
        needed_bytes = of.needed_bytes(micro)
        return Choice(batches=batches, needed_bytes=needed_bytes, capacity_bytes=capacity_bytes, plan=of)

    # One pass holds no gradients for the next, and so needs less than each of several passes, which need the same.
    at_once = choice(planned(share), share)
    if at_once.fits or share == unit:
        return at_once
    passes = planned(unit)
    largest = min(passes.largest_micro_batch(capacity_bytes), share // 2)
    return choice(passes, largest_divisor(share, largest, unit) or unit)


def with_micro_batch(recipe: AnyRecipe, micro_batch: int) -> AnyRecipe:
    """Return the recipe with another ``train.micro_batch``."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, micro_batch=micro_batch))


@dataclass(frozen=True, kw_only=True)
class ElasticRow:
    """One DeepSpeed configuration on a number of ranks; bytes are one rank's. ``fits`` is false where nothing does."""

    phase: str
    model: str
    method: str
    ds_config: str
    zero: int
    checkpointing: str
    precision: str
    ranks: int
    micro_batch: int
    accumulation: int
    global_batch: int
    predicted_peak_bytes: int
    host_bytes: int
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """The row's fields."""
        return dataclasses.asdict(self)


def elastic(
    recipe: Recipe,
    ds_configs: Mapping[str, dict[str, Any]],
    *,
    world_sizes: Iterable[int],
    capacity_bytes: int,
    device_type: str = "cuda",
    progress: Callable[[str], None] = lambda _: None,
) -> list[ElasticRow]:
    """Choose for every DeepSpeed configuration and number of ranks.

    Args:
        recipe: with ``train.global_batch``.
        ds_configs: name to DeepSpeed JSON as loaded.
        world_sizes: numbers of ranks.
        capacity_bytes: a device's memory.
        device_type: "cuda" or "cpu".
        progress: hears what is being planned.

    Raises:
        UserError: as :func:`choose`.
    """
    rows = []
    for ranks in world_sizes:
        for name, ds_config in ds_configs.items():
            progress(f"{name_of(recipe.model)}, {name}, {ranks} ranks")
            found = choose(recipe, ds_config, ranks=ranks, capacity_bytes=capacity_bytes, device_type=device_type)
            rows.append(_row(found, name))
    return rows


def _row(choice: Choice, name: str) -> ElasticRow:
    planned, batches = choice.plan, choice.batches
    model, setting = planned.recipe.model, planned.setting
    return ElasticRow(
        phase=phase_of(planned.recipe),
        model=model.size,
        method=model.method,
        ds_config=name,
        zero=setting.stage,
        checkpointing=model.checkpointing,
        precision=setting.precision,
        ranks=batches.ranks,
        micro_batch=batches.micro,
        accumulation=batches.accumulation,
        global_batch=batches.total,
        predicted_peak_bytes=planned.peak(batches.micro),
        host_bytes=sum(planned.host.values()),
        fits=choice.fits,
    )

"""Many configurations side by side: what each needs at each global batch, and which fit.

One plan per (model, method, DeepSpeed JSON, checkpointing, attention) answers every batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from everest_ds.config.batches import ACCUMULATION, AUTO, GLOBAL, MICRO
from everest_ds.config.errors import UserError, nearest
from everest_ds.config.load import load_recipe
from everest_ds.config.schema import Recipe
from everest_ds.config.sizes import SIZES
from everest_ds.memory.overheads import Overheads
from everest_ds.memory.plan import Plan, plan

GPUS_PER_NODE = 8
METHODS = ("everest", "videomae")
CHECKPOINTING = ("none", "encoder", "decoder", "full")
ATTENTION = ("fused", "eager")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration at one global batch; the peak is one rank's, the node total that of its (at most 8) ranks."""

    model: str
    method: str
    global_batch: int
    micro_batch: int
    zero: int
    ds_config: str
    checkpointing: str
    attention: str
    precision: str
    predicted_peak_bytes: int
    node_total_bytes: int
    fits: bool
    plan: Plan = field(repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """The row's fields, without the plan behind it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}

    @property
    def configuration(self) -> tuple[str, str, str, str, str]:
        """What tells it from others at the same batch: model, method, DeepSpeed JSON, checkpointing, attention."""
        return self.model, self.method, self.ds_config, self.checkpointing, self.attention


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to compare: every combination.

    ``ds_configs`` maps a name to a DeepSpeed JSON as loaded; ``overrides`` are recipe keys ("model.frames=24") for
    whatever the question leaves open.
    """

    models: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    global_batches: tuple[int, ...]
    ds_configs: Mapping[str, Mapping[str, Any]]
    checkpointing: tuple[str, ...] = ("none",)
    attention: tuple[str, ...] = ("fused",)
    ranks: int
    accumulation: int = 1
    capacity_bytes: int
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values, known in (
            ("model", self.models, tuple(SIZES)),
            ("method", self.methods, METHODS),
            ("checkpointing", self.checkpointing, CHECKPOINTING),
            ("attention", self.attention, ATTENTION),
        ):
            check_known(name, values, known)
        for name, number in (("world size", self.ranks), ("accumulation", self.accumulation)):
            if number < 1:
                raise UserError(f"{name}: must be positive, got {number}")
        if not self.ds_configs or not self.global_batches:
            raise UserError("compare: needs at least one global batch and one DeepSpeed configuration")
        for batch in self.global_batches:
            self.micro_batch(batch)

    def recipe(self, **model: str) -> Recipe:
        """The recipe with the given model settings."""
        return load_recipe(None, [*self.overrides, *(f"model.{key}={value}" for key, value in model.items())])

    def micro_batch(self, global_batch: int) -> int:
        """Clips per rank per pass.

        Raises:
            UserError: the ranks can't share the batch.
        """
        passes = self.ranks * self.accumulation
        if global_batch < 1 or global_batch % passes:
            raise UserError(
                f"global batch {global_batch}: must be a positive multiple of {self.ranks} ranks x accumulation "
                f"{self.accumulation} = {passes}"
            )
        return global_batch // passes


def compare(question: Question, progress: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Plan every combination; ``progress`` hears what is being planned."""
    rows = []
    q = question
    # DeepSpeed configurations vary fastest: they share a model's trace.
    for model, method, attention, checkpointing, name in product(
        q.models, q.methods, q.attention, q.checkpointing, q.ds_configs
    ):
        progress(f"{method} {model}, {name}, checkpointing {checkpointing}, {attention} attention")
        recipe = q.recipe(size=model, method=method, attention=attention, checkpointing=checkpointing)
        planned = plan_any_batch(recipe, q.ds_configs[name], ranks=q.ranks, accumulation=q.accumulation)
        rows += [_row(q, name, batch, planned) for batch in q.global_batches]
    return rows


def plan_any_batch(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    ranks: int,
    accumulation: int = 1,
    device_type: str = "cuda",
    overheads: Overheads | None = None,
) -> Plan:
    """Plan a recipe at a micro-batch that stands for any; batch numbers in the recipe and the JSON are left out."""
    train = dataclasses.replace(recipe.train, micro_batch=1, global_batch=accumulation * ranks)
    ds = dict(ds_config) | dict.fromkeys((GLOBAL, MICRO, ACCUMULATION), AUTO)
    recipe = dataclasses.replace(recipe, train=train)
    return plan(recipe, ds, ranks=ranks, device_type=device_type, overheads=overheads)


def check_known(name: str, values: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise a :class:`UserError` for the first value that isn't known, or if there is none."""
    if not values:
        raise UserError(f"{name}: needs at least one of {', '.join(known)}")
    for value in values:
        if value not in known:
            raise UserError(f"unknown {name} '{value}'{nearest(value, known) or ': one of ' + ', '.join(known)}")


def _row(q: Question, name: str, global_batch: int, planned: Plan) -> Row:
    model, micro = planned.recipe.model, q.micro_batch(global_batch)
    peak_bytes = planned.peak(micro)
    return Row(
        model=model.size,
        method=model.method,
        global_batch=global_batch,
        micro_batch=micro,
        zero=planned.setting.stage,
        ds_config=name,
        checkpointing=model.checkpointing,
        attention=model.attention,
        precision=planned.setting.precision,
        predicted_peak_bytes=peak_bytes,
        node_total_bytes=peak_bytes * min(q.ranks, GPUS_PER_NODE),
        fits=peak_bytes <= q.capacity_bytes,
        plan=planned,
    )

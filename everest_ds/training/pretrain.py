"""A pre-training run, put together."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from everest_ds.config.batches import Batches
from everest_ds.config.ds_config import precision, zero_stage
from everest_ds.config.errors import UserError
from everest_ds.config.schema import Recipe
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import BadSamples, StepSampler, build_loader
from everest_ds.data.manifest import read_manifest
from everest_ds.models import MaskedAutoencoder
from everest_ds.training import checkpoint, ranks
from everest_ds.training.engine import Built, build_pretraining_model, initialise, resolve
from everest_ds.training.export import export_weights
from everest_ds.training.loop import Training, train
from everest_ds.training.metrics import MetricsFile
from everest_ds.training.run_dir import RunDir, environment
from everest_ds.training.schedule import CosineSchedule, build_schedule


def pretrain(recipe: Recipe, raw_ds_config: dict[str, Any]) -> int:
    """Run pre-training to its end on this rank. Returns the exit code.

    Raises:
        UserError: anything in the recipe, the JSON or the data that can't be.
    """
    plan = Plan.make(recipe, raw_ds_config)
    ranks.start()
    built = initialise(plan.model, recipe, plan.ds_config)
    done = checkpoint.load(built.engine, plan.source) if plan.source else 0
    code = train(assemble(plan, built, done))
    if code == 0 and ranks.is_main():
        run_dir = RunDir(Path(recipe.train.output_dir))
        export_weights(built.engine, run_dir.checkpoints, recipe.model, run_dir.weights)
    return code


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that can be known, and found wrong, before any process talks to another."""

    recipe: Recipe
    ds_config: dict[str, Any]
    batches: Batches
    model: MaskedAutoencoder
    dataset: ClipDataset
    source: RunDir | None
    steps_per_epoch: int
    schedule: CosineSchedule

    @classmethod
    def make(cls, recipe: Recipe, raw_ds_config: dict[str, Any]) -> Plan:
        """Resolve a recipe and a DeepSpeed JSON; raises UserError as :func:`pretrain` does."""
        if recipe.data.train is None:
            raise UserError("data.train: no training manifest; give data.train=/path/to/train.csv")
        if recipe.optim.layer_decay != 1:
            raise UserError("optim.layer_decay: layer-wise decay is for fine-tuning; pre-training wants 1.0")
        source = checkpoint.find_resume(recipe)
        entries = read_manifest(recipe.data.train, recipe.data.root, key="data.train")
        model = build_pretraining_model(recipe)
        ds_config, batches = resolve(raw_ds_config, recipe, model)
        if precision(ds_config) == "fp16" and zero_stage(ds_config) == 0:
            raise UserError(
                "ds_config fp16: DeepSpeed 0.19 divides by the loss scale under ZeRO stage 0 but never multiplies by "
                "it; use stage 1 (ds_configs/zero1.json), or bf16"
            )
        dataset = ClipDataset(
            entries,
            recipe.data,
            frames=recipe.model.frames,
            image_size=recipe.model.image_size,
            tokens=model.budget.total,
            seed=recipe.train.seed,
        )
        steps_per_epoch = step_sampler(recipe, batches, len(dataset)).steps_per_epoch
        total = recipe.train.max_steps or recipe.train.epochs * steps_per_epoch
        # Last: a mistake leaves no empty folder behind.
        RunDir(Path(recipe.train.output_dir)).check_writable()
        return cls(
            recipe=recipe,
            ds_config=ds_config,
            batches=batches,
            model=model,
            dataset=dataset,
            source=source,
            steps_per_epoch=steps_per_epoch,
            schedule=build_schedule(recipe.optim, batches.total, steps_per_epoch, total),
        )


def step_sampler(
    recipe: Recipe, batches: Batches, videos: int, first_step: int = 0, last_step: int | None = None
) -> StepSampler:
    """Return the samples of this rank, from a step on."""
    return StepSampler(
        videos,
        seed=recipe.train.seed,
        micro_batch=batches.micro,
        clips_per_video=recipe.data.clips_per_video,
        accumulation=batches.accumulation,
        rank=ranks.rank(),
        ranks=batches.ranks,
        first_step=first_step,
        last_step=last_step,
    )


def assemble(plan: Plan, built: Built, done: int) -> Training:
    """Put the loop's parts together, ``done`` steps into the run."""
    recipe, batches, total = plan.recipe, plan.batches, plan.schedule.total_steps
    run_dir = RunDir(Path(recipe.train.output_dir))
    metrics = None
    if ranks.is_main():
        env = environment(get_accelerator().device_name(), device_name(), built.optimizer, batches.ranks)
        run_dir.write_facts(recipe, plan.ds_config, env, from_step=done)
        metrics = MetricsFile(run_dir.metrics, from_step=done)
        announce(plan, built, done)
    samples = step_sampler(recipe, batches, len(plan.dataset), first_step=done, last_step=total)
    return Training(
        engine=built.engine,
        batches=batches,
        loader=iter(build_loader(plan.dataset, samples, device=built.engine.device.type)),
        schedule=plan.schedule,
        config=recipe.train,
        steps_per_epoch=plan.steps_per_epoch,
        bad_samples=BadSamples(recipe.data.max_bad_share, clips_per_video=recipe.data.clips_per_video),
        metrics=metrics,
        save=partial(checkpoint.save, built.engine, run_dir),
        step=done,
        saved_at=done if plan.source == run_dir else -1,
    )


def announce(plan: Plan, built: Built, done: int) -> None:
    """Say in a few lines what is about to run."""
    model, batches, budget = plan.recipe.model, plan.batches, plan.model.budget
    parameters = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in plan.model.parameters())
    lines = [
        f"{model.method} {model.size}: {parameters / 1e6:.1f} M parameters; of {budget.total} tokens "
        f"{budget.visible} visible, {budget.reconstructed} reconstructed, {budget.dropped} dropped",
        f"{len(plan.dataset)} videos; global batch {batches.total} = micro-batch {batches.micro} x accumulation "
        f"{batches.accumulation} x ranks {batches.ranks}; steps {done} to {plan.schedule.total_steps}",
        built.optimizer,
        f"run directory: {plan.recipe.train.output_dir}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def device_name() -> str:
    """A name for what this rank computes on."""
    return "cpu" if ranks.on_cpu() else str(get_accelerator().current_device_name())

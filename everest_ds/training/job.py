"""What pre-training and fine-tuning have in common: a run resolved, put together, trained to its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError

from everest_ds.config.batches import AUTO, Batches
from everest_ds.config.ds_config import precision, zero_stage
from everest_ds.config.errors import RankError, UserError
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.schema import Recipe
from everest_ds.data.dataset import ClipDataset
from everest_ds.data.loader import BadSamples, StepSampler, build_loader, handed_over_bytes
from everest_ds.data.to_device import DeviceBatches
from everest_ds.memory.plan import Plan
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.training import checkpoint_files, ranks
from everest_ds.training.account import Account, record_memory
from everest_ds.training.average import Average, build_average
from everest_ds.training.bad_steps import BadSteps
from everest_ds.training.checkpoint import FRESH, Checkpoints, Resumed
from everest_ds.training.deepspeed_output import summarise_messages
from everest_ds.training.engine import Built, initialise, resolve, searches_scale
from everest_ds.training.exhaustion import is_out_of_memory
from everest_ds.training.export import export_weights
from everest_ds.training.files import Lines
from everest_ds.training.loop import EXIT_RESTART_ME, Training, train
from everest_ds.training.metrics import MetricsFile
from everest_ds.training.micro_batch import fill_micro_batch
from everest_ds.training.monitors import Monitors, placed
from everest_ds.training.objectives import objective_for
from everest_ds.training.out_of_memory import explained
from everest_ds.training.preemption import StopRequest
from everest_ds.training.preflight import check_memory
from everest_ds.training.resume import keep_global_batch, saved_batch
from everest_ds.training.room import capacity_of, smallest_room
from everest_ds.training.run_dir import RunDir, environment
from everest_ds.training.schedule import CosineSchedule, build_schedule
from everest_ds.training.storage import Writers
from everest_ds.training.utilisation import Utilisation, utilisation
from everest_ds.training.validation import Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that can be known, and found wrong, before the engine is built.

    ``description`` and ``chosen``: lines for rank 0 to say, about the model and about the micro-batch if it was "auto";
    ``validation``: videos to validate on, in fine-tuning; ``planned``: the memory of a rank, on rank 0;
    ``account``: what it takes.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    batches: Batches
    model: MaskedAutoencoder | VideoClassifier
    dataset: ClipDataset
    source: RunDir | None
    steps_per_epoch: int
    schedule: CosineSchedule
    description: list[str]
    chosen: list[str]
    validation: ClipDataset | None
    planned: Plan | None
    account: Account

    @classmethod
    def prepare(
        cls,
        recipe: Recipe,
        raw_ds_config: dict[str, Any],
        *,
        build: Callable[[], tuple[MaskedAutoencoder | VideoClassifier, list[str]]],
        dataset: ClipDataset,
        source: RunDir | None,
        validation: ClipDataset | None = None,
        preflight: bool = True,
    ) -> Job:
        """Resolve a recipe and a DeepSpeed JSON for a model and its videos; a collective call.

        Args:
            recipe: of the run.
            raw_ds_config: the DeepSpeed JSON as loaded.
            build: makes the model, and lines about it; called once it is known that it fits.
            dataset: clips to train on.
            source: the run to continue.
            validation: videos to validate on.
            preflight: whether a run that doesn't fit is refused.

        Raises:
            UserError: they don't go together, memory doesn't suffice, or the run directory can't be written.
        """
        if recipe.train.micro_batch == AUTO:  # for which the ranks meet: what one of them lacks comes first
            with ranks.naming_the_lost():
                ranks.start()
                Writers.of(raw_ds_config).check_source(source)
        asked = keep_global_batch(recipe, source)
        recipe, chosen, room = fill_micro_batch(asked, raw_ds_config)
        ds_config, batches = resolve(raw_ds_config, recipe)
        check_precision(ds_config)
        warn_of_another_batch(source, batches)
        steps_per_epoch = step_sampler(recipe, batches, len(dataset)).steps_per_epoch
        total = recipe.train.max_steps or recipe.train.epochs * steps_per_epoch
        schedule = build_schedule(recipe.optim, batches.total, steps_per_epoch, total)
        if preflight and room is None:
            room = smallest_room(capacity_of(recipe.train.capacity))
        planned = check_memory(asked, recipe, raw_ds_config, ds_config, room if preflight else None)
        account = Account()
        model, description = build()
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
            schedule=schedule,
            description=description,
            chosen=chosen,
            validation=validation,
            planned=planned,
            account=account,
        )


def check_precision(ds_config: dict[str, Any]) -> None:
    """Refuse fp16 at stage 0.

    Raises:
        UserError: it is asked for.
    """
    if precision(ds_config) == "fp16" and zero_stage(ds_config) == 0:
        raise UserError(
            "ds_config fp16: DeepSpeed 0.19 divides by the loss scale under ZeRO stage 0 but never multiplies by it; "
            "use stage 1 (ds_configs/zero1.json), or bf16"
        )


def warn_of_another_batch(source: RunDir | None, batches: Batches) -> None:
    """Say so where the run that is continued had another global batch."""
    if source is not None and (before := saved_batch(source)) not in (0, batches.total):
        log.warning(
            "the global batch was %d and is %d: samples and schedule do not continue where they stopped",
            *(before, batches.total),
        )


def run(job: Job) -> int:
    """Train to the end on this rank and export the weights. Returns the exit code; a collective call.

    Raises:
        UserError: the optimizer can't be had, the checkpoint does not load, too many videos can't be read, or memory
            does not suffice.
    """
    try:
        with ranks.naming_the_lost():
            ranks.start()
            check_same_view(job)
            with StopRequest() as stop:
                return _train(job, stop)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here, where what the trace held on to is gone.
    line = explained(job.recipe, job.ds_config, job.batches, was_auto=bool(job.chosen))
    if ranks.local_rank():
        time.sleep(ranks.LostRankError.linger_s)  # ranks run out of memory together: the first one's line is enough
    raise line


def check_same_view(job: Job) -> None:
    """Compare what the ranks have made of their files, each by itself; a collective call.

    Raises:
        UserError: they differ, and would wait for each other for ever.
    """
    writers = Writers.of(job.ds_config)
    writers.check_storage(Path(job.recipe.train.output_dir))
    writers.check_source(job.source)
    if len(set(ranks.gather((job.batches, job.schedule.total_steps)))) > 1:
        raise UserError("data.train: ranks find different videos or settings; give every node the same files")


def _train(job: Job, stop: StopRequest) -> int:
    run_dir = RunDir(Path(job.recipe.train.output_dir))
    built = initialise(job.model, job.recipe, placed(job.ds_config, run_dir.path), traces=run_dir.traces)
    average = build_average(built.engine.module, job.recipe)
    checkpoints = Checkpoints(built.engine, run_dir, average, ds_config=job.ds_config, global_batch=job.batches.total)
    resumed = checkpoints.load(job.source) if job.source else FRESH
    training = assemble(job, built, average, checkpoints, resumed)
    code = train(training, stop)
    record_memory(job.account, job.planned, training, run_dir)
    summarise_messages(job.ds_config)
    if code:
        return code
    if ranks.is_main():
        export(job, run_dir, training.step, averaged=average is not None)
    # After the export: a validation that fails takes nothing with it.
    if training.validation is not None:
        if ranks.any_rank(stop.asked):
            return EXIT_RESTART_ME
        training.validation(training.step)
    return 0


def export(job: Job, run_dir: RunDir, step: int, *, averaged: bool) -> None:
    """Write the run's weights, those of its last checkpoint, for everything that isn't training.

    Raises:
        UserError: they can't be written.
    """
    folder = run_dir.checkpoints / checkpoint_files.name_of(step)
    try:
        export_weights(folder, job.model.config, run_dir.weights, averaged=averaged)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"train.output_dir: {run_dir.weights} could not be written ({error}); the run is done and saved: make "
            "room, and run again with --resume auto"
        ) from error


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


def assemble(job: Job, built: Built, average: Average | None, checkpoints: Checkpoints, resumed: Resumed) -> Training:
    """Put the loop's parts together."""
    recipe, batches, total, done = job.recipe, job.batches, job.schedule.total_steps, resumed.step
    run_dir = RunDir(Path(recipe.train.output_dir))
    monitors = Monitors(built.engine.monitor)
    metrics, bad_steps = open_records(job, run_dir, built, monitors, done)
    rate = utilisation(recipe, job.ds_config) if ranks.is_main() else Utilisation(None, [])
    if ranks.is_main():
        announce(job, built, done, rate.said)
    samples = step_sampler(recipe, batches, len(job.dataset), first_step=done, last_step=total)
    quarantine = Lines(run_dir.quarantine)
    job.dataset.set_aside(run_dir.set_aside())
    loader = build_loader(
        job.dataset,
        samples,
        device=built.engine.device.type,
        report=lambda video, reason: quarantine.append({"video": video, "reason": reason}),
        beside_bytes=validation_bytes(job, built.engine.device.type),
    )
    return Training(
        engine=built.engine,
        batches=batches,
        loader=DeviceBatches.on(built.engine.device, iter(loader)),
        schedule=job.schedule,
        config=recipe.train,
        steps_per_epoch=job.steps_per_epoch,
        objective=objective_for(recipe),
        average=average,
        validation=build_validation(job, built, average, monitors, done),
        bad_samples=BadSamples(recipe.data.max_bad_share, clips_per_video=recipe.data.clips_per_video),
        bad_steps=BadSteps(bad_steps, job.dataset.path, searching=partial(searches_scale, built.engine)),
        metrics=metrics,
        mfu=rate.mfu,
        checkpoints=checkpoints,
        resumed=resumed,
        saved_at=done if job.source == run_dir else -1,
    )


def open_records(
    job: Job, run_dir: RunDir, built: Built, monitors: Monitors, done: int
) -> tuple[MetricsFile, MetricsFile] | tuple[None, None]:
    """Write the run's facts beside each copy of its checkpoints; on rank 0, return metrics.jsonl and bad_steps.jsonl.

    Raises:
        RankError: the folder can't be written to.
    """
    env = environment(get_accelerator().device_name(), ranks.device_name(), built.optimizer, job.batches.ranks)
    try:
        if Writers.of(job.ds_config).leads:
            run_dir.write_facts(job.recipe, job.ds_config, env, from_step=done)
        if ranks.is_main():
            metrics = MetricsFile(run_dir.metrics, from_step=done, also=partial(monitors.write, "train"))
            return metrics, MetricsFile(run_dir.bad_steps, from_step=done)
    except OSError as error:
        raise RankError(f"train.output_dir: cannot write to {run_dir.path} ({error.strerror}); make room") from error
    return None, None


def build_validation(
    job: Job, built: Built, average: Average | None, monitors: Monitors, done: int
) -> Validation | None:
    """Return what validates a fine-tuning, ``done`` steps into it; None where there is nothing to validate on."""
    recipe = job.recipe
    if job.validation is None or not isinstance(recipe, FinetuneRecipe):
        return None
    every = recipe.train.validate_every_epochs
    return Validation(
        built.engine,
        average,
        dataset=job.validation,
        max_bad_share=recipe.data.max_bad_share,
        videos_per_batch=job.batches.micro,
        every_steps=max(1, round(every * job.steps_per_epoch)) if every else 0,
        path=RunDir(Path(recipe.train.output_dir)).validations,
        from_step=done,
        monitors=monitors,
    )


def validation_bytes(job: Job, device: str) -> int:
    """Return what validations take of /dev/shm while batches to train on are there."""
    recipe = job.recipe
    if job.validation is None or not (isinstance(recipe, FinetuneRecipe) and recipe.train.validate_every_epochs):
        return 0
    return handed_over_bytes(job.validation, job.batches.micro, device)


def announce(job: Job, built: Built, done: int, about_mfu: list[str]) -> None:
    """Say in a few lines what is about to run."""
    batches = job.batches
    lines = [
        *job.description,
        *job.chosen,
        f"{len(job.dataset)} videos; global batch {batches.total} = micro-batch {batches.micro} x accumulation "
        f"{batches.accumulation} x ranks {batches.ranks}; steps {done} to {job.schedule.total_steps}",
        built.optimizer,
        *about_mfu,
        f"run directory: {job.recipe.train.output_dir}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)

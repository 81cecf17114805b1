"""How fast training steps are, against the card's data sheet and its own matrix products; and where the time goes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from everest_ds.config.errors import UserError
from everest_ds.gpu_check import plans
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values
from everest_ds.gpu_check.settings import SPEED, B, Setting
from everest_ds.memory import meters
from everest_ds.memory.overheads import card_here
from everest_ds.memory.utilisation import mfu, peak_of
from everest_ds.models import MaskedAutoencoder
from everest_ds.models.patches import patchify
from everest_ds.training import ranks
from everest_ds.training.measure import Run, measure, timed

_STEPS = 5
_COMPILING_S = 90.0  # at least, with the steps
_KERNELS = 15
_COPIES = ("Memcpy", "Memset")  # run beside kernels
# Of what is free: the allocator can't use every hole between blocks.
_ROOM = 0.9
_TINY_BATCH = 4


def cases(asked: Asked) -> Iterator[Case]:
    """Plain steps of every size, what one of them is made of, and compiled ones for as long as there is time."""
    ranks.start()
    asked_for = [setting for setting in SPEED if setting.asked_for(asked)]
    found: dict[tuple[str, str], Values] = {}
    for setting in asked_for:
        yield Case(name=_name(setting), run=partial(_speed, setting, asked, found))
        if (setting.size, "everest") in found and (setting.size, "videomae") in found:
            yield Case(
                name=f"{setting.size}: EVEREST / VideoMAE", run=partial(_ratio, setting.size, found), always=True
            )
        if setting is asked_for[min(1, len(asked_for) - 1)]:
            first = next(one for one in asked_for if one.size == B)
            yield Case(name=f"{_name(first)}: kernels", run=partial(_kernels, first, asked))
            yield Case(name=f"{_name(first)}: waits of the host", run=partial(_waits, first, asked))
            yield Case(name=f"{_name(first)}: choosing tokens", run=partial(_choosing, first, asked))
    for setting in () if asked.tiny else asked_for:
        compiled = dataclasses.replace(setting, keys=(*setting.keys, "train.compile=true"))
        run = partial(_speed, compiled, asked, {})
        yield Case(name=f"{_name(setting)}, compiled", run=run, least_s=_COMPILING_S)


def _name(setting: Setting) -> str:
    return setting.name.replace(f" {setting.clips} speed", "")


def _batch(setting: Setting, asked: Asked) -> int:
    """The largest of the batches that the plan says fit."""
    if asked.tiny:
        return _TINY_BATCH
    by_batch = plans.wait_for(setting, asked).by_batch
    room = _ROOM * meters.available_bytes(ranks.device())
    fitting = (batch for batch in plans.BATCHES if by_batch[batch] <= room)
    batch = next(fitting, 0)
    if not batch:
        raise NotHereError("not even one clip fits")
    return batch


def _speed(setting: Setting, asked: Asked, found: dict[tuple[str, str], Values]) -> Values:
    batch = _batch(setting, asked)
    measured = measure(setting.recipe(asked, batch), setting.ds_config(), steps=_STEPS)
    peak, flops_per_clip = peak_of(card_here(), setting.precision), measured.flops_per_s / measured.clips_per_s
    values: Values = {
        "clips": batch,
        "step_s": measured.step_s,
        "clips_per_s": measured.clips_per_s,
        "flops_per_s": measured.flops_per_s,
        "product_flops_per_s": measured.matmul_flops_per_s,
        "product_share": measured.flops_per_s / measured.matmul_flops_per_s,
        "flops_per_clip": flops_per_clip,
        "allocated_bytes": measured.measured_peak_bytes,
    }
    if peak is not None:
        share = mfu(measured.clips_per_s, flops_per_clip=flops_per_clip, peak=peak, devices=1)
        values |= {"mfu": share, "data_sheet": peak.data_sheet}
    found[setting.size, setting.method] = values
    return values


def _ratio(size: str, found: dict[tuple[str, str], Values]) -> Values:
    """Seconds and arithmetic of a clip, EVEREST's over VideoMAE's; and memory, if their batches are the same."""
    ours, theirs = found[size, "everest"], found[size, "videomae"]
    values = {
        "seconds_ratio": theirs["clips_per_s"] / ours["clips_per_s"],
        "flops_ratio": ours["flops_per_clip"] / theirs["flops_per_clip"],
    }
    if ours["clips"] == theirs["clips"]:
        values["memory_ratio"] = ours["allocated_bytes"] / theirs["allocated_bytes"]
    return values


def _started(setting: Setting, asked: Asked) -> Run:
    run = Run.start(setting.recipe(asked, _batch(setting, asked)), setting.ds_config())
    for _ in range(2):
        run.step()
    return run


def _kernels(setting: Setting, asked: Asked) -> Values:
    """The dearest kernels of a step, and the share of it in which none runs."""
    run, on_cpu = _started(setting, asked), asked.device == "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not on_cpu)
    with profile(activities=activities) as profiler:
        timed(run.step)
    run.built.engine.destroy()
    wanted = DeviceType.CPU if on_cpu else DeviceType.CUDA
    spent: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        if event.device_type == wanted and not event.is_user_annotation:
            microseconds = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            spent[event.key] = [microseconds / 1000, event.count]
    if not spent:
        raise UserError("the profiler saw no kernel")
    total = sum(ms for ms, _ in spent.values())
    dearest = sorted(spent.items(), key=lambda item: -item[1][0])[:_KERNELS]
    values: Values = {
        "all_ms": total,
        "kernels": [{"name": name, "ms": ms, "count": count, "share": ms / total} for name, (ms, count) in dearest],
    }
    return values if on_cpu else values | _gaps(profiler.events())


def _gaps(events: Any) -> Values:
    """How long no kernel ran between the first and the last, and how many such gaps there were."""
    kernels = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels if not e.name.startswith(_COPIES))
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(merged)]
    whole = merged[-1][1] - merged[0][0]
    return {"idle_share": sum(gaps) / whole, "gaps": len(gaps), "longest_gap_ms": max(gaps, default=0.0) / 1000}


def _waits(setting: Setting, asked: Asked) -> Values:
    """How often the host waits for the device in a step, by torch's own warnings."""
    if asked.device == "cpu":
        raise NotHereError("a host waits for a GPU alone")
    run = _started(setting, asked)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.built.engine.destroy()
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    places = sorted({f"{'/'.join(w.filename.split('/')[-3:])}:{w.lineno}" for w in waits})
    return {"waits": len(waits), "places": places}


def _choosing(setting: Setting, asked: Asked) -> Values:
    """The share of a step that cutting, scoring, choosing and embedding the visible tokens takes, timed alone."""
    run = _started(setting, asked)
    step_s = min(timed(run.step) for _ in range(_STEPS))
    model = run.built.engine.module
    assert isinstance(model, MaskedAutoencoder)
    clips, noise = run.batch.clips.to(ranks.device()), run.batch.noise.to(ranks.device())

    @torch.no_grad()
    def choose() -> None:
        patches = patchify(clips, *model.encoder.cut)
        model.encoder.patch_embed(
            patches, lambda scores: model.selector.choose(scores, noise, model.budget), scored=True
        )

    choose()
    seconds = min(timed(choose) for _ in range(_STEPS))
    run.built.engine.destroy()
    return {"step_s": step_s, "choosing_s": seconds, "share": seconds / step_s}

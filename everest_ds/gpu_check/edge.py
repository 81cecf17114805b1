"""Where memory really ends: the batch that the planner names, and the largest that runs, under a limit."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from everest_ds.gpu_check import plans
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values, WrongError
from everest_ds.gpu_check.settings import EDGE, EDGE_TINY, Setting, edge_capacity_bytes
from everest_ds.memory import meters
from everest_ds.training import ranks
from everest_ds.training.exhaustion import is_out_of_memory
from everest_ds.training.measure import Run

_STEPS = 3
# The search goes in steps of this share of the batch.
_STRIDE = 0.02
_FARTHEST = 12  # steps


def cases(asked: Asked) -> Iterator[Case]:
    """The planner's batch, then up or down to where it changes; cases depend on how those before them ended."""
    ranks.start()
    setting = EDGE_TINY if asked.tiny else EDGE[0]
    found: dict[int, bool] = {}
    start: dict[str, int] = {}
    yield Case(name="one clip, without a limit", run=lambda: _first(setting, asked, start))
    if not start:
        return
    base, named = _Base(held_bytes=start["held_bytes"]), start["named"]

    def look(clips: int, *, claimed: bool = False) -> Case:
        name = f"{clips} clips" + (", as fit names" if claimed else "")
        return Case(name=name, run=partial(_look, setting, asked, base, clips=clips, found=found, claimed=claimed))

    yield look(named, claimed=True)
    up, stride = found.get(named, False), max(1, round(named * _STRIDE))
    for far in range(1, _FARTHEST + 1):
        clips = named + far * stride * (1 if up else -1)
        if clips < 1 or not found:
            break
        yield look(clips)
        if clips not in found or found[clips] != up:
            break
    yield Case(name="largest", run=lambda: _largest(named, found, asked), always=True)


def _first(setting: Setting, asked: Asked, start: dict[str, int]) -> Values:
    """Load what is loaded at first use, which doesn't count; note what the process holds then, and what fit names."""
    if _try_batch(setting, 1, asked) is None:
        raise WrongError("not even one clip runs", {})
    named = plans.wait_for(setting, asked).fits
    start |= {"held_bytes": _Base.now(asked).held_bytes, "named": named}
    return dict(start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Base:
    """What the process holds before anything of a trial's: on a CPU its resident set, else what is outside tensors."""

    held_bytes: int

    @classmethod
    def now(cls, asked: Asked) -> _Base:
        if asked.device == "cpu":
            return cls(held_bytes=meters.resident_bytes())
        free, total = torch.cuda.mem_get_info()
        return cls(held_bytes=int(total - free) - torch.cuda.memory_reserved())


def _look(setting: Setting, asked: Asked, base: _Base, *, clips: int, found: dict[int, bool], claimed: bool) -> Values:
    """Try a batch under the limit, and note whether it runs."""
    with _capped(asked, base):
        reserved = _try_batch(setting, clips, asked)
    found[clips] = reserved is not None
    values = {"clips": clips, "runs": found[clips], **({"reserved_bytes": reserved} if reserved else {})}
    if asked.device == "cuda":  # what an engine that ran out of memory leaves behind counts against the next
        values["left_bytes"] = int(torch.cuda.memory_allocated())
    if claimed and reserved is None:
        raise WrongError(f"memprof fit names {clips} clips, and that runs out of memory", values)
    return values


def _try_batch(setting: Setting, clips: int, asked: Asked) -> int | None:
    """Take some steps; return the bytes that the allocator has reserved (0 on a CPU), None if memory ran out."""
    device = ranks.device()
    meters.forget_workspaces(device)
    reserved = None
    try:
        reserved = _steps(setting, clips, asked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Here, where what the trace held on to is gone.
    meters.forget_workspaces(device)
    meters.return_free_memory()
    return reserved


def _steps(setting: Setting, clips: int, asked: Asked) -> int:
    on_gpu = ranks.device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = Run.start(setting.recipe(asked, clips), setting.ds_config())
    try:
        for _ in range(_STEPS):
            run.step()
        return int(torch.cuda.max_memory_reserved()) if on_gpu else 0
    finally:
        run.built.engine.destroy()


@contextlib.contextmanager
def _capped(asked: Asked, base: _Base) -> Iterator[None]:
    """Let this process take so much and no more: by the allocator's own limit, or on a CPU by the kernel's."""
    capacity = edge_capacity_bytes(asked)
    if asked.device == "cuda":
        _, total = torch.cuda.mem_get_info()
        if total < capacity:
            raise NotHereError(f"the card has {total} bytes, less than the {capacity} that are looked at")
        torch.cuda.set_per_process_memory_fraction((capacity - base.held_bytes) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    left = base.held_bytes + capacity - meters.resident_bytes()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts: private writable memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def _largest(named: int, found: dict[int, bool], asked: Asked) -> Values:
    if not found:
        raise NotHereError("no batch was tried")
    ran = [clips for clips, runs in found.items() if runs]
    failed = [clips for clips, runs in found.items() if not runs]
    return {
        "capacity_bytes": edge_capacity_bytes(asked),
        "named": named,
        "largest_that_ran": max(ran, default=None),
        "smallest_that_did_not": min(failed, default=None),
    }

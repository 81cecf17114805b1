"""Saving a run, and loading what was saved: any number of ranks, any ZeRO stage."""

from __future__ import annotations

import heapq
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.config.ds_config import precision, zero_stage
from everest_ds.config.errors import UserError
from everest_ds.config.place import several_nodes
from everest_ds.training import checkpoint_files as files
from everest_ds.training import ranks
from everest_ds.training.average import Average
from everest_ds.training.run_dir import RunDir
from everest_ds.training.storage import Writers
from everest_ds.training.whole import MASTER, WholeState

log = logging.getLogger(__name__)

AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run continues: ``step`` optimizer steps done, ``counters`` of the loop, ``own`` this rank's sums."""

    step: int
    counters: dict[str, Any]
    own: dict[str, float]


FRESH = Resumed(step=0, counters={}, own={})


class Checkpoints:
    """Writes and reads the checkpoints of one run; every method is a collective call.

    Args:
        engine: DeepSpeed's.
        run_dir: the run's.
        average: averaged weights that go along.
        ds_config: the resolved one, for its stage and precision.
        global_batch: clips per step.
    """

    def __init__(
        self, engine: Any, run_dir: RunDir, average: Average | None, *, ds_config: dict[str, Any], global_batch: int
    ) -> None:
        self._state, self._average, self._engine = WholeState(engine), average, engine
        self._folder, self._writers = run_dir.checkpoints, Writers.of(ds_config)
        self._facts: dict[str, Any] = {
            "ranks": ranks.world_size(),
            "zero_stage": zero_stage(ds_config),
            "precision": precision(ds_config),
            "global_batch": global_batch,
        }

    def save(self, step: int, counters: dict[str, Any], own: dict[str, float]) -> str:
        """Write the state after ``step`` steps, or leave everything as it was.

        Args:
            step: optimizer steps done.
            counters: of the loop, the same on every rank.
            own: this rank's sums.

        Returns:
            Why it could not be written; an empty string if it was.
        """
        folder, writers = files.unfinished(self._folder, step), self._writers
        problem = _first(ranks.gather(_attempt(lambda: _make_empty(folder)) if writers.leads else ""))
        if problem:
            return problem
        name = files.part_name(writers.index, len(writers.ranks))
        tensors = self._own_tensors()  # collective: before anything that one rank alone can fail at
        facts: dict[str, files.Facts] = {}
        problem = _attempt(lambda: facts.update({name: _write_part(folder / name, tensors)}))
        outcomes = ranks.gather((problem, facts, own))
        problem, sealed = _first([outcome[0] for outcome in outcomes]), ""
        if not problem and writers.leads:
            state = self._describe(step, counters, [outcome[2] for outcome in outcomes])
            parts = {name: of_part for rank in writers.ranks for name, of_part in outcomes[rank][1].items()}
            sealed = _attempt(lambda: files.seal(self._folder, step, state, parts))
        problem = problem or _first(ranks.gather(sealed))
        if problem and writers.leads:
            shutil.rmtree(folder, ignore_errors=True)
        return problem

    def thin_out(self, *, keep_last: int, keep_every: int) -> None:
        """Delete old checkpoints, on the first rank of those that write them."""
        if self._writers.leads:
            _attempt(lambda: files.thin_out(self._folder, keep_last=keep_last, keep_every=keep_every))

    def load(self, source: RunDir) -> Resumed:
        """Continue from the newest checkpoint of a run that is whole, naming those that aren't.

        Raises:
            UserError: there is none, or it is another model's.
        """
        folder = self._newest_whole(source.checkpoints)
        try:
            resumed = self._load(folder)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"train.resume: {folder} is not a checkpoint that a run wrote ({error!r})") from error
        if self._writers.leads and source.checkpoints == self._folder:
            # Later ones are damaged, or of a way that was left by hand; they would be taken for this one's.
            _attempt(lambda: files.set_later_aside(self._folder, resumed.step))
        return resumed

    def _load(self, folder: Path) -> Resumed:
        saved = files.read_state(folder)
        tensors = _open(folder)
        step, by_rank, optimizer_steps = int(saved["step"]), saved["by_rank"], int(saved["optimizer_steps"])
        if not 0 <= optimizer_steps <= step:
            raise ValueError(f"{optimizer_steps} optimizer steps in {step}")
        self._restore(folder, tensors, optimizer_steps)
        self._state.scaler = dict(saved["scaler"])
        if self._average is not None:
            self._load_average(folder, tensors, step)
        engine = self._engine
        engine.global_steps, engine.skipped_steps = step, int(saved["skipped_steps"])
        engine.global_samples = step * self._facts["global_batch"]
        if ranks.is_main():
            print(f"continuing {folder}: {self._moved(saved)}", file=sys.stderr, flush=True)
        return Resumed(step=step, counters=dict(saved["counters"]), own=_own_share(by_rank))

    def _own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are this rank's to write, on the CPU; all ranks help to put each together."""
        state, writers = self._state, self._writers
        owners = _owners({name: state.shape(name).numel() for name in state.parameters}, len(writers.ranks))
        found = {}
        for kind, name, whole in state.tensors():
            if owners[name] == writers.index:
                found[f"{kind}/{name}"] = whole.cpu().contiguous()
        if self._average is not None:
            mine = {name: value for name, value in self._average.state.items() if owners[name] == writers.index}
            found |= {f"{AVERAGE}/{name}": value.cpu().contiguous() for name, value in mine.items()}
        return found

    def _describe(self, step: int, counters: dict[str, Any], by_rank: list[dict[str, float]]) -> dict[str, Any]:
        return {
            "step": step,
            **self._facts,
            "optimizer_steps": self._state.steps,
            "skipped_steps": self._engine.skipped_steps,
            "scaler": self._state.scaler,
            "counters": counters,
            "by_rank": by_rank,
        }

    def _newest_whole(self, checkpoints: Path) -> Path:
        # One rank's list of each copy: another may see a file system a little later.
        writers = self._writers
        own = {folder.name: files.digest(folder) for folder in files.newest_first(checkpoints)}
        names = writers.held_by_all(own, checkpoints)
        reasons = []
        for folder in (checkpoints / name for name in names):
            listed = files.names(folder)
            mine = listed[writers.index :: len(writers.ranks)] if listed else None
            reason = _first(ranks.gather(files.damage(folder, mine)))
            if not reason:
                return folder
            reasons.append(f"{folder.name}: {reason}")
            log.warning("checkpoint %s is damaged (%s); the one before it is used", folder, reason)
        raise UserError(f"train.resume: no whole checkpoint in {checkpoints} ({'; '.join(reasons)})")

    def _restore(self, folder: Path, tensors: dict[str, Path], optimizer_steps: int) -> None:
        state = self._state
        missing = [name for name in state.parameters if f"{MASTER}/{name}" not in tensors]
        if missing:
            raise UserError(f"train.resume: {folder} is another model's: it has no {missing[0]}")
        state.allocate()
        wanted = [key for key in tensors if not key.startswith(f"{AVERAGE}/")]
        for key in sorted(wanted, key=lambda key: (state.group(key.partition("/")[2]), key)):
            kind, _, name = key.partition("/")
            with safe_open(tensors[key], framework="pt") as opened:
                value = opened.get_tensor(key)
            if name not in state.parameters or value.shape != state.shape(name):
                raise UserError(f"train.resume: {folder} is another model's: {name} has shape {list(value.shape)}")
            if kind in state.kinds:
                state.write(name, kind, value)
        state.steps = optimizer_steps
        state.finish()

    def _load_average(self, folder: Path, tensors: dict[str, Path], step: int) -> None:
        assert self._average is not None
        wanted = {f"{AVERAGE}/{name}": name for name in self._average.state}
        if not wanted.keys() <= tensors.keys():
            raise UserError(f"train.resume: {folder}: no averaged weights to continue; was ema_decay 0?")
        own = {key: tensors[key] for key in wanted}
        self._average.load({wanted[key]: value for key, value in _values(own)}, step)

    def _moved(self, saved: dict[str, Any]) -> str:
        then, now = (
            f"{of['ranks']} rank{'s' if of['ranks'] > 1 else ''}, ZeRO-{of['zero_stage']}, {of['precision']}, "
            f"global batch {of['global_batch']}"
            for of in (saved, self._facts)
        )
        return f"step {saved['step']} ({then})" + ("" if then == now else f"; from here on {now}")


def tensors_of(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return all tensors of one kind that a checkpoint holds, by parameter."""
    wanted = {key: file for key, file in _open(folder).items() if key.startswith(f"{kind}/")}
    return {key.partition("/")[2]: value for key, value in _values(wanted)}


def _owners(sizes: dict[str, int], number: int) -> dict[str, int]:
    """Share parameters out among ranks so that each writes about as much."""
    loads = [(0, rank) for rank in range(number)]
    owners = {}
    for name, size in sizes.items():
        load, owners[name] = loads[0]
        heapq.heapreplace(loads, (load + size, owners[name]))
    return owners


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_part(file: Path, tensors: dict[str, Tensor]) -> files.Facts:
    save_file(tensors, file)
    return files.describe(file)


def _attempt(work: Any) -> str:
    """Do something that a full or broken disk can refuse; returns the reason, an empty string if it went well."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    except SafetensorError as error:
        return " ".join(str(error).split())
    return ""


def _first(problems: list[str]) -> str:
    """Return the first of all ranks' problems, with its node where there are several; an empty string without any."""
    rank = next((rank for rank, problem in enumerate(problems) if problem), None)
    if rank is None:
        return ""
    return f"{ranks.host_of(rank)}: {problems[rank]}" if several_nodes() else problems[rank]


def _open(folder: Path) -> dict[str, Path]:
    """Return which file holds each tensor."""
    found: dict[str, Path] = {}
    for part in files.parts(folder):
        with safe_open(part, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), part)
    return found


def _values(tensors: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors one at a time, in the same order on every rank."""
    for part in sorted(set(tensors.values())):
        with safe_open(part, framework="pt") as opened:
            for key in sorted(key for key, file in tensors.items() if file == part):
                yield key, opened.get_tensor(key)


def _own_share(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """Return this rank's sums; on other ranks than before, an equal share of all."""
    if len(by_rank) == ranks.world_size():
        return by_rank[ranks.rank()]
    return {key: sum(own[key] for own in by_rank) / ranks.world_size() for key in by_rank[0]}

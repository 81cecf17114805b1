"""Does anything at all work: a real run on real videos, straight through, and killed and continued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from everest_ds.config.errors import UserError
from everest_ds.data.synthetic import write_set
from everest_ds.gpu_check.cases import Asked, Case, NotHereError, Values, WrongError
from everest_ds.gpu_check.golden import largest
from everest_ds.gpu_check.settings import ROOT
from everest_ds.training.run_dir import RunDir

_VIDEOS, _STEPS, _SAVED_EVERY = 64, 24, 6
# A run whose part has less time left is waited for so long all the same: within what the check lets a part overrun.
_LEAST_PATIENCE_S = 15.0
# One that has not ended after so long hangs; one that had less time may be slow.
_ENOUGH_S = 120.0
_LINES = 3
# Between the runs a near-tie of two tokens may fall the other way: about 1e-4 of one step's loss.
_LOSS_BOUND = 1e-3


def cases(asked: Asked) -> Iterator[Case]:
    """Both runs at the same time: either leaves most of a GPU idle."""
    write_set(asked.folder / "videos", train=_VIDEOS, val=8, seed=0)
    straight, killed = (RunDir(asked.folder / name) for name in ("straight", "killed"))
    process, start = _start(asked, straight), time.monotonic()
    try:
        yield Case(name="killed at a checkpoint and continued", run=lambda: _kill_and_continue(asked, killed))
        yield Case(name="straight through", run=lambda: _end(asked, process, straight, start), always=True)
        yield Case(name="the two compared", run=lambda: compare(straight, killed), always=True)
    finally:
        _kill(process)


def _start(asked: Asked, run_dir: RunDir, *more: str) -> subprocess.Popen[bytes]:
    workers = 1 if asked.tiny else min(8, len(os.sched_getaffinity(0)))
    settings = f"data.stride=1 data.crop_scales=[0.75] data.workers={workers} model.size=vit_micro model.image_size=48 "
    settings += "model.decoder_depth=1 model.attention=eager train.micro_batch=8 train.log_every_steps=1 "
    settings += (
        f"train.max_steps={_STEPS} train.save_every_steps={_SAVED_EVERY} optim.warmup_steps=2 optim.base_lr=0.03"
    )
    places = [f"data.train={asked.folder}/videos/train.csv", f"train.output_dir={run_dir.path}"]
    command = [sys.executable, "run/pretrain.py", "--ds_config", "ds_configs/zero2.json", *settings.split(), *places]
    # In this part's process group: whoever ends that ends the run, too.
    with run_dir.path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *more], cwd=ROOT, stdout=log, stderr=log)


def _end(asked: Asked, process: subprocess.Popen[bytes], run_dir: RunDir, start: float) -> Values:
    """Wait for a run.

    Raises:
        UserError: it ended with something else than 0, or hangs.
        NotHereError: it had too little time.
    """
    code: int | str
    try:
        code = process.wait(_patience_s(asked))
    except subprocess.TimeoutExpired:
        _kill(process)
        _explain_time(start)
        code = f"none within {time.monotonic() - start:.0f} s"
    if code:
        lines = run_dir.path.with_suffix(".log").read_text(errors="replace").splitlines()[-_LINES:]
        raise UserError(f"exit code {code}: {' | '.join(lines)}")
    last = _records(run_dir)[-1]
    return {key: last[key] for key in ("step", "loss", "clips_per_s")} | {"process_s": time.monotonic() - start}


def _kill_and_continue(asked: Asked, run_dir: RunDir) -> Values:
    process, start = _start(asked, run_dir), time.monotonic()
    until = start + _patience_s(asked)
    while process.poll() is None and not run_dir.has_checkpoint() and time.monotonic() < until:
        time.sleep(0.01)
    late = process.poll() is None and not run_dir.has_checkpoint()
    _kill(process)
    if late:
        _explain_time(start)
    if not run_dir.has_checkpoint() or run_dir.weights.exists():
        _end(asked, process, run_dir, start)  # says why
        raise UserError("the run was over before it could be killed")
    done = _records(run_dir)[-1]["step"]
    return {"killed_after_step": done, **_end(asked, _start(asked, run_dir, "--resume", "auto"), run_dir, start)}


def _explain_time(start: float) -> None:
    seconds = time.monotonic() - start
    if seconds < _ENOUGH_S:
        raise NotHereError(f"stopped after {seconds:.0f} s, its part's time: --parts run gives it more")


def compare(straight: RunDir, killed: RunDir) -> Values:
    """Hold one run's losses and weights against the other's."""
    if not (straight.weights.is_file() and killed.weights.is_file()):
        raise NotHereError("one of the two did not come to its end")
    of_one, of_other = ([record["loss"] for record in _records(run)] for run in (straight, killed))
    apart = largest(abs(a / b - 1) for a, b in zip(of_one, of_other, strict=True))
    weights, others = (load_file(run.weights) for run in (straight, killed))
    same = all(torch.equal(weights[name], others[name]) for name in weights)
    values = {"steps": len(of_one), "losses_apart": apart, "same_bits": same}
    if apart > _LOSS_BOUND:
        raise WrongError(f"losses differ by {apart:.1e} of themselves, more than {_LOSS_BOUND:.0e}", values)
    return values


def _records(run_dir: RunDir) -> list[Values]:
    return [json.loads(line) for line in Path(run_dir.metrics).read_text(encoding="utf-8").splitlines()]


def _patience_s(asked: Asked) -> float:
    return max(_LEAST_PATIENCE_S, asked.deadline - time.time())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a run; its decoding processes end with it."""
    process.kill()
    process.wait()

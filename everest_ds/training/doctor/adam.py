"""DeepSpeed's compiled ops that runs use, and which Adam comes of it."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from everest_ds.config.errors import UserError
from everest_ds.training import ops
from everest_ds.training.doctor.findings import Finding, Level
from everest_ds.training.optim import ADAMS, choose_adam, which_apex

_BUILD = "about 90 s"  # an Adam, on two cores; the other ops take less


def every_run() -> list[Finding]:
    """Look at the ops of a run without offload."""
    return [_op(ADAMS["deepspeed"].op, "FusedAdam"), _adam("Adam (auto)", offload=False)]


def offload() -> list[Finding]:
    """Look at the ops of runs that keep optimizer states on the host or on NVMe."""
    return [
        _op(ADAMS["offload"].op, ADAMS["offload"].name),
        _op("AsyncIOBuilder", "async_io (NVMe offload)"),
        _adam("Adam (offload)", offload=True),
    ]


def apex() -> list[Finding]:
    """Say which package is called apex here."""
    obstacle = ADAMS["apex"].obstacle()
    if obstacle is None:
        return [Finding(subject="apex", says="NVIDIA's")]
    level: Level = "note" if which_apex() == "other" else "ok"
    return [Finding(subject="apex", level=level, says=f"{obstacle.why}; optional", fix=obstacle.fix)]


def _op(name: str, subject: str) -> Finding:
    obstacle = ops.op_obstacle(name, build=False)
    if obstacle:
        return Finding(subject=subject, level="note", says=f"can't be built: {obstacle.why}", fix=obstacle.fix)
    builder = get_accelerator().create_op_builder(name)
    if ops.prebuilt(builder):
        return Finding(subject=subject, says="built with DeepSpeed")
    folder = ops.build_folder(builder.name)
    if ops.built(builder):
        return Finding(subject=subject, says=f"built, in {folder.parent}")
    return Finding(subject=subject, level="note", says=f"would be built at first use ({_BUILD}), in {folder.parent}")


def _adam(subject: str, *, offload: bool) -> Finding:
    try:
        adam, why = choose_adam("auto", offload, build=False)
    except UserError as error:
        return Finding(subject=subject, level="note", says=str(error))
    return Finding(subject=subject, says=f"{adam.name} ({why})")
